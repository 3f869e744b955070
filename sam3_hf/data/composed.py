"""Datasets of the composed world: pictures in which words combine, and phrases that training never combined."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..rle import encode_masks
from .painting import Kind, Painted, choose_kinds, draw_scene
from .raster import box_around
from .words import (
    HELD_OUT,
    SCORED_PHRASES,
    SEEN_PHRASES,
    TRAINED,
    UNSEEN_PHRASES,
    absent_phrases,
    phrases_of,
    some_phrases,
)

EMPTY_EVERY = 20  # one image in so many shows nothing but ground
SPLITS = {  # in the order of their random streams: (phrases that are asked for, pairs that lead a picture)
    "train": (SEEN_PHRASES, TRAINED),
    "valid": (SEEN_PHRASES, TRAINED),
    "seen": (SCORED_PHRASES, TRAINED),
    "unseen": (UNSEEN_PHRASES, HELD_OUT),
    "dense": (SCORED_PHRASES, TRAINED),
    "absent": (absent_phrases(), TRAINED),
}


def write_composed(
    folder: str | Path,
    counts: dict[str, int],
    image_size: int = 128,
    seed: int = 0,
    num_phrases: int = len(SEEN_PHRASES),
) -> Path:
    """Writes pictures and COCO annotations, one category per phrase.

    `train` and `valid` are the splits of the Roboflow layout, for training. The others are for evaluation:
    `seen`: new pictures of the trained kind, asked for a part of the trained phrases (`SCORED_PHRASES`);
    `unseen`: pictures with pairs of words that training never combined, asked for those (`UNSEEN_PHRASES`);
    `dense`: pictures of 20 to 40 objects, asked for `SCORED_PHRASES`;
    `absent`: pictures of the trained kind, asked for what is in none of them (`absent_phrases`).

    Each split is a folder with `_annotations.coco.json` and the PNG files. An object has one annotation for
    each phrase that means it. Boxes and masks (compressed RLE) cover what is visible. The same arguments give the same
    files byte for byte, and image `i` of a split depends neither on how many there are nor on other splits.

    Args:
        folder: created where missing; files of the same name are overwritten.
        counts: {split: images}.
        image_size: longer side in pixels, at least 96.
        seed: of the random generator.
        num_phrases: how many of the 204 phrases `train` and `valid` ask for; the pictures are the same.

    Returns:
        `folder` as a `Path`.

    Raises:
        ValueError: an argument out of its range, or no such split.
    """
    if image_size < 96:
        raise ValueError(f"image_size must be at least 96 pixels for shapes to be recognisable, got {image_size}")
    if not 1 <= num_phrases <= len(SEEN_PHRASES):
        raise ValueError(f"num_phrases must be 1 to {len(SEEN_PHRASES)}, got {num_phrases}")
    for split, count in counts.items():
        if split not in SPLITS:
            raise ValueError(f"counts: there is no split {split}; those known are {', '.join(SPLITS)}")
        if count < 0:
            raise ValueError(f"counts: {split} must not be negative, got {count}")
    folder = Path(folder)
    for split, count in counts.items():
        if count:
            phrases = some_phrases(num_phrases) if split in ("train", "valid") else SPLITS[split][0]
            _write_split(folder / split, split, phrases, count, image_size, seed)
    return folder


def _write_split(folder: Path, split: str, phrases: tuple, count: int, image_size: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {phrase: number for number, phrase in enumerate(phrases, start=1)}
    images, annotations = [], []
    for index in range(count):
        picture, objects = compose(split, index, image_size, seed)
        file_name = f"{index:05d}.png"
        Image.fromarray(picture).save(folder / file_name, compress_level=1)
        height, width = picture.shape[:2]
        images.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
        masks = encode_masks([] if not objects else np.stack([each.mask for each in objects]))
        for painted, rle in zip(objects, masks, strict=True):
            asked = [phrase for phrase in phrases_of_object(painted) if phrase in numbers]
            shared = {"bbox": box_around(painted.mask), "area": int(painted.mask.sum()), "segmentation": rle}
            for phrase in asked:
                ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": numbers[phrase]}
                annotations.append({**ids, **shared, "iscrowd": 0})
    categories = [{"id": number, "name": phrase, "supercategory": "shape"} for phrase, number in numbers.items()]
    document = {
        "info": {"description": f"composed shapes, {split}"},
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def compose(split: str, index: int, image_size: int = 128, seed: int = 0) -> tuple[np.ndarray, list[Painted]]:
    """One picture of a split, (height, width, 3) uint8, and its objects."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    kinds = []
    if split == "dense" or index % EMPTY_EVERY != EMPTY_EVERY - 1:
        leading = SPLITS[split][1]
        fill, shape = leading[index % len(leading)]
        others = [Kind(shape, fill) for fill, shape in TRAINED]
        kinds = choose_kinds(rng, Kind(shape, fill), others, _count(rng, split))
    return draw_scene(rng, image_size, kinds)


def _count(rng: np.random.Generator, split: str) -> int:
    """Objects to draw, 1 to 40."""
    if split == "dense":
        return int(rng.integers(22, 41))  # one or two may find no room
    return int(rng.integers(11, 41) if rng.random() < 0.15 else rng.integers(1, 11))


def phrases_of_object(painted: Painted) -> list[str]:
    """Every phrase that means an object, the shortest first."""
    return phrases_of(painted.kind.shape, painted.kind.fill, painted.size)
