"""The page of scripts/reproduce.py: plain HTML and CSS in one file, with its figures beside it."""

import html
import inspect
import io
import itertools
import os
import platform
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.font_manager import FontProperties

from ddpm.files import write_atomically
from shared.experiments import EXPERIMENTS, Made

INK = "#010203"  # replaced by the colour of the text

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #5c6370; --ground: #fdfdfc; --card: #f1f2f4;
  --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --quiet: #9aa3b2; --ground: #16181c; --card: #22262c; --link: #8ab8f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--ground); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif }
a { color: var(--link) }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin: 1.5rem 0; padding: 0; list-style: none }
section { margin-top: 3rem; border-top: 1px solid var(--card); padding-top: .5rem }
.equation { margin: 1rem 0; padding: .8rem 1rem; background: var(--card); border-radius: .4rem; overflow-x: auto }
.equation svg { display: block }
figure { margin: 1rem 0 } figcaption, .quiet { color: var(--quiet); font-size: .9rem }
.figures { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: flex-start }
.figures figure { max-width: 100% }
img { display: block; max-width: 100%; height: auto; background: white; border-radius: .3rem }
.pixels { image-rendering: pixelated }
pre { margin: .6rem 0; padding: .7rem 1rem; background: var(--card); border-radius: .4rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace }
summary { cursor: pointer } .failed { color: #c0392b }
"""


def write_page(out: Path, made: Mapping[str, Made]):
    """Write out/index.html: a section for each experiment that is made, and a word on those that are not yet."""
    done, waiting = ([e for e in EXPERIMENTS if (e.key in made) == there] for there in (True, False))
    entries = "".join(f'<a href="#{e.folder}">{e.key} {html.escape(e.title)}</a>' for e in done)
    waiting = f'<p class="quiet">Not made yet: {", ".join(e.key for e in waiting)}.</p>' if waiting else ""
    sections = "".join(section(made[e.key], out) for e in done)
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pixel diffusion in plain PyTorch: every experiment</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Pixel diffusion in plain PyTorch</h1>
<p>Every experiment of “Fun with Diffusion Models”: A with a text-to-image cascade, B with digits. Each has its
equation, its figure, the command that made it, and the function that did it, as it is in the repository.</p>
<p class="quiet">{versions}. Each figure has its command, seed and versions in its metadata too.</p>
<nav>{entries}</nav>
{waiting}
{sections}
</body>
</html>
"""
    write_atomically(out / "index.html", page.encode())


def section(made: Made, out: Path) -> str:
    """One experiment's part of the page."""
    experiment = made.experiment
    body = f'<p class="failed">This failed: {html.escape(made.failure)}.</p>' if made.failure else ""
    for name, says in (*experiment.figures, *experiment.trained):
        if (out / experiment.folder / name).is_file():
            source, kind = f"{experiment.folder}/{name}", ' class="pixels"' if name.endswith(".gif") else ""
            alt = html.escape(f"{experiment.key}: {says}")
            image = f'<a href="{source}"><img{kind} src="{source}" alt="{alt}" loading="lazy"></a>'
            body += f"<figure>{image}<figcaption>{html.escape(says)}</figcaption></figure>\n"
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


def circumstances(made: Made) -> str:
    """With which seed and model, and for how long, an experiment ran."""
    if not made.experiment.figures:
        return "Not run for this page."
    words = shlex.split(made.command)
    given = dict(itertools.pairwise(words))
    model = f"With {given.get('--model', 'tiny-if, which is shipped')}. " if "model" in made.experiment.takes else ""
    return f"{model}Seed {given['--seed']}. Took {max(made.seconds, 1):.0f} s."


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
