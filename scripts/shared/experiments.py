"""The assignment's experiments: for each, the script with its options, its figures, its equation and its function."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ddpm.estimates import compose
from ddpm.flow import as_estimate, as_velocity, euler_step, flow_loss, integrate, interpolate, velocity_of
from ddpm.losses import ddpm_loss
from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet, sample_digits
from ddpm.mnist.training import denoiser_loss, noisy_digits
from ddpm.process import add_noise, ddpm_step
from ddpm.restoration import restore
from ddpm.sampling import (
    anagram,
    classical_denoise,
    denoise_along,
    guided,
    hybrid,
    inpaint,
    one_step_denoise,
    sample,
    sdedit,
)

# Which of reproduce.py's own options each script takes
STAGE_1 = ("model", "revision", "embeds", "device", "dtype")
CASCADE = (*STAGE_1, "upscaler", "upscaler_revision")
TAKES = {
    **dict.fromkeys(("generate", "sample", "sdedit", "inpaint", "visual_anagram", "hybrid_image"), CASCADE),
    **dict.fromkeys(("one_step_denoise", "iterative_denoise", "restore"), STAGE_1),
    **dict.fromkeys(("denoise_mnist", "flow_velocity"), ("device", "data")),
    "sample_mnist": ("device", "dtype"),
}
FILL_A_FOLDER = ("denoise_mnist", "train_denoiser")  # their --out is one; that of the others is a figure


@dataclass(frozen=True)
class Play:
    """Images of a table under a slider, see PLAY in page.py.

    kind: "turn" or "away", of the first image of each of the rows, which the row below it is seen as at the slider's
        end; or "scrub", through the columns of all these rows at once
    table: the stem of the table's file
    """

    kind: str
    table: str
    rows: tuple[int, ...]
    says: str


@dataclass(frozen=True)
class Experiment:
    """One part of the page.

    key: the assignment's number or numbers; says: a sentence or two; equation: in TeX, as far as matplotlib sets it
    functions: those that do it, whose source is shown
    command: a script and its options, as a shell takes them; fast: more options, with --fast
    figures: files that it makes, and what they show, .gif where there is no JavaScript for `plays`; none for what takes
        too long for a page
    trained: figures of the training of the shipped weights, taken from .github/figures
    plays: what answers to the hand
    """

    key: str
    title: str
    says: str
    equation: str
    functions: tuple[Callable, ...]
    command: str
    figures: dict[str, str]
    fast: str = ""
    trained: dict[str, str] = field(default_factory=dict)
    plays: tuple[Play, ...] = ()

    @property
    def keys(self) -> list[str]:
        return self.key.split(", ")

    @property
    def folder(self) -> str:
        return "-".join(self.keys)

    @property
    def script(self) -> str:
        return self.command.split()[0]

    @property
    def takes(self) -> tuple[str, ...]:
        """Which of reproduce.py's own options the script is given."""
        return TAKES.get(self.script, ())

    def options(self, fast: bool = False) -> list[str]:
        return shlex.split(f"{self.command} {self.fast if fast else ''}")[1:]

    def out(self, root: Path) -> Path:
        """The script's --out: its first figure, or the folder."""
        folder = root / self.folder
        return folder if self.script in FILL_A_FOLDER else folder / next(iter(self.figures))


@dataclass(frozen=True)
class Made:
    """An experiment after its run.

    command: the command line to repeat it; seconds: how long it took
    inputs: a hash of all that decided its figures; failure: what went wrong, if something did
    """

    experiment: Experiment
    command: str
    seconds: float
    inputs: str = ""
    failure: str = ""


NOISED = r"x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon"
ESTIMATE = r"\hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\; \epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}}"
STEP = (
    r"x_{t'} = \frac{\sqrt{\bar\alpha_{t'}}\, \beta}{1 - \bar\alpha_t}\, \hat x_0 + "
    r"\frac{\sqrt{\alpha}\, (1 - \bar\alpha_{t'})}{1 - \bar\alpha_t}\, x_t + \sigma z, "
    r"\quad \alpha = \frac{\bar\alpha_t}{\bar\alpha_{t'}}, \; \beta = 1 - \alpha"
)
GUIDED = r"\epsilon = \epsilon_u + \gamma\, (\epsilon_c - \epsilon_u)"
TWENTY = "--sampler dpm++ --eta 1 --steps 20"  # see weights.md
QUICK = "--upscaler none --steps 10"
STARTS = "--i-start 4 7 8 9 10 12"  # of twenty, as noisy as 1 3 5 7 10 20 of the assignment's 34


def known(name: str) -> str:
    """--image with a drawing that tiny-if has learned from."""
    path = Path(__file__).parents[2] / "tests" / "data" / "emoji" / f"{name}.png"
    return f"--image {shlex.quote(os.path.relpath(path))}"


DOG, ROCKET, SUNFLOWER, PENGUIN = (known(name) for name in ("1F436", "1F680", "1F33B", "1F427"))

EXPERIMENTS = [
    Experiment(
        "A0",
        "Text to images",
        "More and more steps. All images of a column start from the same noise.",
        STEP,
        (ddpm_step, denoise_along),
        "generate --steps-grid 2 4 6 8 12 16",
        {"steps.png": "Rows: numbers of steps. Columns: prompts."},
        fast="--upscaler none",
    ),
    Experiment(
        "A1",
        "The forward process",
        "An image disappears in noise as t grows.",
        NOISED,
        (add_noise,),
        "forward_process",
        {"forward.png": "One image at eight timesteps."},
        plays=(Play("scrub", "forward", (0,), "Through t."),),
    ),
    Experiment(
        "A2",
        "Classical denoising",
        "No model: a Gaussian blur, as wide as the noise asks. It cannot tell a line from noise.",
        r"\hat x_0 = G_{\sigma(t)} * x_t / \sqrt{\bar\alpha_t}",
        (classical_denoise,),
        "classical_denoise",
        {"blurred.png": "Noisy above, blurred below."},
    ),
    Experiment(
        "A3",
        "One-step denoising",
        "The UNet estimates the noise once, and the clean image follows. The more noise, the more the answer is the "
        "mean of all images that it may have been.",
        ESTIMATE,
        (one_step_denoise,),
        f"one_step_denoise {DOG} --prompt 'a photo of a dog'",
        {"one_step.png": "Noisy above, the estimate below."},
        plays=(Play("scrub", "one_step", (0, 1), "Noisy, and the estimate."),),
    ),
    Experiment(
        "A4",
        "Iterative denoising",
        "The same noisy image, step by step instead of at once.",
        STEP,
        (denoise_along, ddpm_step),
        f"iterative_denoise {DOG} --prompt 'a photo of a dog'",
        {
            "iterative.png": "Every fifth step, and the result.",
            "iterative_compared.png": "The blur, one step, and all steps, from the same noisy image.",
        },
        plays=(Play("scrub", "iterative_steps", (0, 1), "At each step: the noisy image, and the estimate."),),
    ),
    Experiment(
        "A5, A6",
        "Sampling from noise, without guidance and with it",
        "Nothing but noise to begin with. Guidance goes further in the direction in which the prompt moves the "
        "estimate.",
        GUIDED,
        (sample, guided),
        f"sample {TWENTY}",
        {
            "samples.png": "For each prompt: γ = 1 above, with guidance below; columns share their noise. “A high "
            "quality photo” names no thing, so some results are only nearly things.",
        },
        fast=QUICK,
    ),
    Experiment(
        "A7",
        "Image to image",
        "SDEdit: noise a drawing, and denoise it from there. The later the start, the more of the drawing stays.",
        r"x_t = \sqrt{\bar\alpha_t}\, x_{\mathrm{drawing}} + \sqrt{1 - \bar\alpha_t}\; \epsilon, "
        r"\quad t = t_{i_{\mathrm{start}}}",
        (sdedit,),
        f"sdedit {TWENTY} {STARTS} 14 16 --prompt 'a high quality photo' {ROCKET} {DOG} {SUNFLOWER}",
        {
            "sdedit.png": "A row for each drawing; from the left, the start moves towards it. The prompt names no "
            "thing: where noise prevails, it becomes another one.",
        },
        fast="--upscaler none",
    ),
    Experiment(
        "A8",
        "Image to image, with a prompt",
        "The same, towards something else.",
        GUIDED,
        (sdedit, guided),
        f"sdedit {TWENTY} {STARTS} --image rocket --prompt 'a rocket ship' --prompt 'a photo of a dog' "
        "--prompt 'a man wearing a hat'",
        {"prompted.png": "One drawing and three prompts."},
        fast="--upscaler none",
    ),
    Experiment(
        "A9",
        "Inpainting",
        "After every step the known pixels are put back, noised to the timestep just reached; at the end they are "
        "exactly those of the image.",
        r"x_t \leftarrow m\, x_t + (1 - m) "
        r"(\sqrt{\bar\alpha_t}\, x_{\mathrm{orig}} + \sqrt{1 - \bar\alpha_t}\; \epsilon)",
        (inpaint,),
        f"inpaint {TWENTY} --resamples 4 "
        f"{ROCKET} --prompt 'a photo of a rocket ship' --mask circle:0.5,0.5,0.25 "
        f"{DOG} --prompt 'a photo of a dog' --mask rectangle:0.25,0.45,0.8,0.95 "
        f"{PENGUIN} --prompt 'a photo of an owl' --mask rectangle:0.05,0.02,0.95,0.5 "
        "--image face --prompt 'a man wearing a hat' --mask rectangle:0.05,0.1,0.42,0.9",
        {
            "inpainted.png": "White in the mask is the hole. Each step is taken four times, as RePaint does, so that "
            "old and new agree. The third drawing is filled with another thing; the last is one of ours, which tiny-if "
            "has never seen.",
        },
        fast=QUICK,
    ),
    Experiment(
        "A10",
        "Visual anagrams",
        "One image, two prompts: each sees it in its own view, and the estimates are turned back and averaged.",
        r"\epsilon = \frac{1}{2} (\epsilon_\theta(x_t, p_1) + \mathrm{flip}(\epsilon_\theta(\mathrm{flip}(x_t), p_2)))",
        (anagram,),
        f"visual_anagram {TWENTY} --num-images 2",
        {
            "anagrams.png": "Each pair of rows: the same images upright and flipped. With tiny-if, pairs of like "
            "shape; the assignment's own, such as an old man and people around a campfire, are too far apart for it.",
        },
        fast=f"{QUICK} --num-images 1",
        plays=(Play("turn", "anagrams", tuple(range(0, 12, 2)), "turned over"),),
    ),
    Experiment(
        "A11",
        "Hybrid images",
        "One prompt for what is seen from afar, another for what is seen up close.",
        r"\epsilon = \mathrm{lowpass}(\epsilon_\theta(x_t, p_1)) + \mathrm{highpass}(\epsilon_\theta(x_t, p_2))",
        (hybrid,),
        f"hybrid_image {TWENTY} --num-images 2",
        {
            "hybrids.png": "For each pair: the images, what is seen of them from afar, and what only up close. With "
            "tiny-if, pairs that are alike when blurred, and σ is 3 of 64 pixels, else 2; the assignment's own, such "
            "as a skull and waterfalls, are too far apart for it.",
        },
        fast=f"{QUICK} --num-images 1",
        plays=(Play("away", "hybrids", tuple(range(0, 18, 3)), "from afar"),),
    ),
    Experiment(
        "B1, B3",
        "Noise on digits, and the one-step denoiser at every level",
        "The denoiser was trained at σ = 0.5 alone; these are digits of the test set, at the other levels too.",
        r"z = x + \sigma \epsilon",
        (noisy_digits,),
        "denoise_mnist",
        {"b1_noising.png": "B1: the noise.", "b3_denoised.png": "B3: noisy and denoised."},
    ),
    Experiment(
        "B2",
        "Training the one-step denoiser",
        "Five epochs of MNIST, not repeated here: this is the training of the shipped weights, see weights.md.",
        r"L = \mathbb{E}\; || D_\theta(x + \sigma \epsilon) - x ||^2",
        (denoiser_loss, UNet),
        "train_denoiser",
        {},
        trained={
            "loss_denoiser.png": "The loss of every step.",
            "b2_epoch1.png": "Test digits after the first epoch.",
            "b2_epoch5.png": "Test digits after the fifth.",
            "b2_pure_noise.png": "Trained on noise alone, --pure-noise: the best answer to any is the mean digit.",
        },
    ),
    Experiment(
        "B4",
        "A time-conditioned DDPM",
        "Twenty epochs, conditioned on the timestep alone. The loss and the digits after epoch 5 are from the "
        "training, the others were drawn now.",
        r"L = \mathbb{E}\; || \epsilon - \epsilon_\theta(x_t, t) ||^2",
        (ddpm_loss, TimeUNet),
        "sample_mnist --weights ddpm_time --steps 100",
        {"digits.png": "Drawn from noise, now."},
        fast="--steps 25",
        trained={"b4_epoch05.png": "After epoch 5 of the training.", "loss_ddpm_time.png": "The loss of every step."},
    ),
    Experiment(
        "B5",
        "A class-conditioned DDPM",
        "The same, told which digit to draw, with guidance γ = 5. The loss and the digits after epoch 5 are from the "
        "training, the others were drawn now.",
        GUIDED,
        (sample_digits, ClassUNet),
        "sample_mnist --animate --steps 100",
        {"digits.png": "Drawn from noise, now.", "digits.gif": "How they came to be."},
        fast="--steps 25",
        trained={"b5_epoch05.png": "After epoch 5 of the training.", "loss_ddpm_class.png": "The loss of every step."},
        plays=(Play("scrub", "digits_steps", (0,), "How they came to be."),),
    ),
    Experiment(
        "B6",
        "Flow matching",
        "The assignment's editions since 2025 train a velocity instead of an eps, on the straight path from noise, "
        "t = 0, to a digit, t = 1; their B1 to B3 are the same. Conditioned on the time alone, as in B4.",
        r"x_t = (1 - t)\, x_0 + t\, x_1, \quad L = \mathbb{E}\; || (x_1 - x_0) - u_\theta(x_t, t) ||^2",
        (interpolate, flow_loss, TimeFlow),
        "sample_mnist --weights flow_time",
        {"digits.png": "Drawn from noise, now."},
        fast="--steps 10",
        trained={
            "b6_epoch01.png": "After epoch 1.",
            "b6_epoch05.png": "After epoch 5.",
            "b6_epoch10.png": "After epoch 10.",
            "loss_flow_time.png": "The loss of every step.",
        },
    ),
    Experiment(
        "B7",
        "A class-conditioned flow",
        "Euler steps along the velocity, with guidance γ = 5. Three figures are from the training, the "
        "first was drawn now.",
        r"x_{t'} = x_t + (t' - t)\, u, \quad u = u_u + \gamma\, (u_c - u_u)",
        (integrate, euler_step, velocity_of, ClassFlow),
        "sample_mnist --weights flow_class",
        {"digits.png": "Drawn from noise, now."},
        fast="--steps 10",
        trained={
            "b7_epoch01.png": "After 30,000 digits of the training.",
            "b7_epoch04.png": "After 120,000, the last.",
            "loss_flow_class.png": "The loss of every step.",
        },
    ),
    Experiment(
        "B8",
        "A velocity and an eps",
        "The velocity to one digit, and the model's: the mean over all digits that x_t may come from. It is the same "
        "estimate as an eps, so that every algorithm above runs on a flow.",
        r"\hat x_1 = x_t + (1 - t)\, u, \quad \hat\epsilon = x_t - t\, u, \quad "
        r"\bar\alpha = \frac{t^2}{t^2 + (1 - t)^2}",
        (as_estimate, as_velocity),
        "flow_velocity",
        {"velocity.png": "At four t: x_t, the velocity to this digit, the model's, and the error."},
    ),
    Experiment(
        "C1",
        "Several prompts at once",
        "Several estimates, weighted, each relative to the empty prompt's. With one prompt this is guidance.",
        r"\epsilon = \epsilon_u + \gamma \sum_i w_i\, (\epsilon_i - \epsilon_u)",
        (compose,),
        f"generate {TWENTY} --num-images 4 --prompt 'a photo of a lion' --prompt 'a photo of a sunflower' "
        "--prompt 'a photo of a lion AND a photo of a sunflower' "
        "--prompt 'a photo of a lion AND a photo of a sunflower :-0.5'",
        {"composed.png": "Each alone, both, and the first without the second; the same noise in each column."},
        fast=QUICK,
    ),
    Experiment(
        "C2",
        "Restoration",
        "DDNM: a model that was never trained for it gives back colours, details and what a hole hid. At every step, "
        "the estimate moves to the nearest image that fits what is seen.",
        r"\hat x_0 \leftarrow \hat x_0 - A^{+} (A \hat x_0 - y)",
        (restore,),
        f"restore {ROCKET} --prompt 'a photo of a rocket ship' --upscaler none --steps 50",
        {
            "restored.png": "A row for each task: what is seen, what is done without a model, the result, and the "
            "original, from which tiny-if has learned.",
        },
        fast="--steps 10",
    ),
]
