"""scripts/prepare_emoji.py on small icon packages: one folder in the imagefolder layout, of what several draw."""

import io
import json
import tarfile

import numpy
import pytest
from PIL import Image

RED = '<rect x="2" y="2" width="6" height="6" fill="#ff0000"/>'


def pack(folder, prefix: str, icons: dict, aliases: dict | None = None):
    """A package as npm packs it."""
    content = {"prefix": prefix, "width": 10, "height": 10, "aliases": aliases or {}}
    content["icons"] = {name: {"body": body} for name, body in icons.items()}
    data = json.dumps(content).encode()
    with tarfile.open(folder / f"{prefix}.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return folder / f"{prefix}.tgz"


@pytest.fixture
def packages(tmp_path):
    hand = {"waving-hand": RED, "waving-hand-dark": RED, "flag-france": RED, "traffic-light": RED}
    return [
        pack(tmp_path, "one", {"red-apple": RED, **hand}, {"apple": {"parent": "red-apple"}}),
        pack(tmp_path, "two", {"redapple": RED, **hand}),
        pack(tmp_path, "three", {"pear": RED}),
    ]


def test_things_drawn_by_enough_artists_become_one_folder(run_script, packages, tmp_path):
    status, printed, err = run_script(
        "prepare_emoji", *packages, "--artists", 2, "--size", 40, "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert "3 things in 6 images by 3 artists" in printed
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    # named alike but for hyphens; neither skin tones nor flags, which others leave out too
    assert {row["text"] for row in rows} == {"red apple", "waving hand", "traffic light"}
    apple = next(row for row in rows if row["text"] == "red apple" and row["artist"] == "two")
    assert apple == {"file_name": "two/red-apple.png", "text": "red apple", "tags": ["apple"], "artist": "two"}
    pixels = numpy.asarray(Image.open(tmp_path / "out" / apple["file_name"]))
    assert pixels.shape == (40, 40, 4)
    assert pixels[20, 20].tolist() == [255, 0, 0, 255]
    assert pixels[2, 2, 3] == 0  # transparent where nothing is drawn


def test_words_that_people_say_of_a_thing_are_tags(run_script, packages, tmp_path):
    words = tmp_path / "words"
    (words / "en").mkdir(parents=True)
    (words / "en" / "data.json").write_text('[{"label": "Red apple", "tags": ["fruit", "apple"]}, {"label": "A"}]')
    options = ("--artists", 2, "--size", 40, "--words", words, "--out", tmp_path / "out")
    status, _, err = run_script("prepare_emoji", *packages, *options)
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    tags = {row["text"]: row["tags"] for row in rows}
    assert tags["red apple"] == ["apple", "fruit"] and tags["waving hand"] == []


def test_bad_input_is_one_line(refused, packages, tmp_path):
    (tmp_path / "no.tgz").write_bytes(b"no archive")
    out = ("--out", tmp_path / "out")
    assert "is no package of icons" in refused("prepare_emoji", tmp_path / "no.tgz", *out)
    assert "is no package of icons" in refused("prepare_emoji", tmp_path / "nowhere", *out)
    wrong = ("--words", tmp_path / "no.tgz", *out)
    assert "is no package of emojibase-data" in refused("prepare_emoji", *packages, "--artists", 2, *wrong)
    assert "--artists 6 is above the 3 packages" in refused("prepare_emoji", *packages, *out)
    assert "--size 4096 is above 1024" in refused("prepare_emoji", *packages, "--size", 4096, *out)
    assert not (tmp_path / "out").exists()
