"""The words of the composed world, and which phrase means which object.

An object has a shape, a fill and a size. A phrase is a shape with or without words for fill and size before it
("star", "striped star", "small star", "small striped star"), and means every object that fits: one object answers to
up to four phrases. Some objects have a fill without a name, some have a shape without one and answer to nothing.

`HELD_OUT` lists pairs of a fill and a shape that training neither shows nor asks for, although it does each of their
words: what a model says to them, it has composed.
"""

from itertools import product

from ..files import asset_lines

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
COLORS = {
    "red": (206, 46, 44),
    "orange": (240, 136, 28),
    "yellow": (242, 218, 60),
    "green": (52, 152, 66),
    "blue": (44, 92, 206),
    "purple": (134, 58, 170),
}
PATTERNS = ("striped", "dotted", "checkered")
FILLS = (*COLORS, *PATTERNS)
SIZES = {  # radius as a share of the picture's longer side; what lies between the two has no word for its size
    "small": (0.0375, 0.075),
    "large": (0.18, 0.3),
}
MEDIUM = (0.095, 0.15)

HELD_OUT = (
    ("red", "heart"),
    ("orange", "circle"),
    ("yellow", "cross"),
    ("green", "star"),
    ("blue", "ring"),
    ("purple", "square"),
    ("striped", "circle"),
    ("striped", "triangle"),
    ("dotted", "crescent"),
    ("dotted", "square"),
    ("checkered", "heart"),
    ("checkered", "star"),
)
TRAINED = tuple(pair for pair in product(FILLS, SHAPES) if pair not in HELD_OUT)


def phrases_of(shape: str, fill: str | None, size: str | None) -> list[str]:
    """Every phrase that means an object, the shortest first; none if its shape has no name.

    Args:
        shape: one of `SHAPES`, or another word for one that has no name.
        fill: one of `FILLS`, or None for one that has no name.
        size: "small", "large" or None.
    """
    if shape not in SHAPES:
        return []
    parts = [[shape], [fill, shape], [size, shape], [size, fill, shape]]
    return [" ".join(words) for words in parts if None not in words]


def _phrases(pairs) -> tuple[str, ...]:
    every = [phrase for fill, shape in pairs for size in SIZES for phrase in phrases_of(shape, fill, size)]
    return tuple(sorted(set(every), key=lambda phrase: (phrase.count(" "), phrase)))


def _of_pairs(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(phrase for phrase in phrases if set(phrase.split()) & set(FILLS))


SEEN_PHRASES = _phrases(TRAINED)
UNSEEN_PHRASES = _of_pairs(_phrases(HELD_OUT))

# A tenth of a second of the model's time for each phrase and picture adds up: evaluations ask for a part of them.
SCORED_PHRASES = tuple(
    phrase
    for words in (1, 2, 3)
    for phrase in [phrase for phrase in SEEN_PHRASES if phrase.count(" ") == words - 1][:: (1, 5, 9)[words - 1]]
)


def some_phrases(count: int) -> tuple[str, ...]:
    """`count` of `SEEN_PHRASES`, spread over them evenly."""
    return tuple(SEEN_PHRASES[index * len(SEEN_PHRASES) // count] for index in range(count))


def absent_phrases() -> tuple[str, ...]:
    """Phrases that mean nothing in any picture, some of them with words that mean something."""
    return asset_lines("absent_phrases.txt")
