"""Embeddings and prompts in the files that people have."""

import numpy
import pytest
import torch

from ifmodel.text import load_embeds, read_prompts

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


def test_an_npz_is_refused(tmp_path):
    numpy.savez(tmp_path / "embeds.npz", dog=DOG.numpy())
    with pytest.raises(ValueError, match="no file of prompt embeddings"):
        load_embeds(tmp_path / "embeds.npz")


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
