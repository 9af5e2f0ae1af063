"""Which device and dtype a machine is given."""

import pytest
import torch

from ddpm.tools.devices import pick_device, pick_dtype


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than GPUs here: give it --nproc-per-node 2"):
        pick_device("auto")


# What torch says of a GPU, and of a processor: the dtype to draw with, and to train with
CAPABILITIES = {
    "T4": ((7, 5), torch.float16, torch.float32),
    "V100": ((7, 0), torch.float16, torch.float32),
    "A100": ((8, 0), torch.bfloat16, torch.bfloat16),
    "H100": ((9, 0), torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_auto_is_the_fastest_dtype_that_a_gpu_has(monkeypatch, name):
    """Emulated bfloat16, which torch reports of every GPU, does not count; the second GPU is asked for itself."""
    capability, draws, trains = CAPABILITIES[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device.index else (5, 0))
    device = torch.device("cuda:1")
    assert pick_dtype("auto", device, float16=True) == draws
    assert pick_dtype("auto", device) == trains
    assert pick_dtype("float32", device, float16=True) == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_other_hardware_is_never_float16(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_dtype("auto", torch.device("cpu"), float16=True) == (torch.bfloat16 if native else torch.float32)
    assert pick_dtype("auto", torch.device("mps"), float16=True) == torch.float32


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match="device 'tpu' is not on this machine: choose from auto, "):
        pick_device("tpu")
    with pytest.raises(ValueError, match="one of auto, float32, bfloat16, float16, not 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
    with pytest.raises(ValueError, match="float16 is for GPUs"):
        pick_dtype("float16", torch.device("cpu"))
