"""The Hub for real: a whole random cascade over HTTP on loopback, with all that goes wrong on the way."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from tests.conftest import ROOT
from tests.hub import Hub
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.scripts.test_generate import PROMPT, cascade  # noqa: F401

TOKEN = "hf_a_secret_that_must_never_be_printed"
UNET, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def hub(cascade, model_folder, tmp_path_factory):  # noqa: F811
    """Two repositories laid out like DeepFloyd's: gated, both precisions, T5 in shards, .bin copies beside them."""
    folder, repositories = tmp_path_factory.mktemp("hub"), {}
    for stage, name in (("stage_1", "IF-I-S-v1.0"), ("stage_2", "IF-II-S-v1.0")):
        shutil.copytree(cascade[0] / stage, folder / name)
        save_file(
            {tensor_name: tensor.half() for tensor_name, tensor in load_file(folder / name / "unet" / UNET).items()},
            folder / name / "unet" / FP16,
        )
        encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder")
        (folder / name / "text_encoder" / "model.safetensors").unlink()
        encoder.save_pretrained(folder / name / "text_encoder", max_shard_size="30KB")
        encoder.half().save_pretrained(folder / name / "text_encoder", max_shard_size="15KB", variant="fp16")
        for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
            (folder / name / part / f"{stem}.bin").write_bytes(b"pickled" * 10_000)
        shutil.rmtree(folder / name / "tokenizer")
        shutil.copytree(model_folder / "tokenizer", folder / name / "tokenizer")  # with spiece.model, as theirs
        repositories[f"DeepFloyd/{name}"] = folder / name
    # huggingface_hub writes 10 MiB at a time: only a file of more than that can break off in the middle
    shutil.copytree(folder / "IF-I-S-v1.0", folder / "padded")
    weights = load_file(folder / "padded" / "unet" / UNET)
    save_file(weights, folder / "padded" / "unet" / UNET, metadata={"padding": "." * 25_000_000})
    repositories["DeepFloyd/padded"] = folder / "padded"
    (folder / "empty").mkdir()
    repositories["DeepFloyd/empty"] = folder / "empty"
    with Hub(repositories, gated=("DeepFloyd/IF-I-S-v1.0", "DeepFloyd/IF-II-S-v1.0"), token=TOKEN) as hub:
        yield hub


@pytest.fixture
def generate(hub, tmp_path):
    """Run scripts/generate.py in a process of its own, against the hub; returns (status, all it printed)."""
    hub.requests.clear()

    def run(*arguments, token: str | None = TOKEN, home="home", **environment) -> tuple[int, str]:
        command = [sys.executable, ROOT / "scripts" / "generate.py", "--prompt", PROMPT, "--dtype", "float32"]
        environment |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / home), "HOME": str(tmp_path / home)}
        if token:
            environment["HF_TOKEN"] = token
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        arguments = [*command, "--steps", 2, "--upscaler-steps", 2, "--out", tmp_path / "out.png", *arguments]
        done = subprocess.run(
            list(map(str, arguments)), env={**inherited, **environment}, capture_output=True, text=True, timeout=300
        )
        printed = done.stdout + done.stderr
        assert TOKEN not in printed
        return done.returncode, printed

    return run


def error_line(status: int, printed: str) -> str:
    assert status == 2, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("generate.py: error: ")]
    return line


def downloaded(hub) -> list[str]:
    """The weights that were downloaded, as owner/name/folder/file, in order."""
    paths = [path.removeprefix("/cdn/") for method, path, _ in hub.requests if method == "GET" and "/cdn/" in path]
    return [path for path in paths if path.endswith(".safetensors")]


def weights_of(hub, encoder: str, unet: str) -> list[str]:
    """T5's shards of stage 1, those whose names begin with `encoder`, and both stages' UNets, sorted."""
    first, second = CASCADE[1::2]
    shards = [path.name for path in (hub.repositories[first] / "text_encoder").glob(f"{encoder}-*.safetensors")]
    assert len(shards) > 1
    return sorted(
        [f"{first}/text_encoder/{name}" for name in shards] + [f"{name}/unet/{unet}" for name in (first, second)]
    )


CASCADE = ("--model", "DeepFloyd/IF-I-S-v1.0", "--upscaler", "DeepFloyd/IF-II-S-v1.0")


def test_a_cascade_is_downloaded_once_and_runs_offline(hub, generate, tmp_path):
    status, printed = generate(*CASCADE)
    assert status == 0, printed
    # one precision, safetensors only, and T5 from the first stage alone
    assert sorted(downloaded(hub)) == weights_of(hub, "model", UNET)
    assert not any(path.endswith(".bin") or "fp16" in path for _, path, _ in hub.requests)
    assert any(path.endswith("/text_encoder/model.safetensors.index.json") for _, path, _ in hub.requests)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)
        first = image.tobytes()

    hub.requests.clear()
    (tmp_path / "out.png").unlink()
    status, printed = generate(*CASCADE, "--revision", "main", HF_HUB_OFFLINE="1")
    assert status == 0, printed
    assert hub.requests == []
    with Image.open(tmp_path / "out.png") as image:
        assert image.tobytes() == first


def test_in_bfloat16_the_fp16_files_are_downloaded_alone(hub, generate, tmp_path):
    status, printed = generate(*CASCADE, "--dtype", "bfloat16")
    assert status == 0, printed
    assert sorted(downloaded(hub)) == weights_of(hub, "model.fp16", FP16)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)


def test_a_gated_repository_names_the_licence_and_the_login(generate):
    """Without a token the Hub answers 401, with that of someone who has not accepted the licence 403."""
    for token, said in ((None, "is gated"), ("hf_of_somebody_else", "is gated"), ("hf_expired", "may have expired")):
        line = error_line(*generate("--model", "DeepFloyd/IF-I-S-v1.0", token=token))
        assert said in line and "hf_expired" not in line
        assert "accept its licence at https://huggingface.co/DeepFloyd/IF-I-S-v1.0" in line
        assert "hf auth login" in line and "HF_TOKEN" in line
        assert "somebody_else" not in line


def test_repositories_that_are_not_there_or_no_models(generate):
    line = error_line(*generate("--model", "DeepFloyd/IF-IX"))
    assert "DeepFloyd/IF-IX is neither a folder nor a repository of the Hub that you can see" in line
    line = error_line(*generate("--model", "DeepFloyd/empty"))
    assert "has no config.json" in line
    line = error_line(*generate("--model", "not/a/repository"))
    assert "not/a/repository" in line


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, generate):
    hub.cut.add(UNET)
    status, printed = generate("--model", "DeepFloyd/padded")
    if status != 0:  # older versions of huggingface_hub leave the second try to the user
        error_line(status, printed)
        status, printed = generate("--model", "DeepFloyd/padded")
    assert status == 0, printed
    first, second = [range for method, path, range in hub.requests if method == "GET" and path.endswith(UNET)]
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 10 * 2**20


def test_a_file_damaged_in_the_cache_is_named(generate, tmp_path):
    status, printed = generate("--model", "DeepFloyd/IF-I-S-v1.0")
    assert status == 0, printed
    (weights,) = (file for file in (tmp_path / "home").rglob(UNET) if "snapshots" in str(file))
    whole = weights.read_bytes()
    weights.resolve().write_bytes(whole[: len(whole) // 2])
    line = error_line(*generate("--model", "DeepFloyd/IF-I-S-v1.0", HF_HUB_OFFLINE="1"))
    assert f"{UNET} is damaged: its sha256 is not the Hub's" in line


def test_a_file_with_one_other_byte_is_named(generate, tmp_path):
    """Of the right length, and a safetensors file as before: only its sha256 tells."""
    status, printed = generate("--model", "DeepFloyd/IF-I-S-v1.0")
    assert status == 0, printed
    (weights,) = (file for file in (tmp_path / "home").rglob(UNET) if "snapshots" in str(file))
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.resolve().write_bytes(content)
    line = error_line(*generate("--model", "DeepFloyd/IF-I-S-v1.0", HF_HUB_OFFLINE="1"))
    assert f"{UNET} is damaged: its sha256 is not the Hub's; delete {weights.resolve()}" in line


def test_offline_without_a_cache_is_one_line(generate):
    line = error_line(*generate("--model", "DeepFloyd/IF-I-S-v1.0", HF_HUB_OFFLINE="1"))
    assert "DeepFloyd/IF-I-S-v1.0 is no folder, and could not be downloaded" in line and "shipped" not in line
    line = error_line(*generate("--model", "tinyif", HF_HUB_OFFLINE="1"))
    assert "tinyif is no folder" in line and "(shipped are tiny-if, tiny-if/I, tiny-if/II)" in line
