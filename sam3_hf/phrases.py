"""Lists of phrases: those of a file, and everyday ones made from a list of nouns by rule."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from .files import asset_lines

# What makes a noun narrower: colours, sizes, materials, patterns and states, in no order that a noun would follow.
ADJECTIVES = tuple(
    "red large wooden striped old blue small metal dotted wet green tall plastic checkered broken yellow long glass "
    "patterned new black tiny round open white huge flat empty brown thin shiny dirty orange purple pink grey".split()
)
_IRREGULAR = {
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "shelf": "shelves",
    "wolf": "wolves",
    "calf": "calves",
    "hoof": "hooves",
    "scarf": "scarves",
    "lens": "lenses",
    "mosquito": "mosquitoes",
    "potato": "potatoes",
    "tomato": "tomatoes",
}
_ALIKE = ("sheep", "fish", "deer", "aircraft", "series", "glasses")
HELD_OUT = 8  # one in so many is not learnt from, but measured


def everyday_nouns() -> tuple[str, ...]:
    """What to ask a teacher for where nobody says: over a thousand names of things, English."""
    return asset_lines("everyday_nouns.txt")


def everyday_phrases() -> tuple[str, ...]:
    """The everyday nouns, each with its plural, with an adjective, and in the plural with two of them."""
    phrases = []
    for index, noun in enumerate(everyday_nouns()):
        first, second, third = (ADJECTIVES[(index * step + step) % len(ADJECTIVES)] for step in (1, 5, 7))
        adjectives = second if second == third else f"{second} {third}"
        phrases += [noun, plural(noun), f"{first} {noun}", f"{adjectives} {plural(noun)}"]
    return tuple(dict.fromkeys(phrases))


def plural(noun: str) -> str:
    """The plural of an English noun or of the last word of several; of a plural, itself."""
    before, _, word = noun.rpartition(" ")
    return f"{before} {_plural_of_word(word)}".strip()


def _plural_of_word(word: str) -> str:
    if word in _ALIKE or (word.endswith("s") and not word.endswith(("ss", "us", "is"))):
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word == "man" or word.endswith("woman"):
        return f"{word[:-2]}en"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if re.search("[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def read_phrases(path: str | os.PathLike) -> tuple[str, ...]:
    """
    The phrases of a text file, one a line; empty lines do not count, nor does a phrase twice.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text in UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such.") from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def hold_out(phrases: tuple[str, ...] | list[str]) -> tuple[list[str], list[str]]:
    """
    Phrases to learn from, and phrases to measure by: an eighth of them, drawn at random, always the same.

    Raises:
        ValueError: there are less than two.
    """
    if len(phrases) < 2:
        raise ValueError(f"{len(phrases)} phrases are too few, as one is held out: give two at least.")
    order = np.random.default_rng(0).permutation(len(phrases))
    held = set(order[: max(len(phrases) // HELD_OUT, 1)].tolist())
    return [phrase for i, phrase in enumerate(phrases) if i not in held], [phrases[i] for i in sorted(held)]
