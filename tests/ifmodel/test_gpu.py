"""On a GPU tiny-if draws what it draws on the CPU, in every way in which memory may be short."""

import gc

import pytest
import torch

from ifmodel import Cascade, cascade, load_unet, t5
from ifmodel.dreambooth import Recipe, teach
from ifmodel.lora import ATTENTION
from ifmodel.t5 import embed_each
from tests.ifmodel.test_lora import diffusers_keys, layers_of, save_updates, updates_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
FEW = {"seeds": [1, 2], "num_steps": 3, "upscaler_steps": 2, "progress": False}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", tmp_path / "cache")


def drawn(device=DEVICE, **options) -> torch.Tensor:
    return Cascade("tiny-if", device=device, **options).draw("a photo of a dog", **FEW)


def short(monkeypatch, free: float):
    """A GPU that has so many bytes free."""
    for module in (cascade, t5):
        monkeypatch.setattr(module, "free_memory", lambda device: free)


def test_the_images_are_those_of_the_cpu():
    torch.testing.assert_close(drawn(), drawn("cpu"), atol=0.05, rtol=0)  # convolutions are in TF32


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"compiled": True}], ids=str)
def test_other_dtypes_and_compiled_unets_draw_nearly_the_same(options):
    assert (drawn(**options) - drawn()).abs().mean() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("free", [0, 15e6, 1e12])
def test_what_is_read_layer_by_layer_gives_the_same_images(monkeypatch, tmp_path, dtype, free):
    """With nothing, a part and all of the UNets and of T5 on the GPU; LoRAs of both are merged."""
    unet = load_unet("tiny-if/I")
    path = save_updates(tmp_path / "lora.safetensors", updates_of(layers_of(unet, ATTENTION)), diffusers_keys)
    options = {"dtype": dtype, "lora": path}
    expected = drawn(**options)
    short(monkeypatch, free)
    assert torch.equal(drawn(low_memory=True, **options), expected)


def test_a_stage_leaves_the_gpu_before_the_next_one_comes(monkeypatch):
    """Where both do not fit, the most that is taken is that of one of them and its images."""
    drawn()  # what CUDA and cuDNN keep for themselves
    peaks = []
    for free in (1e12, 0):
        short(monkeypatch, free)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        drawn()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    weights = sum(parameter.nbytes for parameter in load_unet("tiny-if/I").parameters())
    assert peaks[1] < peaks[0] - 0.9 * weights


def test_a_thing_is_taught_there(tmp_path):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert teach(images, Recipe("a photo of a zwx dog", steps=2, batch_size=2, rank=2), tmp_path, device=DEVICE)
