"""Render npm's icon packages into the folder of captioned images from which tiny-if learns.

    for set in noto noto-v1 twemoji fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast \\
        emojione emojione-monotone fxemoji; do npm pack @iconify-json/$set; done
    npm pack emojibase-data
    python scripts/prepare_emoji.py iconify-json-*.tgz --words emojibase-data-*.tgz --out emoji

Takes the packages as npm packs them, or folders of their unpacked files. Every thing that at least --artists of them
draw becomes a PNG for each artist, with a metadata.jsonl, in the "imagefolder" layout of Hugging Face datasets:

    {"file_name": "noto/red-apple.png", "text": "red apple", "tags": ["apple"], "artist": "noto"}

Tags are a thing's other names, and with --words what else people say of it ("puppy" of a dog face). Flags, clock faces,
keycaps, buttons and skin tones are left out. Needs `pip install -e ".[data]"`. All of it takes two or three minutes and
60 MB; images that are there already are kept.
"""

import json
from pathlib import Path

from shared.options import check_writable, parser, positive, run

from tqdm import tqdm

from ddpm.tools.files import first_line, write_atomically
from ifmodel.tiny.icons import find_renderer, read_package, read_words, svg, things


def main():
    options = parser(__doc__, "PACKAGE … ")
    options.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE", help="a .tgz, or its unpacked folder")
    options.add_argument("--words", type=Path, metavar="PACKAGE", help="emojibase-data, for more tags")
    options.add_argument("--artists", type=positive, default=6, help="that draw a thing, at least (default: 6)")
    options.add_argument("--size", type=positive, default=128, help="pixels across (default: 128)")
    options.add_argument("--out", type=Path, default=Path("emoji"), help="default: emoji")
    args = options.parse_args()
    if args.size > 1024:
        raise ValueError(f"--size {args.size} is above 1024")
    check_writable(args.out / "metadata.jsonl")
    render = find_renderer()
    artists = dict(read_package(path) for path in args.packages)
    words = read_words(args.words) if args.words else {}
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
        text = name.replace("-", " ")
        tags = [*dict.fromkeys([*(other.replace("-", " ") for other in others), *words.get(name.replace("-", ""), ())])]
        row = {"file_name": f"{artist}/{name}.png", "text": text, "tags": tags, "artist": artist}
        written.append(json.dumps(row, ensure_ascii=False))
    write_atomically(args.out / "metadata.jsonl", "\n".join([*written, ""]).encode())
    drawn = len({name for _, _, name, _ in rows})
    print(f"{args.out}: {drawn} things in {len(written)} images by {len(artists)} artists")


if __name__ == "__main__":
    run(main)
