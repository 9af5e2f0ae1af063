"""npm's icon packages: which things they draw, under which names, and rendering them; see scripts/prepare_emoji.py."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from ddpm.tools.files import LARGEST_TEXT, parse_json, read_small, reading

# Names of what is left out: skin tones, flags, keycaps, clock faces, buttons and shapes
SKIPPED = re.compile(
    r"-(light|medium|dark|skin-tone)$(?<!traffic-light)(?<!car-light)|-(light|medium|dark)-|^flag-|-flag$|^keycap|"
    r"-(oclock|thirty)$|-button$|^(japanese|input)-|-(square|circle|diamond)$"
)


def find_renderer() -> Callable[[str, int], bytes]:
    """resvg as a function (svg, size) -> PNG bytes. Raises ValueError when it is not installed."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError('resvg-py is not installed: pip install -e ".[data]"') from None

    def render(source: str, size: int) -> bytes:
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=source, width=size, height=size, skip_system_fonts=True))
        with Image.open(io.BytesIO(drawn)) as image:  # resvg keeps the aspect: centre what is not square
            square = Image.new("RGBA", (size, size))
            square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        target = io.BytesIO()
        square.save(target, "PNG", optimize=True)
        return target.getvalue()

    return render


def read_package(path: Path) -> tuple[str, dict]:
    """An icon package's name and its icons.json, from a .tgz or a folder. Raises ValueError for anything else."""
    with reading(path, "package of icons"):
        icons = read_member(path, "icons.json")
        return icons["prefix"], {"aliases": {}, **icons, "icons": dict(icons["icons"])}


def read_words(path: Path) -> dict[str, list[str]]:
    """Words by name, without spaces and hyphens, from npm's emojibase-data. Raises ValueError for anything else."""
    with reading(path, "package of emojibase-data"):
        rows = read_member(path, "en/data.json")
        return {re.sub(r"[\W_]", "", row["label"].lower()): list(row.get("tags", ())) for row in rows}


def read_member(path: Path, name: str):
    """A JSON file of an npm package, packed or unpacked."""
    if path.is_dir():
        return parse_json(read_small(path / name), name)
    with tarfile.open(path) as archive:
        return parse_json(archive.extractfile(f"package/{name}").read(LARGEST_TEXT), name)  # cut, it is no JSON


def things(artists: dict[str, dict], least: int) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (artist, its key, the thing's name, its other names) for each image of what `least` artists draw.

    Names are compared without hyphens, since fxemoji has none; the one with most hyphens among most artists is shown.
    An alias counts as a drawing of its own name only where the artist has no other drawing of it.
    """
    keys, names, others = {}, {}, {}
    for artist, package in artists.items():
        aliases = {alias: entry["parent"] for alias, entry in package["aliases"].items() if len(entry) == 1}
        for name, key in [*((key, key) for key in package["icons"]), *aliases.items()]:
            if SKIPPED.search(name) or key not in package["icons"]:
                continue
            thing = name.replace("-", "")
            keys.setdefault(thing, {}).setdefault(artist, key)
            names.setdefault(thing, Counter())[name] += 1
        for alias, key in aliases.items():
            if key in package["icons"] and not SKIPPED.search(alias):
                others.setdefault(key.replace("-", ""), Counter())[alias] += 1
    shown = {}
    for thing, drawn in sorted(keys.items()):
        if len(drawn) < least:
            continue
        name = max(names[thing], key=lambda name: (name.count("-"), names[thing][name], name))
        images = frozenset(drawn.items())
        if any(images <= known for known in shown.values()):  # another name of the same drawings
            continue
        shown[thing] = images
        for artist, key in drawn.items():
            yield artist, key, name, sorted(others.get(thing, ()))


def svg(package: dict, key: str) -> str:
    """One icon as a whole SVG file."""
    icon = package["icons"][key]
    left, top = (icon.get(side, package.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, package.get(side, 16)) for side in ("width", "height"))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'
