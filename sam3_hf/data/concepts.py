"""What a model makes of the concepts of a dataset: phrases that it tells apart, and concepts that it gets to see."""

import logging

import datasets
import numpy as np

from ..processing_sam3_lite import clean_phrase, clip_tokenizer, tokenize
from .checks import DatasetError, Problems
from .rows import concept_names, first_of, objects_per_category

logger = logging.getLogger(__name__)

NEVER_CUT = 30  # bytes; a token stands for one at least, and the first and last of 32 are marks


def check_phrases(phrases: list[str], source: str, problems: Problems) -> None:
    """Adds a problem for each group of phrases that are one to the model: it reads small letters, and 32 tokens.

    Args:
        phrases: all different.
        source: of the dataset, for messages.
    """
    by_reading = {}
    for phrase, reading in zip(phrases, as_read(phrases), strict=True):
        by_reading.setdefault(reading, []).append(phrase)
    for reading, alike in by_reading.items():
        if len(alike) > 1:
            names = " and ".join(repr(_ends_of(phrase)) for phrase in alike)
            why = "letters are made small" if isinstance(reading, str) else "only the first 32 tokens are read"
            remedy = "with a category_map, give them phrases that differ, or one and the same"
            problems.add("phrases alike to the model", source, f"{names}: {why}; {remedy}")


def _ends_of(phrase: str) -> str:
    return phrase if len(phrase) <= 60 else f"{phrase[:27]} ... {phrase[-27:]}"


def as_read(phrases: list[str]) -> list[str | tuple[int, ...]]:
    """What the model makes of each phrase: cleaned text, and of what is long its tokens."""
    cleaned = [clean_phrase(phrase) for phrase in phrases]
    long = [phrase for phrase in cleaned if len(phrase.encode()) > NEVER_CUT]
    if not long:
        return cleaned
    tokens = tokenize(clip_tokenizer(), long)["input_ids"].tolist()
    cut = {phrase: tuple(ids) for phrase, ids in zip(long, tokens, strict=True)}
    return [cut.get(phrase, phrase) for phrase in cleaned]


def unseen_concepts(train: datasets.Dataset, other: datasets.Dataset) -> dict[str, int]:
    """{concept: objects in `other`} of the concepts of which there is no object in `train`."""
    seen = np.any(objects_per_category(train) > 0, axis=0)
    counts = np.maximum(objects_per_category(other), 0).sum(axis=0)
    names = concept_names(other)
    return {names[index]: int(counts[index]) for index in np.flatnonzero(~seen & (counts > 0))}


def warn_of_unseen_concepts(splits: datasets.DatasetDict) -> None:
    """Logs which concepts of other splits the training split has no object of."""
    for name, split in splits.items():
        unseen = unseen_concepts(splits["train"], split) if name != "train" and "train" in splits else {}
        if unseen:
            listed = first_of([f"'{concept}' ({count})" for concept, count in unseen.items()])
            text = (
                "the %s split has objects of %d concepts that no training image shows: %s; if another spelling is "
                "meant, rename with a category_map"
            )
            logger.warning(text, name, len(unseen), listed)


def check_common_concepts(train: datasets.Dataset, validation: datasets.Dataset, source: str) -> None:
    """Raises DatasetError if the validation split has objects, and none of a concept that the training split shows."""
    unseen, shown = unseen_concepts(train, validation), unseen_concepts(validation, train)
    counts = objects_per_category(validation)
    if unseen and len(unseen) == np.any(counts > 0, axis=0).sum():
        raise DatasetError(
            f"{source}: no concept of the validation split ({first_of(list(unseen))}) is in the training split "
            f"({first_of(list(shown))}): give it the same categories, or rename them with --category_map"
        )
