"""Shared by the tests: the committed digits, and running a script as its user would, but in this process."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: add --slow"))


@torch.no_grad()
def settled(model: torch.nn.Module) -> torch.nn.Module:
    """An untrained model whose BatchNorms know their inputs, so that what it is told reaches what it says."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    x = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    name = type(model).__name__
    conditioning = [torch.arange(20) * (0.05 if "Flow" in name else 15), torch.eye(10).repeat(2, 1)]
    model.train()(x, *conditioning[: {"UNet": 0, "TimeUNet": 1, "TimeFlow": 1, "ClassUNet": 2, "ClassFlow": 2}[name]])
    return model.eval()


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script("name", "--option", value, …) -> (exit status, stdout, stderr)."""

    def run(name: str, *arguments) -> tuple[int, str, str]:
        path = ROOT / "scripts" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def refused(run_script):
    """Run a script that must refuse: exit status 2 and one clear line on stderr, which is returned."""

    def run(name: str, *arguments) -> str:
        status, _, err = run_script(name, *arguments)
        assert status == 2, err
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if re.match(r"\S+\.py: error: ", line)]
        assert len(errors) == 1, err
        return errors[0]

    return run
