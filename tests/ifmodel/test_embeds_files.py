"""Embeddings and prompts in the files that people have."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from ifmodel import weights
from ifmodel.cascade import Cascade
from ifmodel.embeds import load_embeds, read_prompts

DOG, NULL = torch.randn(77, 24), torch.zeros(77, 24)


def test_prompts_are_found_in_any_case_and_with_blanks(tmp_path):
    torch.save({"A photo of a dog ": DOG[None], "": NULL[None]}, tmp_path / "course.pth")
    found = load_embeds(tmp_path / "course.pth")
    assert torch.equal(found["a photo of a dog"], DOG)


def test_a_file_that_was_saved_on_a_gpu_is_read(tmp_path, monkeypatch):
    torch.save({"a dog": DOG}, tmp_path / "gpu.pth")
    real, asked = torch.load, {}
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.update(options) or real(*args, **options))
    load_embeds(tmp_path / "gpu.pth")
    assert asked["map_location"] == "cpu"
    assert asked["weights_only"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([DOG, NULL], "holds a list"),
        (DOG, "holds a Tensor"),
        ({0: DOG}, "0 is a Tensor"),
        ({"a dog": "b"}, "'a dog' is a str"),
        ({"prompt_embeds": DOG[None], "negative_prompt_embeds": NULL[None]}, "names no prompts"),
        ({"a dog": DOG[None].repeat(2, 1, 1)}, "batches"),
        ({"a dog": DOG * torch.nan}, "'a dog' are not finite"),
        ({"a dog": torch.ones(77, 24, dtype=torch.int64)}, "floating-point"),
        ({"a dog": torch.ones(76, 24)}, r"\[77, D\]"),
    ],
)
def test_anything_else_is_refused_in_a_line_that_says_the_layout(tmp_path, content, told):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=told) as error:
        load_embeds(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


def test_an_npz_is_read_but_nothing_pickled_in_it(tmp_path):
    numpy.savez(tmp_path / "embeds.npz", **{"A photo of a dog": DOG.numpy()[None], "null": NULL.numpy()})
    assert torch.equal(load_embeds(tmp_path / "embeds.npz")["a photo of a dog"], DOG)
    numpy.savez(tmp_path / "objects.npz", dog=numpy.array([Path("here")], dtype=object))
    with pytest.raises(ValueError, match="no file of prompt embeddings"):
        load_embeds(tmp_path / "objects.npz")


def test_float8_is_read_and_its_nan_refused(tmp_path):
    save_file({"a dog": DOG.to(torch.float8_e4m3fn)}, tmp_path / "8.safetensors")
    assert load_embeds(tmp_path / "8.safetensors")["a dog"].float().sub(DOG).abs().max() < 0.3
    save_file({"a dog": (DOG * torch.nan).to(torch.float8_e4m3fn)}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="'a dog' are not finite"):
        load_embeds(tmp_path / "nan.safetensors")


def test_embeddings_are_refused_before_any_download(refused, tmp_path, monkeypatch):
    def local(source, *arguments, fetch=weights.fetch):
        return fetch(source, *arguments) if source in weights.SHIPPED else pytest.fail("something was downloaded")

    monkeypatch.setattr(weights, "fetch", local)
    torch.save([DOG], tmp_path / "list.pth")
    for script in ("generate", "sample"):
        options = ("--model", "nobody/nothing", "--embeds", tmp_path / "list.pth", "--out", tmp_path / "out.png")
        assert "holds a list, not a dictionary {prompt" in refused(script, *options)
    with pytest.raises(ValueError, match="holds a list"):
        Cascade("nobody/nothing", embeds=tmp_path / "list.pth")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_files_are_read_as_they_are_meant(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a rocket ship  \r\n\n  雪山村庄\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ["a rocket ship", "雪山村庄"]


@pytest.mark.parametrize(
    ("content", "told"), [(b"a caf\xe9", "utf-8 text, at byte 5"), ("a".encode("utf-32-le"), "zeros")]
)
def test_other_prompt_files_are_refused_by_name(tmp_path, content, told):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        read_prompts(tmp_path / "nowhere.txt")
