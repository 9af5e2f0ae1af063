"""The page of all experiments: what is on it, what is made again, and what happens when something fails."""

import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ifmodel.t5 import embed_each
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setitem(embed_each.__kwdefaults__, "cache", tmp_path_factory.mktemp("cache"))


class Page(HTMLParser):
    """The page's images, links and unclosed tags."""

    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.open = [], [], []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        elif tag == "a":
            self.links.append(attributes["href"])
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_figures_sources_and_commands(run_script, tmp_path):
    status, printed, err = run_script("reproduce", "--fast", "--only", "a1,A6,B2,B3", "--out", tmp_path)
    assert status == 0, err
    assert "4 of 4 experiments" in printed
    page = Page(tmp_path / "index.html")
    assert page.open == ["html"] or page.open == []
    assert "A5-A6/samples.png" in page.images and "B2/loss_denoiser.png" in page.images
    for link in [*page.images, *page.links]:
        assert "://" not in link  # no network
        assert link.startswith("#") or (tmp_path / link).resolve().is_file(), link
    assert "def add_noise(" in page.text and "def guided(" in page.text
    assert "python scripts/forward_process.py --out" in page.text
    assert "currentColor" in page.text and "fill: #ffffff" not in page.text  # equations on a dark ground
    assert "With tiny-if, which is shipped. Seed 20040808. Took " in page.text  # A6 has its own
    assert "Seed 20040805. Took " in page.text
    assert f"--data {ROOT}" not in page.text  # a command that others can type
    assert "prefers-color-scheme: dark" in page.text and "viewport" in page.text


def test_what_was_made_is_left_and_what_changed_is_made_again(run_script, tmp_path):
    options = ["--only", "A1", "a2", "--out", tmp_path]  # as A1,A2
    run_script("reproduce", *options)
    figures = [tmp_path / "A1" / "forward.png", tmp_path / "A2" / "blurred.png"]
    times = [figure.stat().st_mtime_ns for figure in figures]
    figures[1].unlink()
    _, printed, _ = run_script("reproduce", *options)
    assert printed.count("made before") == 1
    assert figures[0].stat().st_mtime_ns == times[0] and figures[1].is_file()
    _, printed, _ = run_script("reproduce", *options, "--seed", 1)
    assert "made before" not in printed
    assert "--seed 1" in json.loads((tmp_path / "A1" / "made.json").read_text())["command"]
    _, printed, _ = run_script("reproduce", *options, "--seed", 1, "--again")
    assert "made before" not in printed


@pytest.mark.parametrize("damage", ["figure", "seconds", "command", "figures", "list"])
def test_what_is_not_as_it_was_left_is_made_again(run_script, tmp_path, damage):
    """A figure that was overwritten, or a note of other types."""
    options, note, figure = (
        ["--only", "A1", "--out", tmp_path],
        tmp_path / "A1" / "made.json",
        tmp_path / "A1/forward.png",
    )
    run_script("reproduce", *options)
    before = figure.read_bytes()
    if damage == "figure":
        figure.write_bytes((tmp_path / "A1" / "forward_0_0.png").read_bytes())
    else:
        note.write_text(json.dumps([5] if damage == "list" else {**json.loads(note.read_text()), damage: [5]}))
    status, printed, err = run_script("reproduce", *options)
    assert status == 0, err
    assert "made before" not in printed and len(figure.read_bytes()) == len(before)


def test_what_only_leaves_out_stays_on_the_page(run_script, tmp_path):
    run_script("reproduce", "--only", "A1", "--out", tmp_path)
    run_script("reproduce", "--only", "A2", "--out", tmp_path)
    page = Page(tmp_path / "index.html")
    assert page.images == ["A1/forward.png", "A1/forward_0_0.png", "A2/blurred.png"]
    assert "Not made yet: A0, A3" in page.text


def test_no_older_figure_passes_for_that_of_a_failed_run(run_script, tmp_path):
    """digits.png and b3_denoised.png are also names of figures in the repository."""
    run_script("reproduce", "--fast", "--only", "B3", "--data", ROOT / "tests" / "data", "--out", tmp_path)
    assert (tmp_path / "B1-B3" / "b3_denoised.png").is_file()
    status, _, _ = run_script("reproduce", "--fast", "--only", "B3", "--data", tmp_path, "--out", tmp_path)
    assert status == 2
    page = Page(tmp_path / "index.html")
    assert page.images == [] and "This failed" in page.text
    status, _, _ = run_script("reproduce", "--only", "B4", "--device", "nowhere", "--out", tmp_path)
    assert status == 2
    assert Page(tmp_path / "index.html").images == ["B4/b4_epoch05.png", "B4/loss_ddpm_time.png"]


def test_a_failure_does_not_stop_the_others(run_script, tmp_path):
    options = ["--only", "A2,A3", "--model", tmp_path / "nowhere", "--out", tmp_path]
    status, printed, err = run_script("reproduce", *options)
    assert status == 2
    assert "1 of 2 experiments" in printed
    assert "reproduce.py: error: A3 failed" in err and "Traceback" not in err
    page = Page(tmp_path / "index.html")
    assert "A2/blurred.png" in page.images and "This failed: exit status 2" in page.text


def test_refused(refused, tmp_path):
    assert "there is no experiment 'A12'" in refused("reproduce", "--only", "A1,A12", "A2", "--out", tmp_path)
    assert "there is no experiment ','" in refused("reproduce", "--only", ",", "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write in" in refused("reproduce", "--out", tmp_path / "file")


def test_figures_and_files_that_the_documents_name_are_committed():
    """A missing image shows as nothing at all."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no clone")
    files = {Path(line) for line in tracked.stdout.splitlines()}
    there = files | {folder for file in files for folder in file.parents}
    for document in ("README.md", "weights.md", "scripts/README.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())
        local = [link for link in links if "://" not in link]
        named = [os.path.relpath((ROOT / document).parent / link, ROOT) for link in local]
        missing = [link for link in named if Path(link) not in there]
        assert links and not missing


def test_every_experiment_of_the_assignment_is_there():
    from shared.experiments import EXPERIMENTS

    keys = [key for experiment in EXPERIMENTS for key in experiment.keys]
    assert sorted(keys) == sorted([f"A{k}" for k in range(12)] + [f"B{k}" for k in range(1, 9)] + ["C1", "C2"])
    for experiment in EXPERIMENTS:
        assert (ROOT / "scripts" / f"{experiment.script}.py").is_file()


def test_digits_are_drawn_where_the_cascade_takes_float16(run_script, tmp_path):
    """They have no float16; what is asked for the others does not stop them."""
    status, printed, err = run_script("reproduce", "--only", "B6", "--fast", "--dtype", "float16", "--out", tmp_path)
    assert status == 0 and "1 of 1 experiments" in printed, err
    assert "float16" not in json.loads((tmp_path / "B6" / "made.json").read_text())["command"]
