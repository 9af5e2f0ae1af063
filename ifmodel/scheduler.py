"""How a model is to be sampled, read from the scheduler_config.json beside it.

As in `config`, a field that would make other images than ours is refused by name.
"""

from ifmodel.config import check_fixed, check_kind

# IF's way to sample: each field of scheduler_config.json that would change the image, with the values that
# `ifmodel.stage` implements
FIXED = {
    "_class_name": ("DDPMScheduler",),
    "beta_schedule": ("squaredcos_cap_v2",),
    "num_train_timesteps": (1000,),
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),
    "steps_offset": (0,),
    "thresholding": (True,),
    "timestep_spacing": ("leading",),
    "trained_betas": (None,),
    "variance_type": ("learned_range", "fixed_small", "fixed_large"),
}
# … and what diffusers assumes for those that the file leaves out, where that is another value
ASSUMED = {"beta_schedule": "linear", "thresholding": False, "variance_type": "fixed_small"}
# The names that `ddpm_step` has for diffusers' variances; DreamBooth trains eps alone and leaves a fixed one
VARIANCES = {"learned_range": "learned_range", "fixed_small": "beta_tilde", "fixed_large": "beta"}
# Those that matter where nothing but noise is added: to stage 2's small image
NOISING_FIXED = ("beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr", "trained_betas")


def check_scheduler(config: dict, file: str) -> tuple[float, float, str]:
    """The percentile and the maximum of dynamic thresholding, and `ddpm_step`'s variance, by a scheduler_config.json.

    file: what the file is called when a field is refused
    Raises ValueError for a field that `ifmodel.stage` does not implement.
    """
    check_fixed(file, config, FIXED, ASSUMED, "the sampler")
    percentile = config.get("dynamic_thresholding_ratio", 0.995)  # diffusers' defaults, not IF's
    maximum = config.get("sample_max_value", 1.0)
    check_kind(file, "dynamic_thresholding_ratio", percentile, float, "the sampler")
    check_kind(file, "sample_max_value", maximum, float, "the sampler")
    if percentile > 1:
        raise ValueError(f"{file} has dynamic_thresholding_ratio = {percentile}, the sampler implements at most 1")
    return percentile, maximum, VARIANCES[config.get("variance_type", ASSUMED["variance_type"])]


def check_noising_scheduler(config: dict, file: str):
    """Refuse an image_noising_scheduler/ that would noise stage 2's small image in another way. Raises ValueError."""
    check_fixed(file, config, {name: FIXED[name] for name in NOISING_FIXED}, ASSUMED, "the sampler")
