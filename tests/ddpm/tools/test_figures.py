"""Figures: where labels and images come to lie, labels in any script, and what a PNG says of its making."""

import subprocess
import sys
import time
import warnings
from itertools import pairwise

import numpy
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image

from ddpm.tools.figures import labelled_grid, save_cells, save_curves, save_grid
from ddpm.tools.labels import characters, readable, text_size, warn_of_missing, wrapped

LABELS = {"row_labels": ["a light bulb", "a pear"], "column_labels": ["seed 1", "seed 2", "seed 3"], "title": "two"}


@pytest.fixture
def rows():
    """Batches of images, a grey and a coloured one."""
    x = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [x[0], x[1, :, :1]]


def test_a_notebook_shows_what_is_saved(rows, tmp_path):
    shown = labelled_grid(rows, **LABELS)
    save_grid(tmp_path / "grid.png", rows, **LABELS)
    with Image.open(tmp_path / "grid.png") as saved:
        assert (numpy.asarray(saved.convert("RGB")) == numpy.asarray(shown)).all()
    assert shown._repr_png_() and shown.mode == "RGB"
    large = numpy.asarray(labelled_grid([rows[0][:1]]))  # 96 pixels for 8, and a margin
    first = (rows[0][0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (large[17 : 17 + 96 : 12, 17 : 17 + 96 : 12] == first).all()


def test_the_making_of_a_figure(rows, tmp_path, monkeypatch):
    """A script's command line and seed; in a notebook, none but what is given."""
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.setattr(sys, "argv", ["scripts/some.py", "--prompt", "a dog"])
    save_grid(tmp_path / "grid.png", rows, seed=3, **LABELS)
    with Image.open(tmp_path / "grid.png") as figure:
        assert figure.text["Command"] == "python scripts/some.py --prompt 'a dog'" and figure.text["Seed"] == "3"
        assert figure.text["Description"].splitlines() == ["two", *LABELS["row_labels"], *LABELS["column_labels"]]
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    save_cells(str(tmp_path / "cell.png"), rows[:1], column_labels=LABELS["column_labels"])
    with Image.open(tmp_path / "cell_0_2.png") as image:
        assert image.text.keys() == {"Description", "Software"} and image.text["Description"] == "seed 3"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "none"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 8)], r"\[3, 4, 8\], \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8), r"\[8, 8\]"),
        ([torch.zeros(2, 6, 8, 8)], r"\[6, 8, 8\]"),
    ],
)
def test_what_is_no_grid_is_refused(rows, found):
    with pytest.raises(ValueError, match=rf"of one size, not {found}$"):
        labelled_grid(rows)


def test_images_from_minus_1_are_refused(rows):
    with pytest.raises(ValueError, match=r"images are in \[0, 1\]: give x / 2 \+ 0.5"):
        labelled_grid([2 * row - 1 for row in rows])
    labelled_grid([row - 0.09 for row in rows])  # a little outside, as models draw


def size_of_curves(path, count: int, columns: int | None) -> tuple[int, int]:
    save_curves(path, [({"a line": {1: 2.0, 10: 3.0}, "a level": 2.5}, {"xscale": "log"})] * count, columns=columns)
    with Image.open(path) as image:
        return image.size


def test_plots_lie_side_by_side_or_in_rows(tmp_path):
    w, h = size_of_curves(tmp_path / "one.png", 1, None)
    assert size_of_curves(tmp_path / "row.png", 4, None) == pytest.approx((4 * w, h), abs=4)
    assert size_of_curves(tmp_path / "rows.png", 4, 2) == pytest.approx((2 * w, 2 * h), abs=4)


@pytest.mark.parametrize(("kind", "count", "given"), [("row", 2, 1), ("row", 2, 3), ("column", 3, 2), ("column", 3, 4)])
def test_too_few_and_too_many_labels_are_refused(rows, kind, count, given):
    with pytest.raises(ValueError, match=f"one for each of the {count} {kind}s, not {given}$"):
        labelled_grid(rows, **{f"{kind}_labels": ["a"] * given})


def test_matplotlib_waits_for_the_first_figure():
    imported = "import sys, ddpm.tools.figures, ddpm.tools.animation; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported]).returncode == 0


def test_labels_fill_the_width_they_have():
    text = "a photo of a hamburger, noisy, t = 690, i_start = 10"
    lines = wrapped(text, 130).split("\n")
    assert " ".join(lines).replace("\u00a0", " ") == text
    assert lines[2:] == ["noisy,", "t\u00a0=\u00a0690,", "i_start\u00a0=\u00a010"]  # "x = 1" is never cut
    assert all(text_size(line)[0] <= 130 for line in lines)
    assert all(text_size(f"{line} {after.split(' ')[0]}")[0] > 130 for line, after in pairwise(lines))
    assert wrapped("one two\nthree", 1000) == "one two\nthree"


def test_labels_touch_no_image_and_leave_no_gap(tmp_path):
    red, tall = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 32, 32), "a row that is\ntall" + " and tall" * 12
    labels = {"row_labels": ["a row", tall], "column_labels": ["i_start = 10", "an incomprehensibility"]}
    save_grid(tmp_path / "grid.png", [[red] * 2] * 2, **labels, title="both", zoom=2)
    with Image.open(tmp_path / "grid.png") as figure:
        pixels = numpy.asarray(figure.convert("RGB")).astype(int)
    images = (pixels == [255, 0, 0]).all(-1)
    assert images.sum() == 4 * 64 * 64  # apart from each other, nothing on them
    ink, left, top = pixels.max(-1) < 200, images.any(0).argmax(), images.any(1).argmax()
    assert not ink[images.any(1), left - 5 : left].any() and not ink[top - 5 : top, images.any(0)].any()
    assert all(10 <= edge <= 25 for edge in (ink.any(0).argmax(), ink.any(1).argmax()))


@pytest.fixture
def unseen():
    """What labels.py remembers of fonts and warnings, forgotten before and after."""
    for remembered in (readable, characters, text_size, warn_of_missing):
        remembered.cache_clear()
    yield
    for remembered in (readable, characters, text_size, warn_of_missing):
        remembered.cache_clear()


def ink(text: str, **font) -> numpy.ndarray:
    figure = Figure(figsize=(1, 1), dpi=100)
    figure.text(0.3, 0.3, text, fontsize=30, parse_math=False, **font)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., 0]


def test_labels_take_a_font_that_has_the_character(unseen):
    """Ⓐ, which DejaVu Sans lacks and STIXGeneral, which comes with matplotlib, has; beside letters of the former."""
    assert "Ⓐ" not in characters(findfont("DejaVu Sans")) and "Ⓐ" in characters(findfont("STIXGeneral"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, fonts = readable("Ⓐ")
        assert text == "Ⓐ" and fonts[0] == "sans-serif"
        assert readable("a dog")[1] == ["sans-serif"]
        drawn = ink(text, family=fonts)
        assert any((drawn == ink("Ⓐ", family=[font])).all() for font in fonts[1:])
        assert (ink("a", family=fonts) == ink("a")).all()


def test_one_warning_for_all_that_no_font_has_and_the_metadata_has_them(unseen, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.tools.labels.characters", lambda font: frozenset(map(chr, range(32, 127))) | {"\ufffd"})
    prompts = ["a photo of 一只狗", "🚀 雪山村庄 " * 20]
    image = torch.zeros(3, 8, 8)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            save_grid(tmp_path / "grid.png", [[image], [image]], row_labels=prompts, column_labels=["x = 1"])
    assert ["no font here has" in str(warning.message) for warning in warned] == [True]
    assert readable("a 狗") == ("a \ufffd", ["sans-serif"])
    with Image.open(tmp_path / "grid.png") as figure:
        assert figure.text["Description"] == "\n".join([*prompts, "x = 1"])


def test_a_label_of_many_words_is_cut_and_the_metadata_has_them_all(tmp_path):
    prompt, image = "word " * 8000, torch.zeros(3, 8, 8)
    begun = time.process_time()
    save_grid(tmp_path / "grid.png", [[image]], row_labels=[prompt])
    assert time.process_time() - begun < 5  # uncut it takes more than 20
    with Image.open(tmp_path / "grid.png") as figure:
        assert figure.text["Description"] == prompt and figure.height < 2000
