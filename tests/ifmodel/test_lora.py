"""LoRA against diffusers with PEFT: every layout of the files, merged, learned and saved, on random weights."""

import copy
import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from ddpm.tools.cpu import can_pack, pack_convolutions
from ifmodel import Cascade, UNet, UNetConfig, load_lora, load_unet
from ifmodel.lora import ATTENTION, RESNETS, LoRALayer, add_lora, merge_lora, place_lora, save_lora
from ifmodel.lora_files import LoRA, Update, read_lora
from ifmodel.stage import generate
from ifmodel.t5 import Tokenizer, embed_each, embed_prompts
from ifmodel.weights import SHIPPED
from tests.hub import Hub
from tests.ifmodel.test_unet import STAGE_1, STAGE_2, inputs, pair, relative_error

CONFIGS = {"stage 1": STAGE_1, "stage 2": STAGE_2}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    """The config, our UNet and diffusers', with the same weights; not to be changed."""
    return CONFIGS[request.param], *pair(CONFIGS[request.param], torch.float32)


def layers_of(unet: UNet, targets=(*ATTENTION, *RESNETS)) -> dict[str, torch.Size]:
    """The shapes of the weights that LoRAs change."""
    return {
        name.removesuffix(".weight"): weight.shape
        for name, weight in unet.state_dict().items()
        if any(f".{name}".endswith(f".{target}.weight") for target in targets)
    }


def updates_of(layers: dict[str, torch.Size], seed=0) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """down, up and alpha of every layer, of ranks 2 and 3."""
    generator, updates = torch.Generator().manual_seed(seed), {}
    for k, (name, (o, *i)) in enumerate(layers.items()):
        rank, ones = 2 + k % 2, [1] * (len(i) - 1)
        down = torch.randn(rank, *i, generator=generator) / torch.tensor(i).prod() ** 0.5
        up = 0.3 * torch.randn(o, rank, *ones, generator=generator)
        updates[name] = (down, up, [1.0, 2.0, 6.0][k % 3])
    return updates


def diffusers_keys(name: str, prefix="unet.") -> list[str]:
    return [f"{prefix}{name}.lora.down.weight", f"{prefix}{name}.lora.up.weight", f"{prefix}{name}.alpha"]


def peft_keys(name: str, prefix="unet.", adapter="") -> list[str]:
    return [f"{prefix}{name}.lora_A{adapter}.weight", f"{prefix}{name}.lora_B{adapter}.weight", f"{prefix}{name}.alpha"]


def legacy_keys(name: str, prefix="") -> list[str]:
    """Those of attention processors; ResNets had none."""
    if ".attentions." not in name:
        return diffusers_keys(name, prefix)
    attention, _, layer = name.removesuffix(".0").rpartition(".")
    named = f"{prefix}{attention}.processor.{layer}_lora"
    return [f"{named}.down.weight", f"{named}.up.weight", f"{named}.alpha"]


def kohya_keys(name: str) -> list[str]:
    flat = f"lora_unet_{name.replace('.', '_')}"
    return [f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"]


LAYOUTS = {
    "diffusers": diffusers_keys,
    "diffusers, the UNet alone": lambda name: diffusers_keys(name, prefix=""),
    "PEFT in diffusers": peft_keys,
    "PEFT": lambda name: peft_keys(name, prefix="base_model.model."),
    "PEFT with the adapter's name": lambda name: peft_keys(name, adapter=".default"),
    "legacy": legacy_keys,
    "legacy with a prefix": lambda name: legacy_keys(name, "unet."),
    "kohya": kohya_keys,
}
LAYOUTS["mixed"] = lambda name: list(LAYOUTS.values())[sum(map(ord, name)) % 8](name)


def save_updates(path: Path, updates: dict, layout, alphas=True, metadata=None) -> Path:
    tensors = {}
    for name, (down, up, alpha) in updates.items():
        keys = layout(name)
        tensors |= {keys[0]: down, keys[1]: up}
        if alphas is True or (alphas == "some" and alpha == 6.0):
            tensors[keys[2]] = torch.tensor(alpha)
    save_file(tensors, path, metadata=metadata)
    return path


def with_peft(theirs, updates: dict, alphas=True):
    """Diffusers' UNet with the updates beside its layers, put there by PEFT."""
    theirs = copy.deepcopy(theirs)
    tensors, given = {}, {}
    for name, (down, up, alpha) in updates.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        scaled = alphas is True or (alphas == "some" and alpha == 6.0)
        given[f"unet.{name}.alpha"] = alpha if scaled else len(down)
    theirs.load_lora_adapter(tensors, prefix="unet", network_alphas=given)
    return theirs


@torch.no_grad()
def outputs(unet, config: dict, dtype=torch.float64) -> torch.Tensor:
    """In float64, since how float32 rounds differs by 1e-5 from CPU to CPU."""
    unet = unet if dtype == torch.float32 else copy.deepcopy(unet).to(dtype)
    x_t, t, prompt_embeds, noise_level = inputs(config, dtype)
    if isinstance(unet, UNet):
        return unet(x_t, t, unet.encode_text(prompt_embeds), noise_level)
    return unet(x_t, t, prompt_embeds, class_labels=noise_level).sample


@pytest.fixture(scope="module")
def expected(models):
    """The outputs with the updates by PEFT; with their alphas, with none, with some of them."""
    config, ours, theirs = models
    updates = updates_of(layers_of(ours))
    return {alphas: outputs(with_peft(theirs, updates, alphas), config) for alphas in (True, False, "some")}


@pytest.mark.parametrize(
    ("layout", "alphas"), [*((name, alphas) for name in LAYOUTS for alphas in (True, False)), ("mixed", "some")]
)
def test_every_layout_gives_the_outputs_of_peft(models, expected, tmp_path, layout, alphas):
    config, ours, _ = models
    updates, merged = updates_of(layers_of(ours)), copy.deepcopy(ours)
    load_lora(merged, save_updates(tmp_path / "lora.safetensors", updates, LAYOUTS[layout], alphas))
    assert relative_error(outputs(merged, config), expected[alphas]) < 1e-5


@pytest.mark.parametrize("alphas", [True, False])
def test_in_float32_every_layout_gives_the_outputs_of_peft(models, tmp_path, alphas):
    """The merged weights are the same for all layouts, bit for bit, in a UNet that is as it was."""
    config, ours, theirs = models
    updates = {
        name: (down, up / 4, alpha) for name, (down, up, alpha) in updates_of(layers_of(ours)).items()
    }  # weaker: outputs are then as large as without, and so is what float32 rounds off
    merged = [copy.deepcopy(ours) for _ in LAYOUTS]
    for unet, layout in zip(merged, LAYOUTS.values(), strict=True):
        load_lora(unet, save_updates(tmp_path / "lora.safetensors", updates, layout, alphas))
        assert list(map(type, unet.modules())) == list(map(type, ours.modules()))
        for weight, other in zip(unet.state_dict().values(), merged[0].state_dict().values(), strict=True):
            assert torch.equal(weight, other)
    expected = outputs(with_peft(theirs, updates, alphas), config, torch.float32)
    assert relative_error(outputs(merged[0], config, torch.float32), expected) < 1e-5
    assert relative_error(outputs(ours, config, torch.float32), expected) > 0.01


def test_the_updates_and_their_alphas_make_a_difference(models, expected):
    config, ours, _ = models
    for one, other in itertools.combinations([outputs(ours, config), *expected.values()], 2):
        assert relative_error(one, other) > 0.05


@pytest.mark.parametrize("layout", ["diffusers", "PEFT in diffusers", "legacy with a prefix"])
def test_diffusers_reads_the_same_in_the_same_file(models, tmp_path, layout):
    """Its legacy layout is for to_q, to_k, to_v and to_out alone."""
    config, ours, theirs = models
    path = tmp_path / "lora.safetensors"
    save_updates(path, updates_of(layers_of(ours, ATTENTION[:4])), LAYOUTS[layout], alphas=False)
    merged, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    load_lora(merged, path)
    load_with_diffusers(theirs, path)
    assert relative_error(outputs(merged, config), outputs(theirs, config)) < 1e-5


def load_with_diffusers(theirs, path: Path):
    state_dict, alphas, metadata = IFPipeline.lora_state_dict(path, return_lora_metadata=True)
    IFPipeline.load_lora_into_unet(state_dict, network_alphas=alphas, unet=theirs, metadata=metadata)


@pytest.mark.parametrize("converted", [True, False], ids=["lora.down", "lora_A"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 1, "mid_block.*to_q": 7}}])
def test_what_peft_and_diffusers_save_is_loaded(models, tmp_path, options, converted):
    config, ours, theirs = models
    theirs, merged = copy.deepcopy(theirs), copy.deepcopy(ours)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1"], **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    layers = get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    IFPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(layers) if converted else layers,
        unet_lora_adapter_metadata={key: list(v) if isinstance(v, set) else v for key, v in metadata.items()},
    )
    load_lora(merged, tmp_path)
    assert relative_error(outputs(merged, config), outputs(theirs, config)) < 1e-5


def test_pefts_own_folder_has_its_alpha_beside_it(models, tmp_path):
    config, ours, theirs = models
    updates, merged = updates_of(layers_of(ours, ATTENTION)), copy.deepcopy(ours)
    save_updates(tmp_path / "adapter_model.safetensors", updates, LAYOUTS["PEFT"], alphas=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 5, "base_model_name_or_path": "their/if"}))
    load_lora(merged, tmp_path)
    expected = with_peft(theirs, {name: (down, up, 5.0) for name, (down, up, _) in updates.items()})
    assert relative_error(outputs(merged, config), outputs(expected, config)) < 1e-5
    assert read_lora(tmp_path).base == "their/if"


@torch.no_grad()
def learned(unet: UNet, rank=4, targets=(*ATTENTION, *RESNETS)) -> dict[str, LoRALayer]:
    """A LoRA beside the layers, as if it had been trained."""
    torch.manual_seed(2)
    layers = add_lora(unet, rank, targets)
    for layer in layers.values():
        layer.up.weight.normal_(std=0.3)
    return layers


def test_what_is_saved_here_is_loaded_here_and_by_diffusers(models, tmp_path):
    config, ours, theirs = models
    trained, merged, theirs = (copy.deepcopy(unet) for unet in (ours, ours, theirs))
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", learned(trained), base="some/model")
    load_lora(merged, tmp_path)
    load_with_diffusers(theirs, tmp_path)
    expected = outputs(trained, config)
    assert relative_error(outputs(ours, config), expected) > 0.1
    assert relative_error(outputs(merged, config), expected) < 1e-5
    assert relative_error(outputs(theirs, config), expected) < 1e-5
    assert read_lora(tmp_path).base == "some/model"


def test_an_untrained_lora_changes_nothing_and_learns_alone(models):
    config, ours, _ = models
    unet = copy.deepcopy(ours).requires_grad_(True)
    layers = add_lora(unet, 4)
    assert torch.equal(outputs(unet, config), outputs(ours, config))
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{piece}.weight" for name in layers for piece in ("down", "up")}
    assert {name.rpartition("attentions.0.")[2] for name in layers} >= set(ATTENTION)


def test_scales_add_up(models, expected, tmp_path):
    config, ours, theirs = models
    updates, merged = updates_of(layers_of(ours)), copy.deepcopy(ours)
    path = save_updates(tmp_path / "lora.safetensors", updates, diffusers_keys)
    load_lora(merged, path, scale=0.75)
    weaker = {name: (down, up, 0.75 * alpha) for name, (down, up, alpha) in updates.items()}
    assert relative_error(outputs(merged, config), outputs(with_peft(theirs, weaker), config)) < 1e-5
    load_lora(merged, path, scale=0.25)
    assert relative_error(outputs(merged, config), expected[True]) < 1e-5


def test_a_lora_on_add_k_proj_reaches_the_keys_that_are_computed_once(tmp_path):
    unet = load_unet("tiny-if/I")
    embeds = torch.randn(2, 77, unet.config.encoder_hid_dim, generator=torch.Generator().manual_seed(0))
    run = {"seeds": [1], "num_steps": 2}
    plain = generate(unet, embeds[:1], embeds[1:], **run)
    updates = updates_of(layers_of(unet, ["add_k_proj"]))
    load_lora(unet, save_updates(tmp_path / "lora.safetensors", updates, diffusers_keys))
    assert not torch.allclose(generate(unet, embeds[:1], embeds[1:], **run), plain, atol=1e-3)


def test_the_file_of_the_weights_is_left_alone(tmp_path):
    """Weights are those of the memory-mapped file; a LoRA must not be written there."""
    before = load_unet("tiny-if/I").state_dict()
    unet = load_unet("tiny-if/I", dtype=torch.float16)
    load_lora(unet, save_updates(tmp_path / "lora.safetensors", updates_of(layers_of(unet)), diffusers_keys))
    assert unet.mid_block.attentions[0].to_q.weight.dtype == torch.float16
    for name, weight in load_unet("tiny-if/I").state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.skipif(not can_pack(), reason="packing is for x86 CPUs")
def test_packed_convolutions_take_a_lora_before_the_first_image(models, tmp_path):
    config, ours, theirs = models
    updates, packed = updates_of(layers_of(ours)), copy.deepcopy(ours)
    path = save_updates(tmp_path / "lora.safetensors", updates, diffusers_keys)
    pack_convolutions(packed)
    load_lora(packed, path)
    expected = outputs(with_peft(theirs, updates), config, torch.float32)
    assert relative_error(outputs(packed, config, torch.float32), expected) < 1e-5
    with pytest.raises(ValueError, match="this UNet has drawn already"):
        load_lora(packed, path)


# T5


T5_LAYERS = [f"encoder.block.{k}.layer.0.SelfAttention.{name}" for k in range(2) for name in "qkvo"]


@pytest.mark.parametrize("layout", ["text_encoder.", "text_encoder.base_model.model.", "base_model.model.", "lora_te_"])
def test_t5_is_changed_as_by_peft_and_kept_apart_from_t5_without(tmp_path, layout):
    folder, prompts = SHIPPED["tiny-if/I"], ["a photo of a dog", ""]
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    updates = updates_of({name: encoder.get_submodule(name).weight.shape for name in T5_LAYERS})
    keys = kohya_keys if layout == "lora_te_" else lambda name: peft_keys(name, layout)
    path = save_updates(tmp_path / "lora.safetensors", updates, keys)
    if layout == "lora_te_":
        save_file({key.replace("lora_unet_", layout): tensor for key, tensor in load_file(path).items()}, path)
    lora = read_lora(path)
    assert not lora.unet
    assert lora.text_encoder.keys() == {name.replace(".", "_") if layout == "lora_te_" else name for name in T5_LAYERS}

    cache = {"cache": tmp_path / "cache"}
    plain = embed_prompts("tiny-if/I", prompts, **cache)
    found = embed_prompts("tiny-if/I", prompts, loras=[(lora, 0.5)], **cache)
    again = embed_prompts("tiny-if/I", prompts, loras=[(lora, 0.5)], **cache)
    weaker = embed_prompts("tiny-if/I", prompts, loras=[(lora, 0.25)], **cache)
    patterns = {"rank_pattern": {name: len(down) for name, (down, _, _) in updates.items()}}
    patterns["alpha_pattern"] = {name: alpha / 2 for name, (_, _, alpha) in updates.items()}
    adapter = {
        f"{name}.lora_{piece}.weight": pieces[k]
        for name, pieces in updates.items()
        for k, piece in ((0, "A"), (1, "B"))
    }
    encoder.load_adapter(peft_config=LoraConfig(target_modules=T5_LAYERS, **patterns), adapter_state_dict=adapter)
    tokens, mask = Tokenizer(folder / "tokenizer")(prompts)
    with torch.no_grad():
        expected = encoder(tokens, attention_mask=mask).last_hidden_state
    for k, prompt in enumerate(prompts):
        assert relative_error(found[prompt], expected[k]) < 1e-5
        assert torch.equal(found[prompt], again[prompt])
        assert not torch.allclose(found[prompt], plain[prompt], atol=1e-2)
        assert not torch.allclose(found[prompt], weaker[prompt], atol=1e-2)
    assert torch.equal(embed_prompts("tiny-if/I", prompts, **cache)[""], plain[""])


# Both stages, and the scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LoRAs for both stages of tiny-if; the first has a part for T5 as well."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for stage in ("I", "II"):
        updates = updates_of(layers_of(load_unet(f"tiny-if/{stage}"), ATTENTION))
        found[stage] = save_updates(folder / f"{stage}.safetensors", updates, diffusers_keys)
    encoder = T5EncoderModel.from_pretrained(SHIPPED["tiny-if/I"] / "text_encoder")
    t5 = updates_of({name: encoder.get_submodule(name).weight.shape for name in T5_LAYERS}, seed=1)
    found["T5"] = save_updates(folder / "T5.safetensors", t5, lambda name: peft_keys(name, "text_encoder."))
    found["I and T5"] = folder / "both.safetensors"
    save_file(load_file(found["I"]) | load_file(found["T5"]), found["I and T5"])
    return found


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", tmp_path / "own")


def test_a_cascade_merges_each_lora_into_its_stage(files):
    few = {"seeds": [1], "num_steps": 2, "upscaler_steps": 2, "progress": False}

    def draw(*loras, **scales):
        return Cascade("tiny-if", lora=loras, **scales).draw("a photo of a dog", **few)

    plain, first, second = draw(), draw(files["I"]), draw(files["II"])
    assert not torch.allclose(first, plain, atol=0.01) and not torch.allclose(second, plain, atol=0.01)
    both = draw(files["II"], files["I"], lora_scale=[0.5, 2.0])
    assert torch.equal(draw(files["I"], files["II"], lora_scale=[2.0, 0.5]), both)
    assert not torch.equal(draw(files["I"], files["II"], lora_scale=1.0), both)
    assert not torch.allclose(draw(files["I and T5"]), first, atol=0.01)
    assert torch.equal(Cascade("tiny-if", lora=files["I"]).draw("a photo of a dog", **few), first)


def test_a_stage_with_a_lora_is_drawn_with_the_fixed_small_variance(files):
    """Of no strength, it leaves an image as it is but for the variance, which LoRAs do not train."""
    few = {"seeds": [1], "num_steps": 4, "progress": False}
    idle = Cascade("tiny-if/I", lora=files["I"], lora_scale=0.0)
    plain = Cascade("tiny-if/I")
    assert torch.equal(idle.draw("a dog", sampler="ddim", **few), plain.draw("a dog", sampler="ddim", **few))
    unet, embeds = load_unet("tiny-if/I", pack=True), embed_prompts("tiny-if/I", ["a dog", ""])
    rows = [embeds[prompt][None] for prompt in ("a dog", "")]
    scale = plain.stages[0].settings["guidance_scale"]
    fixed = generate(unet, *rows, seeds=[1], num_steps=4, guidance_scale=scale, variance="beta_tilde")
    torch.testing.assert_close(idle.draw("a dog", **few), fixed, atol=1e-4, rtol=0)
    assert not torch.allclose(plain.draw("a dog", **few), fixed, atol=1e-2)


def test_scripts_take_loras(run_script, files, tmp_path):
    few = ["--steps", 1, "--upscaler-steps", 1, "--prompt", "a photo of a dog", "--seed", 1, "--device", "cpu"]
    drawn = {}
    for name, options in {
        "plain": [],
        "both": ["--lora", files["I"], "--lora", files["II"]],
        "alike": ["--lora", files["II"], "--lora", files["I"], "--lora-scale", 1, "--lora-scale", 1],
        "weaker": ["--lora", files["I"], "--lora", files["II"], "--lora-scale", 0.1],
    }.items():
        out = tmp_path / f"{name}.png"
        status, _, err = run_script("generate", *few, "--dtype", "float32", "--out", out, *options)
        assert status == 0, err
        drawn[name] = out.read_bytes()[-2000:]  # pixels, after what is said of the making
    assert drawn["both"] == drawn["alike"] and len(set(drawn.values())) == 3


def test_a_lora_comes_from_the_hub(files, tmp_path, monkeypatch):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(files["I"].read_bytes())
    (tmp_path / "lora" / "large.ckpt").write_bytes(b"pickled")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with Hub({"someone/lora": tmp_path / "lora"}) as hub:
        local = partial(snapshot_download, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.snapshot_download", local)
        lora = read_lora("someone/lora")
        assert not any("large" in path for _, path, _ in hub.requests)
    assert lora.unet.keys() == read_lora(files["I"]).unet.keys()


# Bad input


def bad(tmp_path, tensors: dict, **metadata) -> Path:
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def test_a_lora_that_does_not_fit_is_refused_by_name_and_nothing_is_changed(models, tmp_path):
    ours, unet = models[1], copy.deepcopy(models[1])
    a, b = torch.randn(4, 96), torch.randn(96, 4)
    name = "unet.mid_block.attentions.0.to_q"
    good = {f"{name}.lora.down.weight": a, f"{name}.lora.up.weight": b}
    peft = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 7, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(32, 2, 1, 1),
    }
    xl = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    for told, tensors, metadata in (
        (r"rank 4, is of another model: .* \[96, 96\], not \[64, 96\]", {**good, f"{name}.lora.up.weight": b[:64]}, {}),
        ("for IF-I-XL of rank 2 and 4, is of another model: conv_in is", {**good, **peft}, {"base_model": "IF-I-XL"}),
        (r"Stable Diffusion or SDXL, not of IF: there is no down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
         {f"{xl}.lora.down.weight": a, f"{xl}.lora.up.weight": b}, {}),
        ("there is no lora_te2_mlp", {"lora_te2_mlp.lora_down.weight": a, "lora_te2_mlp.lora_up.weight": b}, {}),
        ("nothing for the UNet", {"text_encoder.a.lora_A.weight": a, "text_encoder.a.lora_B.weight": b}, {}),
        (r"no LoRA of the kind .* unet.conv_in.weight", {**good, "unet.conv_in.weight": a}, {}),
        (r"lora_magnitude_vector", {**good, f"{name}.lora_magnitude_vector": a}, {}),
        (r"lora_B.bias", {**good, f"{name}.lora_B.bias": a}, {}),
        (r"no up \(B\) of mid_block.attentions.0.to_q", {f"{name}.lora_A.weight": a}, {}),
        (r"no down \(A\) of mid_block.attentions.0.to_q", {f"{name}.lora_B.weight": b}, {}),
        (r"no one rank for mid_block.attentions.0.to_q: down is \[3, 96\], up \[96, 4\]",
         {**good, f"{name}.lora.down.weight": a[:3]}, {}),
        (r"two updates of mid_block.attentions.0.to_q", {**good, f"{name}.lora_A.weight": a}, {}),
        ("to_q is there twice",
         {**good, "lora_unet_mid_block_attentions_0_to_q.lora_down.weight": a,
          "lora_unet_mid_block_attentions_0_to_q.lora_up.weight": b}, {}),
        ("not finite", {**good, f"{name}.lora.down.weight": a / 0}, {}),
        ("alpha of mid_block.attentions.0.to_q that is no number", {**good, f"{name}.alpha": a}, {}),
        ("alpha of .* no number", good, {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'}),
        ("alpha of .* no number", good, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}),
        ("is not JSON", good, {"lora_adapter_metadata": "{"}),
        ("it has nothing", {}, {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told) as error:
            load_lora(unet, bad(tmp_path, tensors, **metadata))
        assert "\n" not in str(error.value)
        assert torch.equal(unet.mid_block.attentions[0].to_q.weight, ours.mid_block.attentions[0].to_q.weight)
    assert read_lora(bad(tmp_path, good)).unet.keys() == {"mid_block.attentions.0.to_q"}


def test_places_without_a_lora(models, tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"pickled")
    with pytest.raises(FileNotFoundError, match=r"neither pytorch_lora_weights.safetensors nor .* \(.bin is not read"):
        load_lora(models[1], tmp_path)
    with pytest.raises(FileNotFoundError, match="no LoRA file at"):
        load_lora(models[1], tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_lora(models[1], tmp_path / "pytorch_lora_weights.bin")


def test_a_rank_above_the_width_and_targets_that_are_none(models):
    unet = copy.deepcopy(models[1])
    before = unet.state_dict().keys()
    with pytest.raises(
        ValueError, match=r"a rank of 97 is above the width of down_blocks.\d.attentions.0.to_\w, \d\d: take"
    ):
        add_lora(unet, 97)
    with pytest.raises(ValueError, match="no layer whose name ends in to_kv"):
        add_lora(unet, 4, ["to_kv"])
    assert unet.state_dict().keys() == before


def test_a_cascade_refuses_before_anything_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setattr("ifmodel.stage.load_unet", lambda *_, **__: pytest.fail("a UNet was loaded"))
    embeds = tmp_path / "embeds.safetensors"
    save_file({"a dog": torch.zeros(77, 128)}, embeds)
    for told, options in (
        ("nothing for the UNet", {"lora": files["T5"]}),
        ("is of another model", {"model": "tiny-if/I", "lora": files["II"]}),
        ("not 2", {"lora": files["I"], "lora_scale": [1.0, 2.0]}),
        ("changes T5, and", {"lora": files["I and T5"], "embeds": embeds}),
    ):
        with pytest.raises(ValueError, match=told):
            Cascade(**options)


def test_scripts_refuse_in_one_line(refused, files, tmp_path):
    out = ["--out", tmp_path / "out.png"]
    assert "has nothing for the UNet" in refused("generate", "--lora", files["T5"], *out)
    assert "--lora-scale is of --lora" in refused("generate", "--lora-scale", 2, *out)
    assert "no LoRA file at" in refused("sample", "--lora", tmp_path / "none.safetensors", *out)
    assert not list(tmp_path.glob("out*"))


def test_a_lora_that_both_stages_could_take_is_of_the_first():
    configs = [UNetConfig.from_dict(config) for config in (STAGE_1, STAGE_2)]
    unet = UNet(configs[1])
    updates = updates_of({name: shape for name, shape in layers_of(unet).items() if "mid_block.attentions" in name})
    lora = LoRA("mid", None, {name: Update(down, up, 1.0) for name, (down, up, _) in updates.items()}, {})
    assert place_lora(lora, configs) == 1
    merge_lora(unet, lora)
