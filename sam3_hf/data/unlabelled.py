"""Pictures without labels: what a teacher is asked about, while a student learns its answers."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
from torch.utils.data import Dataset

from ..picture_files import find_pictures
from .checks import DatasetError, Problems, check_dataset
from .decoding import decode_images
from .images import open_image, upright_size
from .loading import is_picture_source, load_with_datasets
from .rows import RawSplit, build_dataset
from .sampling import PromptSampling, image_rng
from .scenes import draw_tile, tile_pixels
from .torch_dataset import Sample
from .transforms import Augmentation

logger = logging.getLogger(__name__)


def load_pictures(
    data: str | Path,
    concepts: Sequence[str],
    check_images: bool = True,
    opened: datasets.Dataset | datasets.DatasetDict | None = None,
) -> datasets.Dataset:
    """
    Reads pictures into rows without objects.

    Args:
        data: a folder (searched to any depth), a picture, a glob pattern, or a folder written by `datasets` or a
            repository of the Hub with a column `image`, of which all splits are taken.
        concepts: what the teacher will be asked for; the concepts of the rows.
        check_images: whether every picture is decoded once, as by `load_dataset_splits`.
        opened: what `loading.open_dataset` made of `data`, if that was done already.

    Raises:
        FileNotFoundError: there is no such file or folder.
        DatasetError: there are no pictures, or some cannot be read; the message lists the first ten.
    """
    problems = Problems()
    if opened is None and is_picture_source(str(data)):
        split = _from_files(data, problems)
    else:
        split = _from_datasets(str(data), load_with_datasets(str(data)) if opened is None else opened, problems)
    if not split.rows:
        problems.raise_if_any()
        raise DatasetError(f"{data} holds no pictures")
    check_dataset([split], problems)
    if check_images:
        decode_images(split, problems)
    problems.raise_if_any()
    logger.info("%s: %d pictures, without labels", data, len(split.rows))
    return build_dataset(split, list(concepts), {})


def _from_files(data: str | Path, problems: Problems) -> RawSplit:
    try:
        pictures = find_pictures([str(data)], exclude=Path(os.devnull))
    except ValueError as error:
        raise DatasetError(str(error)) from error
    rows, images = [], []
    for number, (path, name) in enumerate(pictures):
        _add({"path": str(path), "bytes": None}, number, name, rows, images, problems)
    return RawSplit("train", str(data), rows, images, [])


def _from_datasets(data: str, loaded: datasets.Dataset | datasets.DatasetDict, problems: Problems) -> RawSplit:
    splits = [loaded] if isinstance(loaded, datasets.Dataset) else list(loaded.values())
    rows, images = [], []
    for split in splits:
        if not isinstance(split.features.get("image"), datasets.Image):
            raise DatasetError(f"{data} lacks a column 'image' of pictures; it has {', '.join(split.features)}")
        column = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        for entry in column["image"]:
            name = entry and entry["path"] or f"{data}, picture {len(rows)}"
            _add(entry or {"path": None, "bytes": b""}, len(rows), name, rows, images, problems)
    return RawSplit("train", data, rows, images, [])


def _add(source: dict, number: int, name: str, rows: list[dict], images: list[dict], problems: Problems) -> None:
    try:
        with open_image(source) as image:
            width, height = upright_size(image)
    except Exception as error:  # Pillow raises a dozen kinds for damaged headers
        problems.add("unreadable image", name, f"{error}; replace or remove the file")
        return
    rows.append({"image_id": number, "file_name": name, "width": width, "height": height, "objects": []})
    images.append(source)


class UnlabelledDataset(Dataset):
    """
    Augmented pictures without prompts, for an objective that chooses them itself. An item depends on (seed, epoch,
    index) alone, as those of `TrainDataset`, and says in `key` which it is.

    Args:
        rows: of `load_pictures`, or of any split, whose objects are not looked at.
        concepts: what the teacher may be asked for.
        image_size: side of the model's square input in pixels.
        sampling: how many prompts are drawn, and which share of them is absent.
        augmentation: how pictures are varied, but for a mosaic: an objective chooses prompts picture by picture.
        seed: 0 or more.
    """

    has_masks = False

    def __init__(
        self,
        rows: datasets.Dataset,
        concepts: Sequence[str],
        image_size: int,
        sampling: PromptSampling | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.rows, self.concepts, self.image_size, self.seed = rows, list(concepts), image_size, seed
        self.sampling, self.augmentation = sampling or PromptSampling(), augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng, row = image_rng(self.seed, epoch, index), self.rows[index]
        tile = draw_tile(row, self.image_size, self.augmentation, rng)
        pixels = tile_pixels([tile], self.augmentation, rng)
        return Sample(pixel_values=pixels, phrases=[], labels=[], boxes=[], image_id=row["image_id"], key=key)
