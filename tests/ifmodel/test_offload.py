"""With low memory, weights are read layer by layer from their files: the results are the same, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from ifmodel import Cascade, UNet, UNetConfig, cascade, load_lora, load_unet
from ifmodel.config import published_config
from ifmodel.embeds import load_embeds
from ifmodel.lora_files import read_lora
from ifmodel.offload import offload
from ifmodel.t5 import embed_each, embed_prompts
from ifmodel.weights import SHIPPED
from tests.ifmodel.test_lora import diffusers_keys, layers_of, peft_keys, save_updates, updates_of
from tests.ifmodel.test_t5 import model_folder  # noqa: F401

PROMPTS = ["a photo of a dog", ""]


@pytest.fixture(autouse=True)
def nothing_is_copied_to_the_disk(monkeypatch):
    monkeypatch.setattr(accelerate.big_modeling, "offload_state_dict", lambda *_: pytest.fail("weights were copied"))


@pytest.fixture
def shards(model_folder, tmp_path):  # noqa: F811
    """A T5 in several files, with float16 ones beside them."""
    folder = tmp_path / "if"
    shutil.copytree(model_folder / "tokenizer", folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="12KB")
    encoder.half().save_pretrained(folder / "text_encoder", max_shard_size="6KB", variant="fp16")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 4
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_by_layers_is_t5(shards, dtype):
    there = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    found = embed_prompts(shards, PROMPTS, dtype=dtype, cache=None, low_memory=True)
    expected = embed_prompts(shards, PROMPTS, dtype=dtype, cache=None)
    for prompt in PROMPTS:
        assert found[prompt].dtype == dtype and torch.equal(found[prompt], expected[prompt])
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == there


@pytest.mark.parametrize("stage", ["I", "II"])
@pytest.mark.parametrize("part", [0.0, 0.5, 2.0])
def test_a_unet_by_layers_is_the_unet(stage, part):
    """None, half and all of its weights stay in memory; the file's are in float16, and are computed with in float32."""
    weights = sum(parameter.nbytes for parameter in load_unet(f"tiny-if/{stage}").parameters())
    low, plain = load_unet(f"tiny-if/{stage}", room=int(part * weights)), load_unet(f"tiny-if/{stage}")
    held = sum(parameter.nbytes for parameter in low.parameters() if not parameter.is_meta)
    assert 0.2 * weights < held < 0.5 * weights if part == 0.5 else held == (weights if part else 0)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, plain.config.in_channels, 32, 32, generator=generator)
    embeds = torch.randn(2, 77, plain.config.encoder_hid_dim, generator=generator)
    noise_level = None if stage == "I" else 50
    with torch.no_grad():
        outputs = [unet(x_t, 500, unet.encode_text(embeds), noise_level) for unet in (low, plain, low)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert sum(parameter.nbytes for parameter in low.parameters() if not parameter.is_meta) == held


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_unet_by_layers_takes_loras(part, tmp_path):
    """Merged whenever a layer is read, with the results of those merged once; of add_k_proj before the first step."""
    weights = sum(parameter.nbytes for parameter in load_unet("tiny-if/I").parameters())
    low, plain = load_unet("tiny-if/I", room=int(part * weights)), load_unet("tiny-if/I")
    updates = updates_of(layers_of(plain))
    path = save_updates(tmp_path / "lora.safetensors", updates, diffusers_keys)
    generator = torch.Generator().manual_seed(0)
    x_t, embeds = torch.randn(1, 3, 32, 32, generator=generator), torch.randn(1, 77, 128, generator=generator)
    before = plain(x_t, 500, plain.encode_text(embeds))
    for unet in (low, plain):
        for scale in (0.5, 0.25):
            load_lora(unet, path, scale)
    assert any(low.get_submodule(name).weight.is_meta for name in updates)
    with torch.no_grad():
        outputs = [unet(x_t, 500, unet.encode_text(embeds)) for unet in (low, plain, low)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], before, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_t5_by_layers_takes_loras(shards, dtype, tmp_path):
    encoder = T5EncoderModel.from_pretrained(shards / "text_encoder", torch_dtype=torch.float32)
    layers = {f"encoder.block.0.layer.{k}": 0 for k in ("0.SelfAttention.q", "1.DenseReluDense.wo")}
    updates = updates_of({name: encoder.get_submodule(name).weight.shape for name in layers})
    path = save_updates(tmp_path / "lora.safetensors", updates, lambda name: peft_keys(name, "text_encoder."))
    options = {"dtype": dtype, "cache": None, "loras": [(read_lora(path), 1.0)]}
    found = embed_prompts(shards, PROMPTS, low_memory=True, **options)
    expected = embed_prompts(shards, PROMPTS, **options)
    plain = embed_prompts(shards, PROMPTS, dtype=dtype, cache=None)
    for prompt in PROMPTS:
        assert torch.equal(found[prompt], expected[prompt]) and not torch.allclose(found[prompt], plain[prompt])


def test_the_images_are_the_same(monkeypatch):
    """Where the UNets do not fit, and where they do, when nothing is read layer by layer."""
    options = {"seeds": [1, 2], "num_steps": 2, "upscaler_steps": 1, "progress": False}
    monkeypatch.setattr("ifmodel.weights.can_pack", lambda dtype: False)
    expected = Cascade("tiny-if", size=(16, 16)).draw("a photo of a dog", **options)
    for free, on_meta in ((1e12, False), (10_000_000, True)):
        monkeypatch.setattr(cascade, "free_memory", lambda device, free=free: free)
        low = Cascade("tiny-if", size=(16, 16), low_memory=True)
        assert torch.equal(low.draw("a photo of a dog", **options), expected)
        assert {parameter.is_meta for parameter in low._unets[2].parameters()} == {on_meta}


def test_scripts_with_low_memory_write_the_same(run_script, monkeypatch, tmp_path):
    """T5, stage 1 and stage 2 are read layer by layer, for the same pixels and embeddings."""
    models = []

    def watched(model, *rest):
        models.append(type(model).__name__)
        return offload(model, *rest)

    for module in ("t5", "weights"):
        monkeypatch.setattr(f"ifmodel.{module}.offload", watched)
    monkeypatch.setattr("ifmodel.weights.can_pack", lambda dtype: False)
    monkeypatch.setattr(cascade, "free_memory", lambda device: 10_000_000)
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", None)
    few = ["--prompt", PROMPTS[0], "--dtype", "float32", "--device", "cpu"]
    small, pixels = ["--size", 16, 16, "--steps", 2, "--upscaler-steps", 1], []
    for name, options in (("plain", []), ("low", ["--low-memory"])):
        assert not models
        status, _, err = run_script("generate", *few, *small, *options, "--out", tmp_path / f"{name}.png")
        assert status == 0, err
        pixels.append(Image.open(tmp_path / f"{name}.png").tobytes())
        out = tmp_path / f"{name}.safetensors"
        status, _, err = run_script("embed_prompts", "--model", "tiny-if/I", *few, *options, "--out", out)
        assert status == 0, err
    assert models == ["T5EncoderModel", "UNet", "UNet", "T5EncoderModel"] and pixels[0] == pixels[1]
    found, expected = (load_embeds(tmp_path / f"{name}.safetensors") for name in ("low", "plain"))
    assert found.keys() == expected.keys() and all(torch.equal(found[prompt], expected[prompt]) for prompt in found)


def test_weights_of_another_model_are_refused(shards):
    for path in (shards / "text_encoder").glob("model-*"):
        tensors = load_file(path)
        if "encoder.final_layer_norm.weight" in tensors:
            save_file(tensors | {"encoder.final_layer_norm.weight": torch.ones(7)}, path, {"format": "pt"})
            break
    with pytest.raises(ValueError, match=r"encoder.final_layer_norm.weight in .* is \[7\] instead of \[24\]"):
        embed_prompts(shards, PROMPTS, cache=None, low_memory=True)
    save_file({"other": torch.ones(7)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*: they are of another model, or not whole"):
        embed_prompts(shards, PROMPTS, cache=None, low_memory=True)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        embed_prompts(shards, PROMPTS, cache=None, low_memory=True)
    (shards / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no T5 encoder"):
        embed_prompts(shards, PROMPTS, cache=None, low_memory=True)
    files = [SHIPPED["tiny-if/II"] / "unet" / "diffusion_pytorch_model.safetensors"]
    with pytest.raises(ValueError, match="it is of another model"), torch.device("meta"):
        offload(torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(3, 4, 3)}), files, "cpu")


def test_without_accelerate_one_line_says_so(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("ifmodel.offload.find_spec", lambda name: None)
    told = "low memory needs accelerate: pip install 'pixel-diffusion[low-memory]'"
    assert told in refused("generate", "--prompt", "a hat", "--low-memory", "--out", tmp_path / "out.png")
    options = ["--model", "tiny-if/I", "--prompt", "a hat", "--low-memory", "--out", tmp_path / "out.safetensors"]
    assert told in refused("embed_prompts", *options)
    with pytest.raises(ValueError, match="low memory needs accelerate"):
        embed_prompts("tiny-if/I", ["a hat"], cache=None, low_memory=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="leave --compile or --low-memory"):
        Cascade("tiny-if", low_memory=True, compiled=True)


# What a process that draws or embeds takes beside the pages of the mapped files, at most, looked at every 5 ms
WATCHED = """
import sys, threading, time
import torch
from ifmodel import Cascade
from ifmodel.embeds import load_embeds
from ifmodel.t5 import embed_each, embed_prompts

def anonymous():
    status = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

def measured():  # since it was called before
    global peak, started
    print(peak, time.process_time() - started)
    peak, started = 0, time.process_time()

peak, folder = 0, sys.argv[1]
threading.Thread(target=watch, daemon=True).start()
started = time.process_time()
{do}
measured()
"""


@pytest.fixture
def large(tmp_path):
    """A folder that is gone after the test, whatever becomes of it."""
    yield tmp_path / "large"
    shutil.rmtree(tmp_path / "large", ignore_errors=True)


def save_random(folder, stem: str, shapes: dict[str, torch.Size], dtype: torch.dtype, shards: int):
    """Random weights in the layout of the Hub, one file in memory at a time."""
    folder.mkdir(parents=True)
    block = (0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)
    names, index = list(shapes), {}
    for number in range(shards):
        path = folder / (f"{stem}-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else f"{stem}.safetensors")
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        sizes = {name: shapes[name].numel() for name in mine}
        save_file(
            {name: block.repeat(-(-n // len(block)))[:n].view(shapes[name]).clone() for name, n in sizes.items()}, path
        )
        index |= dict.fromkeys(mine, path.name)
    if shards > 1:
        stem, variant = stem.split(".")
        (folder / f"{stem}.safetensors.index.{variant}.json").write_text(json.dumps({"weight_map": index}))


def save_t5_xxl(folder, dtype: str):
    """A T5-XXL of random weights, "bf16" or "fp16", in five shards, and a tokenizer beside it."""
    shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
    config = T5Config(**shape, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    save_random(folder / "text_encoder", f"model.{dtype}", shapes, stored, shards=5)
    config.save_pretrained(folder / "text_encoder")
    shutil.copytree(SHIPPED["tiny-if/I"] / "tokenizer", folder / "tokenizer")


def watched(do: str, folder) -> list[tuple[int, float]]:
    """What a process of its own took at most, in bytes, and how many seconds it computed, until each measured()."""
    command = [sys.executable, "-c", WATCHED.replace("{do}", do), str(folder)]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(int(line.split()[0]), float(line.split()[1])) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_t5_xxl_by_layers_in_little_memory(large):
    """Its 9.5 GB in bfloat16, in shards: computed with in float32, since few CPUs have bfloat16."""
    save_t5_xxl(large, "bf16")
    size = sum(path.stat().st_size for path in large.rglob("*.safetensors"))
    ((peak, seconds),) = watched('embed_prompts(folder, ["a photo of a dog"], cache=None, low_memory=True)', large)
    print(f"{size / 1e9:.2f} GB on disk, {peak / 1e9:.2f} GB beside the file, {seconds:.0f} s of computing, one prompt")
    assert size > 9.5e9
    assert peak < 1.5e9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_if_i_xl_and_if_ii_l_in_little_host_memory(large):
    """T5-XXL and both stages in float16, from their files to a small image: all else stays below 2 GB at every moment.

    On the CPU, where activations count, too; a GPU holds these, and the weights.
    """
    save_t5_xxl(large / "I", "fp16")
    for stage, geometry in (("I", "IF-I-XL"), ("II", "IF-II-L")):
        config = published_config(geometry)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in UNet(UNetConfig.from_dict(config)).state_dict().items()}
        save_random(large / stage / "unet", "diffusion_pytorch_model.fp16", shapes, torch.float16, shards=6)
        (large / stage / "unet" / "config.json").write_text(json.dumps(config))
    do = """
cascade = Cascade(f"{folder}/I", upscaler=f"{folder}/II", dtype=torch.float16, size=(16, 16), low_memory=True)
for _ in cascade.prompts.cache(["a photo of a dog", ""]):
    pass
measured()
cascade.draw("a photo of a dog", seeds=[1], num_steps=1, upscaler_steps=1)
"""
    rows = watched(do, large)
    size = sum(path.stat().st_size for path in large.rglob("*-of-*.safetensors"))
    print(f"{size / 1e9:.2f} GB on disk")
    for name, (peak, seconds) in zip(("T5, two prompts", "both stages, a step each"), rows, strict=True):
        print(f"{name}: {peak / 1e9:.2f} GB beside the files, {seconds:.0f} s of computing")
    assert size > 20e9 and max(peak for peak, _ in rows) < 2e9
