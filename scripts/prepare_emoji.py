"""Render npm's icon packages into the folder of captioned images from which tiny-if learns.

    for set in noto noto-v1 twemoji fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast \\
        emojione emojione-monotone fxemoji; do npm pack @iconify-json/$set; done
    python scripts/prepare_emoji.py iconify-json-*.tgz --out emoji

Takes the packages as npm packs them, or folders of their unpacked files. Every thing that at least --artists of them
draw becomes a PNG for each artist, beside metadata.jsonl in the "imagefolder" layout of Hugging Face datasets:

    {"file_name": "noto/red-apple.png", "text": "red apple", "tags": ["apple"], "artist": "noto"}

Flags, clock faces, keycaps, buttons and skin tones are left out. Needs `pip install -e ".[data]"`. All of it takes
about two minutes and 60 MB; images that are there already are kept.
"""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

from shared.options import check_writable, parser, positive, run

from PIL import Image
from tqdm import tqdm

from ddpm.files import first_line, reading, write_atomically

SKIPPED = re.compile(
    r"-(light|medium|dark|skin-tone)$(?<!traffic-light)(?<!car-light)|-(light|medium|dark)-|^flag-|-flag$|^keycap|"
    r"-(oclock|thirty)$|-button$|^(japanese|input)-|-(square|circle|diamond)$"
)


def main():
    options = parser(__doc__)
    options.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE", help="a .tgz, or its unpacked folder")
    options.add_argument("--artists", type=positive, default=6, help="that draw a thing, at least (default: 6)")
    options.add_argument("--size", type=positive, default=128, help="pixels across (default: 128)")
    options.add_argument("--out", type=Path, default=Path("emoji"), help="default: emoji")
    args = options.parse_args()
    if args.size > 1024:
        raise ValueError(f"--size {args.size} is above 1024")
    check_writable(args.out / "metadata.jsonl")
    render = find_renderer()
    artists = dict(read_package(path) for path in args.packages)
    if args.artists > len(artists):
        raise ValueError(f"--artists {args.artists} is above the {len(artists)} packages that were given")
    rows = list(things(artists, args.artists))
    written = []
    for artist, key, name, others in tqdm(rows, desc="images", unit="image"):
        path = args.out / artist / f"{name}.png"
        if not path.is_file():
            try:
                image = render(svg(artists[artist], key), args.size)
            except ValueError as error:
                tqdm.write(f"left out, as it cannot be drawn: {artist}/{key} ({first_line(error)})")
                continue
            write_atomically(path, image)
        text, tags = name.replace("-", " "), [other.replace("-", " ") for other in others]
        row = {"file_name": f"{artist}/{name}.png", "text": text, "tags": tags, "artist": artist}
        written.append(json.dumps(row, ensure_ascii=False))
    write_atomically(args.out / "metadata.jsonl", "\n".join([*written, ""]).encode())
    drawn = len({name for _, _, name, _ in rows})
    print(f"{args.out}: {drawn} things in {len(written)} images by {len(artists)} artists")


def find_renderer():
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
        if path.is_dir():
            text = (path / "icons.json").read_bytes()
        else:
            with tarfile.open(path) as archive:
                text = archive.extractfile("package/icons.json").read()
        icons = json.loads(text)
        return icons["prefix"], {"aliases": {}, **icons, "icons": dict(icons["icons"])}


def things(artists: dict[str, dict], least: int):
    """Yield (artist, its key, the thing's name, its other names) for each image, thing by thing.

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


if __name__ == "__main__":
    run(main)
