"""The page of scripts/reproduce.py: plain HTML, CSS and JavaScript in one file, next to its figures."""

import html
import inspect
import io
import itertools
import json
import os
import platform
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from shared.experiments import EXPERIMENTS, Experiment, Made, Play
from shared.options import SEED

import torch
from matplotlib.font_manager import FontProperties
from PIL import Image

from ddpm.tools.files import write_atomically

BEAT = 2  # seconds
SCRIPT, STYLE = (Path(__file__).with_suffix(kind).read_text() for kind in (".js", ".css"))
INK = "#010203"  # replaced by the colour of the text


class LivePage:
    """out/index.html while it is being made: a thread keeps out/alive.js changing, which an open page watches."""

    def __init__(self, out: Path):
        self.out, self.version, self.ended = out, "", threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "LivePage":
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def show(self, made: Mapping[str, Made], making: Sequence[Experiment] = ()):
        """Write the page of what is made; `making` are what is being made, and what is to come."""
        self.version = str(time.time_ns())
        write_page(self.out, made, making, self.version)

    def _beat(self):
        for count in itertools.count():
            last = self.ended.wait(BEAT if count else 0)
            write_atomically(self.out / "alive.js", f'alive("{self.version}", {count})'.encode())
            if last:
                return


def write_page(out: Path, made: Mapping[str, Made], making: Sequence[Experiment] = (), version: str = ""):
    """Write out/index.html: a section for each experiment that is made, and a word on those that are not yet."""
    done = [e for e in EXPERIMENTS if e.key in made]
    entries = "".join(f'<a href="#{e.folder}">{e.key} {html.escape(e.title)}</a>' for e in done)
    waiting = ", ".join(e.key for e in EXPERIMENTS if e.key not in made and e not in making[:1])
    waiting = f"Not made yet: {waiting}." if waiting else ""
    if making:
        now = f"{making[0].key} {html.escape(making[0].title)}"
        waiting = f"Being made now: {now}. {waiting} This page fills by itself."
    sections = "".join(section(made[e.key], out) for e in done)
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pixel diffusion in plain PyTorch: every experiment</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>Pixel diffusion in plain PyTorch</h1>
<p>Every experiment of “Fun with Diffusion Models”, and a few more: A and C with a text-to-image cascade, B with digits.
Each has its equation, its figure, the command that made it, and the function that did it, as it is in the
repository.</p>
<p class="quiet">{versions}. Each PNG has its command, seed and versions in its metadata, too.</p>
<nav>{entries}</nav>
<p class="quiet" id="making">{waiting}</p>
{sections}
<script>const VERSION = "{version if making else ""}"
{SCRIPT}</script>
</body>
</html>
"""
    write_atomically(out / "index.html", page.encode())


def section(made: Made, out: Path) -> str:
    """One experiment's part of the page."""
    experiment = made.experiment
    body = f'<p class="failed">This failed: {html.escape(made.failure)}.</p>' if made.failure else ""
    for name, says in (experiment.figures | experiment.trained).items():
        if (out / experiment.folder / name).is_file():
            source, alt = f"{experiment.folder}/{name}", html.escape(f"{experiment.key}: {says}")
            width, height = Image.open(out / source).size
            size = f'width="{width}" height="{height}" loading="lazy"'  # so that nothing moves as it loads
            image = f'<a href="{source}"><img src="{source}" {size} alt="{alt}"></a>'
            figure = f"<figure>{image}<figcaption>{html.escape(says)}</figcaption></figure>\n"
            body += f"<noscript>{figure}</noscript>" if name.endswith(".gif") else figure
    body += "".join(played(one, out, experiment.folder) for one in experiment.plays)
    sources = "".join(source_of(function, out) for function in experiment.functions)
    return f"""<section id="{experiment.folder}">
<h2>{experiment.key} · {html.escape(experiment.title)}</h2>
<p>{html.escape(experiment.says)}</p>
<div class="equation" role="img" aria-label="{html.escape(experiment.equation)}">{typeset(experiment.equation)}</div>
<div class="figures">{body}</div>
<pre>{html.escape(made.command)}</pre>
<p class="quiet">{html.escape(circumstances(made))}</p>
{sources}
</section>
"""


def played(play: Play, out: Path, folder: str) -> str:
    """Images and the slider that they answer to; nothing where there are no such images."""
    table = {}
    for path in (out / folder).glob(f"{play.table}_*_*.png"):
        row, column = path.stem.removeprefix(f"{play.table}_").split("_")
        table[int(row), int(column)] = path.relative_to(out).as_posix()
    rows = [row for row in play.rows if (row, 0) in table]
    if play.kind == "scrub" and rows:
        columns = sorted(column for row, column in table if row == rows[0])
        labels = [label_of(out / table[rows[0], column])[-1] for column in columns]
        frames = [[table[row, column] for column in columns] for row in rows]
        return slider(play, frames, labels, play.says, f'max="{len(columns) - 1}"')
    prompts = {row: [label_of(out / table[r, 0])[1] for r in (row, row + 1)] for row in rows}
    says = {row: f"{first}; {play.says}, {second}" for row, (first, second) in prompts.items()}
    return "".join(slider(play, [[table[row, 0]]], [], says[row], 'max="1" step="any"') for row in rows)


def label_of(image: Path) -> list[str]:
    """The labels in the metadata of one image of a table, its row's before its column's, line by line."""
    return Image.open(image).text["Description"].splitlines()


def slider(play: Play, frames: Sequence[Sequence[str]], labels: Sequence[str], says: str, steps: str) -> str:
    """A figure of as many images as there are lists of frames, and a slider for all of them."""
    says, label_data = html.escape(says), html.escape(json.dumps(labels))
    images = "".join(
        f'<img class="pixels" src="{own[0]}" data-frames="{html.escape(json.dumps(own))}" alt="{says}">'
        for own in frames
    )
    return f"""<figure class="play" data-play="{play.kind}" data-labels="{label_data}"><div>{images}</div>
<input type="range" value="0" {steps} aria-label="{says}" hidden> <output></output>
<figcaption>{says}</figcaption></figure>
"""


def circumstances(made: Made) -> str:
    """With which seed and model, and for how long, an experiment ran."""
    if not made.experiment.figures:
        return "Not run for this page."
    words = shlex.split(made.command)
    given = dict(itertools.pairwise(words))
    model = f"With {given.get('--model', 'tiny-if, which is shipped')}. " if "model" in made.experiment.takes else ""
    return f"{model}Seed {given.get('--seed', SEED)}. Took {max(made.seconds, 1):.0f} s."


@cache
def typeset(tex: str) -> str:
    """An equation as SVG, in the colour of the text around it."""
    from matplotlib import rc_context
    from matplotlib.mathtext import math_to_image

    buffer = io.StringIO()
    clear = {"figure.facecolor": "none", "savefig.facecolor": "none"}  # the page's ground, light or dark
    with rc_context({"mathtext.fontset": "stix", "svg.hashsalt": "page", **clear}):
        math_to_image(f"${tex}$", buffer, prop=FontProperties(size=15), format="svg", color=INK)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def source_of(function: Callable, out: Path) -> str:
    """The source of a function or class, folded, with a link to its file."""
    function = inspect.unwrap(function)  # what torch.no_grad() has wrapped
    path = Path(inspect.getsourcefile(function))
    _, line = inspect.getsourcelines(function)
    link = os.path.relpath(path, out)
    where = f'<a href="{html.escape(link)}">{path.parent.name}/{path.name}</a>, line {line}'
    source = html.escape(inspect.getsource(function))
    return f"<details><summary><code>{function.__name__}</code> in {where}</summary><pre>{source}</pre></details>\n"
