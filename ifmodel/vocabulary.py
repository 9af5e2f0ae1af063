"""What a small model can be asked for, from the vocabulary.json of its folder.

{"things": {phrase: {"aliases": [phrases that mean the same], "tags": [words that have to do with it]}},
 "anything": [prompts that name no thing]}
"""

import difflib
import itertools
import re
from pathlib import Path

from ifmodel.weights import read_json

SMALL_WORDS = {"a", "an", "the", "some", "of", "on", "in", "at", "with", "and"}


def load_vocabulary(source: str | Path, revision: str | None = None) -> dict | None:
    """A model's vocabulary; None if it can be asked for anything. Raises ValueError when the file is damaged."""
    path, found = read_json(source, "", "vocabulary.json", revision)
    if found is None:
        return None
    things = found.get("things")
    fits = isinstance(things, dict) and all(things) and all(isinstance(more, dict) for more in things.values())
    lists = [found.get("anything")]
    lists += [more.get(name) for more in things.values() for name in ("aliases", "tags")] if fits else []
    if not fits or not all(isinstance(x, list) and all(isinstance(word, str) for word in x) for x in lists):
        raise ValueError(f"{path} is no vocabulary: things, with aliases and tags each, and anything are needed")
    return found


def nearest_known(prompt: str, vocabulary: dict, count: int = 3) -> list[str]:
    """The things nearest to a prompt that names none of the vocabulary; [] for one that does.

    Nearest are those with most of its words among their tags, then those that are spelt alike.
    """
    words = [singular(word) for word in re.findall(r"\w+", prompt.lower())]
    if not words or prompt.lower().strip() in vocabulary["anything"]:
        return []
    said = f" {' '.join(words)} "
    style = {singular(word) for phrase in vocabulary["anything"] for word in phrase.split()}
    content, scores = set(words) - style - SMALL_WORDS or set(words), {}
    for thing, more in vocabulary["things"].items():
        alike = 0.0
        for phrase in (thing, *more["aliases"]):
            known = [singular(word) for word in re.findall(r"\w+", phrase.lower())]
            known = known[1:] if known and known[0] in SMALL_WORDS else known
            if known and f" {' '.join(known)} " in said:
                return []
            pairs = itertools.product(content, known)
            alike = max([alike, *(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)])
        scores[thing] = (len({singular(tag.lower()) for tag in more["tags"]} & content), alike)
    return sorted(scores, key=scores.get, reverse=True)[:count]


def singular(word: str) -> str:
    """A word without the s of its plural, so that "dogs" names a dog."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
