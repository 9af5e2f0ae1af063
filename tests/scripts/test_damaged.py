"""Files that are damaged or hostile: each is read rightly, or refused in one line; see `tests.forked`."""

import io
import json
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save

from ddpm.tools.files import load_tensors
from tests.conftest import DATA
from tests.forked import run_all
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_campaign import bases, check, models  # noqa: F401
from tests.scripts.test_generate import cascade  # noqa: F401

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**18
UNET = "unet/diffusion_pytorch_model.safetensors"
T5 = "text_encoder/model.safetensors"


def of_header(header: dict | bytes, length: int | None = None, content: bytes = b"\0" * 64) -> bytes:
    """A safetensors file of this header, or one that says it is of another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


FLOAT = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NO_SAFETENSORS = {
    "a header of 2^40 bytes": of_header(b"{}", 2**40),
    "a header of 2^63 bytes": of_header(b"{}", 2**63),
    "overlapping offsets": of_header({"a": FLOAT, "b": {**FLOAT, "data_offsets": [8, 24]}}),
    "offsets beyond the end": of_header({"a": {**FLOAT, "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "a header of another kind": of_header(b"[1, 2]"),
    "a deep header": of_header(DEEP.encode()),
    "a pickle": pickle.dumps({"a": 1}),
    "text": b"weights",
}


def damaged_digits(whole: Path, folder: Path) -> list[tuple[Path, str]]:
    """Weights of a ClassUNet that is none, and a part of what is said of each."""
    content, (tensors, metadata) = whole.read_bytes(), load_tensors(whole)
    found = {f"cut at {n}": (content[:n], "is no whole safetensors file") for n in (0, 1, 7, 8, 9, 100, 5000, -1)}
    found |= {name: (content, "is no whole safetensors file") for name, content in NO_SAFETENSORS.items()}
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for name, change, told in [
        ("NaN", lambda tensor: tensor * torch.nan, "not finite"),
        ("int64", lambda tensor: tensor.long(), "1 of another type"),
        ("float8", lambda tensor: tensor.to(torch.float8_e4m3fn), "1 of another type"),
        ("complex", lambda tensor: tensor.to(torch.complex64), "1 of another type"),
        ("shape", lambda tensor: tensor[None], "1 of another shape"),
    ]:
        described = {key: json.dumps(value) for key, value in metadata.items()}
        found[name] = (save({**tensors, first: change(tensors[first]).contiguous()}, described), told)
    for name, change, told in [
        ("model", {"model": []}, "holds no MNIST model"),
        ("no config", {"config": None}, "does not fit"),
        *((f"T {T}", {"config": {"width": 4, "num_timesteps": T}}, "needs from 2 to 1000000") for T in ("x", HUGE, 1)),
        *((f"width {w}", {"config": {"width": w, "num_timesteps": 300}}, "") for w in ("x", 0, -1, 10**6, HUGE, None)),
    ]:
        described = {key: json.dumps(value) for key, value in {**metadata, **change}.items()}
        found[name] = (save(tensors, described), told)
    found["deep metadata"] = (save(tensors, {"model": DEEP}), "its metadata is not JSON")
    return write_all(found, folder, ".safetensors")


def write_all(found: dict[str, tuple[bytes, str]], folder: Path, suffix: str) -> list[tuple[Path, str]]:
    folder.mkdir()
    paths = [folder / f"{name}{suffix}" for name in found]
    for path, (content, _) in zip(paths, found.values(), strict=True):
        path.write_bytes(content)
    return [(path, told) for path, (_, told) in zip(paths, found.values(), strict=True)]


def check_refused(cases: list[tuple[list, str]], folder: Path):
    """Run commands, of which each must be refused with a line that holds its part; "" for any line."""
    runs = run_all([command for command, _ in cases], folder)
    check(runs, [part or "error: " for _, part in cases])


def test_weights_of_digits(models, tmp_path):  # noqa: F811
    files = damaged_digits(models / "ClassUNet.safetensors", tmp_path / "files")
    check_refused(
        [(["sample_mnist", "--weights", path, "--steps", 1], told) for path, told in files], tmp_path / "runs"
    )


def changed(models: Path, folder: Path, changes: dict[str, tuple[str, bytes | dict | None, str]]):  # noqa: F811
    """Copies of stage 1, one for each change: a file's new content, or fields of its JSON; None leaves it out."""
    cases = []
    for name, (file, content, told) in changes.items():
        copy = shutil.copytree(models / "stage_1", folder / name)
        if isinstance(content, dict):
            fields = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
            content = json.dumps({**fields, **content}).encode()
        if content is None:
            shutil.rmtree(copy / file)
        else:
            (copy / file).write_bytes(content)
        cases.append((copy, told))
    return cases


def damaged_unets(stage_1: Path) -> dict[str, tuple[str, bytes | dict | None, str]]:
    content, tensors = (stage_1 / UNET).read_bytes(), load_file(stage_1 / UNET)
    changes = {f"cut at {n}": (UNET, content[:n], "is no whole safetensors file") for n in (0, 8, 1000, -1)}
    changes |= {name: (UNET, content, "is no whole safetensors file") for name, content in NO_SAFETENSORS.items()}
    odd = {"int64": torch.int64, "float8": torch.float8_e4m3fn, "complex": torch.complex64}
    for name, dtype in odd.items():
        cast = save({key: tensor.to(dtype) for key, tensor in tensors.items()})
        changes[name] = (UNET, cast, "not floating-point numbers")
    nan = save({name: tensor * torch.nan for name, tensor in tensors.items()})
    changes["NaN"] = (UNET, nan, "not finite any more")
    config, scheduler = "unet/config.json", "scheduler/scheduler_config.json"
    for name, fields in [
        ("wide", {"block_out_channels": [10**9, 10**9, 10**9]}),
        ("layers", {"layers_per_block": 10**5}),
        ("time", {"time_embedding_dim": HUGE}),
        ("size", {"sample_size": 10**400}),
        ("text", {"encoder_hid_dim": 10**9}),
        ("groups", {"norm_num_groups": 10**400}),
        ("eps", {"norm_eps": 10**400}),
        ("levels", {"block_out_channels": [32] * 10**5}),
    ]:
        changes[name] = (config, fields, "")
    changes |= {
        "within the bounds": (config, {"block_out_channels": [10**6] * 3, "norm_num_groups": 1}, ""),
        "deep": (config, DEEP.encode(), "is not JSON"),
        "zeros": (config, b"\0" * 100, "is not JSON"),
        "list": (config, b"[]", "is not the config of a model"),
        "empty": (config, b"", "is not JSON"),
        "no unet": ("unet", None, "has no config.json"),
        "deep scheduler": (scheduler, DEEP.encode(), "is not JSON"),
        "maximum": (scheduler, {"sample_max_value": 10**400}, "sample_max_value"),
        "steps": ("sampling_config.json", {"num_steps": 10**400}, "num_steps"),
        "guidance": ("sampling_config.json", b'{"guidance_scale": NaN}', "guidance_scale"),
        "setting": ("sampling_config.json", {"guidance_scale": [1]}, "guidance_scale"),
    }
    return changes


def test_a_folder_with_a_damaged_unet(models, tmp_path):  # noqa: F811
    cases = changed(models, tmp_path, damaged_unets(models / "stage_1"))
    options = ["--prompt", "a dog", "--stride", 400, "--dtype", "float32"]
    check_refused([(["generate", "--model", folder, *options], told) for folder, told in cases], tmp_path / "runs")


def test_an_index_that_names_nothing_or_what_is_outside(models, tmp_path):  # noqa: F811
    shutil.copy(models / "stage_1" / UNET, tmp_path / "outside.safetensors")
    index = f"{UNET}.index.json"
    names = {"up": "../../outside.safetensors", "absolute": str(tmp_path / "outside.safetensors")}
    changes = {
        **{name: (index, {"weight_map": {"x": file}}, "not in its folder") for name, file in names.items()},
        "folder": (index, {"weight_map": {"x": ".."}}, "lacks .., which"),
        "empty": (index, {"weight_map": {}}, "names no files"),
        "number": (index, {"weight_map": {"conv_in.weight": 5}}, "does not say which files"),
        "deep": (index, DEEP.encode(), "does not say which files"),
        "gone": (index, {"weight_map": {"conv_in.weight": "gone.safetensors"}}, "lacks gone.safetensors"),
    }
    cases = changed(models, tmp_path, changes)
    for folder, _ in cases:
        (folder / UNET).unlink()
    options = ["--prompt", "a dog", "--stride", 400, "--dtype", "float32"]
    check_refused([(["generate", "--model", folder, *options], told) for folder, told in cases], tmp_path / "runs")


def test_a_folder_with_a_damaged_text_encoder(models, tmp_path):  # noqa: F811
    content, config = (models / "stage_1" / T5).read_bytes(), "text_encoder/config.json"
    changes = {f"cut at {n}": (T5, content[:n], "is no T5 encoder") for n in (0, 8, 1000, -1)}
    for name, fields, told in [
        ("no layers", {"num_layers": 0}, "has 0 layers"),
        ("minus one", {"num_layers": -1}, "has -1 layers"),
        ("many layers", {"num_layers": 10**7}, "layers"),
        ("buckets", {"relative_attention_num_buckets": 10**9}, "GB of memory"),
        ("wide", {"d_model": 10**9}, ""),
        ("heads", {"num_heads": "x"}, "is no T5 encoder"),
        ("few tokens", {"vocab_size": 10}, "the tokenizer has"),
    ]:
        changes[name] = (config, fields, told)
    changes |= {
        "deep": (config, DEEP.encode(), ""),
        "list": (config, b"[]", ""),
        "no encoder": ("text_encoder", None, ""),
        "no tokenizer": ("tokenizer", None, "has neither spiece.model nor tokenizer.json"),
        "tokens": ("tokenizer/spiece.model", b"tokens", "is no sentencepiece model"),
        "no tokens": ("tokenizer/spiece.model", b"", "is no sentencepiece model"),
    }
    cases = changed(models, tmp_path, changes)
    options = ["--prompt", "a dog", "--dtype", "float32"]
    check_refused([(["embed_prompts", "--model", folder, *options], told) for folder, told in cases], tmp_path / "runs")


class Payload:
    """Whose unpickling would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/pixel-diffusion-was-here"),))


def damaged_embeds(folder: Path) -> list[tuple[Path, str]]:
    embeds = {prompt: torch.randn(77, 24) for prompt in ("a dog", "")}
    found = {}
    for name, content in {
        "payload": {"a dog": Payload()},
        "list": [1, 2],
        "tensor": embeds["a dog"],
        "numbers": {0: embeds["a dog"]},
        "pipeline": {"prompt_embeds": embeds["a dog"][None], "negative_prompt_embeds": embeds[""][None]},
        "text": {"a dog": "embedding"},
        "int": {name: tensor.int() for name, tensor in embeds.items()},
        "bool": {name: tensor > 0 for name, tensor in embeds.items()},
        "complex": {name: tensor.to(torch.complex64) for name, tensor in embeds.items()},
        "76 rows": {name: tensor[:76] for name, tensor in embeds.items()},
        "three": {name: tensor.expand(3, 77, 24) for name, tensor in embeds.items()},
        "NaN": {name: tensor * torch.nan for name, tensor in embeds.items()},
        "nothing": {},
    }.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found[name] = (buffer.getvalue(), "")
    found["cut"] = (found["76 rows"][0][:1000], "")
    paths = write_all(found, folder, ".pth")
    numpy.savez(folder / "objects.npz", **{"a dog": numpy.array([Payload()], dtype=object)})
    (folder / "no.npz").write_bytes(b"PK")
    return [*paths, (folder / "objects.npz", ""), (folder / "no.npz", ""), (folder, "no embeddings file")]


def test_embeddings(models, tmp_path):  # noqa: F811
    base = bases(models)["generate"]
    cases = [([*base, "--embeds", path], told) for path, told in damaged_embeds(tmp_path / "files")]
    check_refused([(["generate", *command], told) for command, told in cases], tmp_path / "runs")
    assert not Path("/tmp/pixel-diffusion-was-here").exists()


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    chunks = [chunk(b"IHDR", size + b"\x08\2\0\0\0"), chunk(b"IDAT", b""), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_images(models, tmp_path):  # noqa: F811
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    whole = buffer.getvalue()
    found = {f"cut at {n}": (whole[:n], "is no image") for n in (0, 8, 30, 1000)}
    found |= {
        "bomb": (png(60_000, 60_000), "is no image"),
        "wide": (png(2**31 - 1, 1), "is no image"),
        "empty": (png(0, 0), "is no image"),
        "html": (b"<html>", "is no image"),
        "zip": (b"PK\3\4", "is no image"),
        "GIF": (b"GIF89a\xff\xff\xff\xff", "is no image"),
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n", "is no image"),
    }
    cases = [
        (["forward_process", "--image", path], told) for path, told in write_all(found, tmp_path / "files", ".png")
    ]
    inpaint = ["inpaint", *bases(models)["inpaint"], "--mask"]
    cases += [([*inpaint, path], told) for path, told in write_all(found, tmp_path / "masks", ".png")]
    check_refused(cases, tmp_path / "runs")


def test_prompts_and_packages(models, tmp_path):  # noqa: F811
    with (tmp_path / "endless.txt").open("wb") as file:
        file.truncate(2**40)  # which takes no room
    found = {
        "zeros": (b"a dog\0", "holds zeros"),
        "UTF-16 without its mark": ("a dog\n".encode("utf-16-le"), "holds zeros"),
        "latin": ("café".encode("latin-1"), "is not utf-8 text"),
        "half": (b"\xff\xfea", "is not utf-16 text"),
        "nothing": (b"\n \n", "there is nothing to embed"),
    }
    paths = [*write_all(found, tmp_path / "files", ".txt"), (tmp_path / "endless.txt", "too much for text")]
    paths += [("/dev/zero", "no file of prompts"), (tmp_path, "no file of prompts")]
    cases = [(["embed_prompts", "--model", models / "stage_1", "--prompts", path], told) for path, told in paths]
    for name, text in {"deep": DEEP, "list": "[]", "icons": '{"prefix": "x", "icons": 5}', "none": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "icons.json").write_text(text)
        cases.append((["prepare_emoji", tmp_path / name], "is no package of icons"))
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(tmp_path / "deep", "other")
    cases.append((["prepare_emoji", tmp_path / "other.tgz"], "is no package of icons"))
    check_refused(cases, tmp_path / "runs")


def test_reports_of_before(models, tmp_path):  # noqa: F811
    (tmp_path / "report.json").write_text(DEEP)
    command = ["evaluate/guidance", *bases(models)["evaluate/guidance"], "--out", tmp_path]
    check_refused([(command, "report.json is not JSON")], tmp_path / "runs")


def test_labels_of_digits_that_are_none(tmp_path, models):  # noqa: F811
    shutil.copytree(DATA / "MNIST", tmp_path / "MNIST")
    for name in ("train", "t10k"):
        path = tmp_path / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\x0a")
    cases = [(["train_ddpm", *bases(models)["train_ddpm"], "--data", tmp_path], "it has a label 10")]
    cases.append((["train_denoiser", "--data", tmp_path / "nowhere"], "MNIST is not in"))
    check_refused(cases, tmp_path / "runs")
    assert not (tmp_path / "nowhere").exists()
