"""What a dataset is, before anything is trained on it: format, counts, sizes, faults, and pictures of it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .. import rle
from ..plain_text import aligned, plain
from ..visualization import contact_sheet, draw_instances, instance_colors
from .checks import DatasetError, Problems
from .concepts import check_common_concepts
from .held_out import hold_out
from .images import load_image
from .loading import format_of, prepare_splits, read_splits
from .rows import RawSplit

LONGEST_DRAWN = 1024  # pixels: larger pictures are thinned before they are drawn
MOST_PICTURES = 12


@dataclass
class Survey:
    """
    What is found in a dataset.

    Attributes:
        source: as it was given.
        format: "COCO", "YOLO", "Pascal VOC", "LabelMe", "masks" or "datasets".
        splits: as far as they could be read.
        fault: why training would refuse it; None if it would not.
        notes: what is worth knowing besides.
    """

    source: str
    format: str
    splits: list[RawSplit] = field(default_factory=list)
    fault: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(name for split in self.splits for name in split.category_names))


def survey(
    data: str | Path,
    image_folder: Path | None = None,
    category_map: Path | None = None,
    validation_split: float = 0.1,
) -> Survey:
    """
    Reads and checks a dataset as training does. Nothing is written into it.

    Args:
        data, image_folder, category_map: as of `load_dataset_splits`.
        validation_split: share that training would hold out where there is no validation split.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    problems, found = Problems(), Survey(str(data), "unknown")
    try:
        found.format = format_of(data)
        found.splits = read_splits(data, image_folder, problems)
        ready = prepare_splits(found.splits, category_map, ("train", "validation"), problems)
        if "train" not in ready:
            raise DatasetError(f"{data} has no train split, only {', '.join(ready)}: name a folder train/")
        if "validation" in ready:
            check_common_concepts(ready["train"], ready["validation"], str(data))
        else:
            _, held_out = hold_out(ready["train"], validation_split, seed=0)
            text = f"no validation split: training holds {len(held_out)} of {len(ready['train'])} pictures out"
            found.notes.append(f"{text} (--validation_split {validation_split:g})")
    except DatasetError as error:
        found.fault = str(error)
    return found


def as_text(found: Survey) -> str:
    """The survey as lines: splits, a table of classes, sizes, notes and faults."""
    lines = [f"{found.source}: {found.format}, {len(found.classes)} classes"]
    if found.splits:
        lines += ["", *aligned(_split_rows(found.splits)), "", *aligned(_class_rows(found))]
    lines += ["", *found.notes] if found.notes else []
    verdict = f"training would refuse it: {found.fault}" if found.fault else "no faults: training would take it"
    return "\n".join([*lines, "", verdict])


def _split_rows(splits: list[RawSplit]) -> list[list[str]]:
    heading = ["split", "pictures", "of nothing", "objects", "with mask", "a picture", "picture sizes", "object sides"]
    rows = [heading]
    for split in splits:
        counts = [sum(not _is_ignored(item) for item in row["objects"]) for row in split.rows]
        objects = [item for row in split.rows for item in row["objects"] if not _is_ignored(item)]
        masks = sum(item["segmentation"] is not None for item in objects)
        sizes = [(row["width"], row["height"]) for row in split.rows]
        sides = [math.sqrt(box[2] * box[3]) for item in objects if (box := _box(item)) is not None]
        figures = [len(split.rows), counts.count(0), len(objects), masks]
        rows.append([split.name, *map(str, figures), _spread(counts), _sizes(sizes), _spread(sides) + " px"])
    return rows


def _spread(values: list) -> str:
    """Least, median and most."""
    if not values:
        return "-"
    return f"{min(values):.0f} / {np.median(values):.0f} / {max(values):.0f}"


def _sizes(sizes: list[tuple[int, int]]) -> str:
    """The one size, or the smallest and the largest."""
    if not sizes:
        return "-"
    ends = dict.fromkeys((min(sizes, key=math.prod), max(sizes, key=math.prod)))
    return " to ".join(f"{width}x{height}" for width, height in ends)


def _class_rows(found: Survey) -> list[list[str]]:
    """Objects of each class in each split, and the pictures that show them."""
    rows = [["objects (pictures)", *(split.name for split in found.splits)]]
    counts = []
    for split in found.splits:
        shown = [Counter(item["category"] for item in row["objects"] if not _is_ignored(item)) for row in split.rows]
        objects = sum(shown, Counter())
        pictures = Counter(name for count in shown for name in count)
        counts.append({name: f"{objects[name]} ({pictures[name]})" for name in found.classes})
    return rows + [[plain(name), *(count[name] for count in counts)] for name in found.classes]


def _is_ignored(item: dict) -> bool:
    """Whether this is a region of many objects, also before its flag is checked."""
    return item["iscrowd"] in (1, "1", True)


def _box(item: dict) -> list | None:
    """[x, y, width, height], unless a fault is in it."""
    box = item["bbox"]
    sound = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    return box if sound and all(0 <= side < 2**31 for side in box) else None


def draw_survey(found: Survey, count: int = MOST_PICTURES) -> Image.Image:
    """
    A contact sheet of up to `count` pictures with their objects, a colour for each class: pictures that show rare
    classes first, then others at even distances. Pictures that cannot be read are left out.

    Raises:
        ValueError: there is no picture to show.
    """
    colours = dict(zip(found.classes, instance_colors(len(found.classes)), strict=True))
    pictures, titles = [], []
    for split, position in _choose(found.splits, count):
        row = split.rows[position]
        try:
            pictures.append(_draw(split.image(position), row, colours))
        except (OSError, ValueError):
            continue
        titles.append(f"{split.name}: {row['file_name']} ({len(row['objects'])})")
    if not pictures:
        raise ValueError(f"{found.source}: no picture can be shown on a contact sheet")
    return contact_sheet(pictures, titles, colours)


def _choose(splits: list[RawSplit], count: int) -> list[tuple[RawSplit, int]]:
    """Which pictures are shown, in the order of the dataset: each class once as far as there is room, and others."""
    places = [(split, position) for split in splits for position in range(len(split.rows))]
    shown = [{item["category"] for item in split.rows[position]["objects"]} for split, position in places]
    frequency = Counter(name for names in shown for name in names)
    chosen, seen = set(), set()
    for name, _ in sorted(frequency.items(), key=lambda entry: entry[1]):
        if name not in seen and len(chosen) < count:
            index = max((index for index, names in enumerate(shown) if name in names), key=lambda i: len(shown[i]))
            chosen.add(index)
            seen |= shown[index]
    others = [index for index in range(len(places)) if index not in chosen]
    room = min(count - len(chosen), len(others))
    chosen |= {others[round(place)] for place in np.linspace(0, len(others) - 1, room)}
    return [places[index] for index in sorted(chosen)]


def _draw(source: dict, row: dict, colours: Mapping[str, tuple]) -> Image.Image:
    """One picture with its objects; of a large one, every so manieth pixel."""
    pixels, _ = load_image(source, row["width"], row["height"])
    step = -(-max(pixels.shape[1:]) // LONGEST_DRAWN)
    image = pixels[:, ::step, ::step].permute(1, 2, 0).numpy()  # (height, width, 3)
    objects = [item for item in row["objects"] if _box(item) is not None]
    boxes = [[x, y, x + width, y + height] for x, y, width, height in map(_box, objects)]
    masks = np.zeros((len(objects), *image.shape[:2]), bool)
    for mask, item in zip(masks, objects, strict=True):
        if item["segmentation"] is not None:
            encoding = rle.encode_segmentation(item["segmentation"], row["height"], row["width"])
            mask[:] = rle.decode_mask(encoding)[::step, ::step]
    return draw_instances(
        image,
        np.reshape(boxes, (-1, 4)) / step,
        masks,
        [item["category"] for item in objects],
        colors=[colours[item["category"]] for item in objects],
        tag_labels=False,
    )
