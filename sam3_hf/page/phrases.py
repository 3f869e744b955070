"""Phrases as one text, which the page takes and examples bring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

MAX_PHRASES = 16  # that are looked for at once
EXAMPLE_PHRASES = 8


def split_phrases(text: str | None) -> list[str]:
    """The distinct phrases of a text, between commas, semicolons and ends of lines."""
    phrases = (" ".join(part.split()) for part in re.split(r"[,;\n]", text or ""))
    return list(dict.fromkeys(filter(None, phrases)))


def example_text(vocabulary: Sequence[str]) -> str:
    """The first few phrases of a vocabulary that `split_phrases` gives back as they are."""
    whole = (phrase for phrase in vocabulary if split_phrases(phrase) == [phrase])
    return ", ".join(islice(whole, EXAMPLE_PHRASES))
