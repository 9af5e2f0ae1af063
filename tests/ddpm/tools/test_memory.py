"""What CPUs compute faster: GELU of channels-last images, and memory that stays with the process."""

import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm.tools import memory
from ddpm.tools.cpu import GELU
from ddpm.tools.memory import glibc, keep_freed

needs_glibc = pytest.mark.skipif(glibc() is None, reason="no glibc")


@pytest.mark.parametrize("shape", [(2, 5), (3, 8, 6, 4), (1, 1, 1, 1), (2, 4, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gelu_is_torchs_in_value_layout_and_gradient(shape, layout):
    layout = layout if len(shape) == 4 else torch.contiguous_format
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, dtype=torch.float32)).to(memory_format=layout).requires_grad_()
    other = x.detach().clone().requires_grad_()
    ours, theirs = GELU()(x), nn.GELU()(other)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous(memory_format=layout)
    weights = torch.randn(shape)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)


def faults() -> int:
    """Pages that Linux hands out, zeroed, while some layers are computed that were computed before."""
    for turn in range(4):
        if turn == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = torch.ones(2, 32, 512, 288)  # above 32 MB, which glibc gives back at once
        for _ in range(3):
            h = torch.cat([x, x * 2], dim=1)
            x = torch.relu(h[:, 32:] + 1) + x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_containers_limit_counts(kind, tmp_path, monkeypatch):
    """Docker's and Kaggle's, below what the machine has."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    unlimited = memory.free_memory(torch.device("cpu"))
    limit, used, stat, prefix = memory.CGROUP_FILES[kind]
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    (tmp_path / stat).write_text(f"cache 5\n{prefix}inactive_file 30000\n{prefix}active_file 20000\n")
    assert memory.free_memory(torch.device("cpu")) == 350_000
    with pytest.raises(ValueError, match=r"all of it needs about 0\.0 GB of memory, and 0\.0 GB are free"):
        memory.check_memory(400_000, "all of it")
    (tmp_path / limit).write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > min(unlimited / 2, 10**9)


@needs_glibc
def test_layers_use_memory_again_within_and_not_after():
    with keep_freed():
        within = faults()
    after, decorated = faults(), keep_freed()(faults)()
    assert after > 2**26 // resource.getpagesize()
    assert max(within, decorated) < after / 3


@needs_glibc
def test_tensors_of_some_megabytes_stay_with_the_process_afterwards():
    """glibc learns to keep these, until it is told a threshold; here in a process that has learned nothing yet."""
    code = """
import resource, torch
from ddpm.tools.memory import keep_freed
with keep_freed():
    pass
x = torch.ones(2**20)
for turn in range(40):
    if turn == 32:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert faults < 8 * 2**22 // resource.getpagesize() / 3  # of 4 MB, eight times


@needs_glibc
@pytest.mark.parametrize("error", [None, KeyError])
def test_kept_memory_is_given_back(error):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    with pytest.raises(error) if error else nullcontext(), keep_freed():
        several = [torch.ones(2**20) for _ in range(100)]  # 400 MB
        last = torch.ones(10)  # above them
        del several
        within = resident() - before
        if error:
            raise error
    assert within > 3e8
    assert resident() - before < 1e8
    assert last.sum() == 10
