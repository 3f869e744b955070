"""
Datasets as annotation tools export them: YOLO, Pascal VOC, LabelMe, pictures with folders of masks.

They are read into the same `RawSplit` as COCO, so that checks, prompts and batches are the same; nothing is written.
The readers are ours: supervision's fill each polygon into a mask of the whole picture at rounded corners, take a class
beyond the names and an odd number of coordinates without a word, and do not say which line is wrong.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..checks import Problems
from ..rows import RawSplit
from . import labelme, mask_folders, voc, yolo

READERS = {"YOLO": yolo, "masks": mask_folders, "Pascal VOC": voc, "LabelMe": labelme}  # in the order of the search


class Found(NamedTuple):
    """What a folder holds: the name of its format, and what reads each of its splits."""

    format: str
    splits: dict[str, Callable[[Problems], RawSplit]]


def find_format(data: str | Path) -> Found | None:
    """
    The format of a folder, or of a `data.yaml`; None if it is in none of these.

    Raises:
        DatasetError: two folders are the same split (valid/ and val/), or a `data.yaml` cannot be used.
    """
    path = Path(data)
    for name, reader in READERS.items():
        parts = reader.find(path)
        if parts:
            return Found(name, {split: partial(reader.read, split, part) for split, part in parts.items()})
    return None
