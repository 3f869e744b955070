"""
Masks as PNG files in `masks/`, beside `images/`: for each picture an id image, in which every value but 0 is an object
(`masks/a.png`), or a mask for each object (`masks/a/1.png`, `masks/a_1.png`). A folder between them names the class
(`masks/cell/a.png`). Or a folder for each picture, with `images/` and `masks/` in it.
"""

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...rle import encode_masks, extent
from ..checks import Problems
from ..rows import RawSplit
from .pictures import (
    Folders,
    Labelled,
    SplitBuilder,
    bare,
    files_in,
    folders_in,
    make_object,
    pictures_in,
    split_folders,
)

logger = logging.getLogger(__name__)

MASK_FOLDERS = ("masks", "mask")
NAMELESS = "1"  # the class where no folder names one: a number, for which a category map is asked
NUMBERED = re.compile(r"(.+)_\d+$")


class Mask(NamedTuple):
    """A file with one object, or with one for each value, of a class."""

    path: Path
    category: str
    by_value: bool


def find(path: Path) -> dict[str, Folders] | None:
    """{split: where it is} of a folder with masks; None of anything else."""
    if not path.is_dir():
        return None
    parts = split_folders(path, MASK_FOLDERS)
    return parts if any(_has_masks(part) for part in parts.values()) else None


def _are_apart(folders: Folders) -> bool:
    """Whether masks have a folder beside that of all pictures."""
    return any(folder.name.lower() in MASK_FOLDERS for folder in (folders.labels, folders.labels.parent))


def _has_masks(folders: Folders) -> bool:
    if _are_apart(folders):
        return any(True for _ in files_in(folders.labels, ".png"))
    return any(_picture_folder(folder) for folder in folders_in(folders.images).values())


def _picture_folder(folder: Path) -> Folders | None:
    """Folders of one picture and its masks, if that is what a folder holds."""
    inner = folders_in(folder)
    return Folders(inner["images"], inner["masks"]) if {"images", "masks"} <= inner.keys() else None


def read(name: str, folders: Folders, problems: Problems) -> RawSplit:
    """
    Reads one split.

    Args:
        problems: masks without a picture, of another size or unreadable, and two pictures of one name are added.
    """
    builder = SplitBuilder(name, str(folders.labels), problems)
    if _are_apart(folders):
        pairs = _pair(folders, problems)
    else:
        pairs = []
        for folder in folders_in(folders.images).values():
            inner = _picture_folder(folder)
            pairs += _pair_one(inner, folder.name, problems) if inner else []
    if pairs and name != "test" and not any(masks for _, masks in pairs):
        detail = f"none of the {len(pairs)} pictures in {folders.images} has a mask (*.png) here"
        problems.add("no labels", folders.labels, f"{detail}: put them here, named as the pictures")
    for picture, masks in pairs:
        size = builder.size_of(picture.path, picture.name)
        if size is None:
            continue
        objects = []
        for mask in masks:
            encodings = _encodings(mask, size, problems)
            objects += [(mask.category, encoding) for encoding in encodings]
        numbered = [
            make_object(number, category, extent(encoding), encoding)
            for number, (category, encoding) in enumerate(objects, start=1)
        ]
        builder.add(picture, size, numbered)
    return builder.build()


def _pair(folders: Folders, problems: Problems) -> list[tuple[Labelled, list[Mask]]]:
    """Each picture with its masks; one without is a picture of nothing."""
    inside = folders.labels.is_relative_to(folders.images)
    pictures = pictures_in(folders.images, exclude=folders.labels if inside else Path(os.devnull))
    masks = {}
    for picture in pictures:
        if bare(picture.name) in masks:
            detail = f"{picture.name} and another have one name for their masks: rename one"
            problems.add("two pictures of one label", folders.images, detail)
        masks[bare(picture.name)] = []
    for path in files_in(folders.labels, ".png"):
        owner, mask = _owner(path, PurePosixPath(path.relative_to(folders.labels).as_posix()), masks.keys())
        if owner is None:
            detail = f"there is no picture of its name in {folders.images}: add it, or remove the mask"
            problems.add("label without a picture", path, detail)
        else:
            masks[owner].append(mask)
    return [(Labelled(picture.path, picture.name, None), masks[bare(picture.name)]) for picture in pictures]


def _owner(path: Path, name: PurePosixPath, pictures) -> tuple[str | None, Mask]:
    """The picture that a mask belongs to, and what it says; without and with a folder for the class."""
    inner = PurePosixPath(*name.parts[1:])
    for rest, category in ((name, NAMELESS), (inner, name.parts[0])) if len(name.parts) > 1 else ((name, NAMELESS),):
        stem, parent = bare(str(rest)), rest.parent.as_posix()
        if stem in pictures:
            return stem, Mask(path, category, by_value=True)
        if parent in pictures:
            return parent, Mask(path, category, by_value=False)
        numbered = NUMBERED.match(stem)
        if numbered and numbered[1] in pictures:
            return numbered[1], Mask(path, category, by_value=False)
    return None, Mask(path, NAMELESS, by_value=False)


def _pair_one(folders: Folders, name: str, problems: Problems) -> list[tuple[Labelled, list[Mask]]]:
    """The picture of a folder of its own, with its masks, each an object."""
    pictures = pictures_in(folders.images)
    if len(pictures) != 1:
        problems.add("one picture a folder", folders.images, f"{len(pictures)} pictures, where one is meant")
        return []
    masks = []
    for path in files_in(folders.labels, ".png"):
        parts = path.relative_to(folders.labels).parts
        masks.append(Mask(path, parts[0] if len(parts) > 1 else NAMELESS, by_value=False))
    return [(Labelled(pictures[0].path, f"{name}/{pictures[0].name}", None), masks)]


def _encodings(mask: Mask, size: tuple[int, int], problems: Problems) -> list[dict]:
    """The run-length encoding of each object of a file, in the order of their values."""
    try:
        with Image.open(mask.path) as image:
            values = np.array(image)
            grey_with_alpha = image.mode == "LA"
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        problems.add("unreadable mask", mask.path, f"{error}: replace or remove the file")
        return []
    if values.shape[:2] != size[::-1]:
        sides = f"{values.shape[1]}x{values.shape[0]}, where its picture has {size[0]}x{size[1]} pixels"
        problems.add("mask of another size", mask.path, f"{sides}: replace or remove the file")
        return []
    if values.ndim == 3:  # what is see-through does not matter
        channels = values[..., : 1 if grey_with_alpha else 3].astype(np.int64)
        shifts = 8 * np.arange(channels.shape[-1])
        values = (channels << shifts).sum(axis=-1) if mask.by_value else channels.max(axis=-1)
    if not mask.by_value:  # more than half, as edges may be smooth
        return encode_masks((values > values.max() / 2)[None]) if values.any() else []
    present = np.unique(values)
    encodings = []
    for value in present[present != 0]:
        encodings += encode_masks((values == value)[None])
    return encodings
