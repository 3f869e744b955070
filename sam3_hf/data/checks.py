"""What must hold before a dataset is trained on: fatal problems stop with one message, harmless ones are repaired.

Images are checked by their headers and file ends, in threads; only a file without the end marker of its format, or of
a format without one, is decoded.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .. import rle
from .images import image_fault
from .rows import RawSplit

logger = logging.getLogger(__name__)

EDGE_TOLERANCE = 2.0  # pixels over the edge that rounding in annotation tools explains; more is a mistake
LISTED = 10  # problems that the message spells out
CHECK_THREADS = 16


class DatasetError(ValueError):
    """The dataset cannot be used as it is.

    Attributes:
        counts: {kind of problem: how many}.
    """

    def __init__(self, message: str, counts: dict[str, int] | None = None):
        super().__init__(message)
        self.counts = dict(counts or {})


class Problems:
    """Collects fatal problems, to report them all at once."""

    def __init__(self):
        self.counts = Counter()
        self.listed = []

    def add(self, kind: str, file, detail: str, annotation_id=None) -> None:
        """
        Args:
            kind: what is wrong, in a few words; problems are counted by it.
            file: annotation or image file in which it is.
            detail: the offending value.
            annotation_id: id of the annotation, if it is in one.
        """
        self.counts[kind] += 1
        if len(self.listed) < LISTED:
            where = f"{file}" if annotation_id is None else f"{file}, annotation {annotation_id}"
            self.listed.append(f"[{kind}] {where}: {detail}")

    def raise_if_any(self) -> None:
        """Raises DatasetError with the total per kind and the first ten problems."""
        if not self.counts:
            return
        total = sum(self.counts.values())
        lines = [f"{total} problem{'s' if total > 1 else ''} to correct in the dataset:"]
        lines += [f"  {kind}: {count}" for kind, count in self.counts.most_common()]
        lines += [f"first {len(self.listed)}:" if total > len(self.listed) else "in detail:"]
        lines += [f"  {text}" for text in self.listed]
        raise DatasetError("\n".join(lines), self.counts)


def check_dataset(splits: Iterable[RawSplit], problems: Problems | None = None) -> None:
    """Checks images, boxes and segmentations of all splits, and repairs what is harmless in place.

    Repaired and counted in the log: boxes and polygons up to 2 pixels over the edge of the image (clipped); boxes 0
    pixels wide or high without a segmentation, the trace of a stray click (left out, the first ten named); missing
    `area` (computed). Uncompressed run-length encodings become compressed ones.

    Args:
        splits: what the readers return; their rows are changed.
        problems: those already found while reading.

    Raises:
        DatasetError: images missing, unreadable or of another size than stated; boxes out of the image, of negative or
            no area, or malformed; invalid polygons or run-length encodings; and whatever `problems` holds.
    """
    problems = problems or Problems()
    for split in splits:
        check_images(split, problems)
        repairs = Counter()
        remove_stray_clicks(split)
        for row in split.rows:
            for item in row["objects"]:
                check_object(item, row, problems, repairs)
        for what, count in sorted(repairs.items()):
            logger.warning("%s: %d %s", split.source, count, what)
    problems.raise_if_any()


def check_images(split: RawSplit, problems: Problems) -> None:
    """Adds a problem for each image that is missing, unreadable or not of the stated size."""

    def fault(position: int):
        row = split.rows[position]
        return image_fault(split.image(position), row["width"], row["height"])

    with ThreadPoolExecutor(min(CHECK_THREADS, 4 * (os.cpu_count() or 1))) as pool:
        for row, found in zip(split.rows, pool.map(fault, range(len(split.rows))), strict=True):
            if found:
                problems.add(found[0], row["file_name"], found[1])


def remove_stray_clicks(split: RawSplit) -> None:
    """Leaves out objects whose box is 0 pixels wide or high and that have no segmentation; names them in the log."""
    removed = []
    for row in split.rows:
        stray = [item for item in row["objects"] if _is_stray_click(item)]
        if stray:
            row["objects"] = [item for item in row["objects"] if not _is_stray_click(item)]
            removed += [f"{row['file_name']}, annotation {item['id']}" for item in stray]
    if removed:
        listed = "; ".join(removed[:LISTED])
        text = "%s: %d boxes 0 pixels wide or high left out; first %d: %s"
        logger.warning(text, split.source, len(removed), min(len(removed), LISTED), listed)


def _is_stray_click(item: dict) -> bool:
    box = item["bbox"]
    well_formed = _are_finite(box) and len(box) == 4
    return well_formed and item["segmentation"] is None and min(box[2:]) == 0


def check_object(item: dict, row: dict, problems: Problems, repairs: Counter) -> None:
    """Checks one object and clips it to the image.

    Args:
        item: {"id", "bbox" xywh in pixels, "segmentation", "area", ...}; changed in place.
        row: the image's row, for its `file_name`, `width` and `height`.
        problems, repairs: what is found is added to them.
    """
    width, height = row["width"], row["height"]
    found = check_box(item, width, height, repairs)
    if item["segmentation"] is not None:
        found = check_segmentation(item, width, height, repairs) or found
    if found:
        problems.add(found[0], row["file_name"], found[1], item["id"])
    elif not _is_finite(item["area"]):
        item["area"] = _area(item, width, height)
        repairs["missing areas computed"] += 1


def check_box(item: dict, width: int, height: int, repairs: Counter) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with `item["bbox"]`; None if nothing is. Clips the box to the image."""
    box = item["bbox"]
    if not (_are_finite(box) and len(box) == 4):
        return "malformed box", f"bbox {_short(box)} is not [x, y, width, height] in pixels"
    x, y, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        return "box of no area", f"bbox {box} ([x, y, width, height])"
    over = max(-x, -y, x + box_width - width, y + box_height - height)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)
    if over > EDGE_TOLERANCE or right <= left or bottom <= top:
        return "box out of the image", f"bbox {box} ([x, y, width, height]), image {width}x{height}"
    if over > 0:
        item["bbox"] = [left, top, right - left, bottom - top]
        repairs["boxes over the edge of the image clipped"] += 1
    return None


def check_segmentation(item: dict, width: int, height: int, repairs: Counter) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with `item["segmentation"]`; None if nothing is. Clips polygons."""
    segmentation = item["segmentation"]
    if isinstance(segmentation, dict):
        return check_rle(item, width, height)
    if not isinstance(segmentation, list):
        return "invalid segmentation", f"{_short(segmentation)} is neither a list of polygons nor run-length encoded"
    over = 0.0
    for polygon in segmentation:
        if not _are_finite(polygon):
            return "invalid polygon", f"{_short(polygon)} is not a list of finite numbers"
        if len(polygon) % 2:
            return "invalid polygon", f"{len(polygon)} numbers, an odd count; x and y must alternate"
        if len(polygon) < 6:
            return "invalid polygon", f"{len(polygon) // 2} points; an area needs three"
        xs, ys = polygon[::2], polygon[1::2]
        over = max(over, -min(xs), -min(ys), max(xs) - width, max(ys) - height)
    if over > EDGE_TOLERANCE:
        return "polygon out of the image", f"{over:g} pixels over the edge, image {width}x{height}"
    if over > 0:
        limits = (width, height)
        item["segmentation"] = [
            [min(max(value, 0), limits[index % 2]) for index, value in enumerate(polygon)] for polygon in segmentation
        ]
        repairs["polygons over the edge of the image clipped"] += 1
    return None


def check_rle(item: dict, width: int, height: int) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with a run-length encoding; None if nothing is. Compresses it."""
    segmentation = item["segmentation"]
    for field in ("size", "counts"):
        if segmentation.get(field) is None:
            return "invalid run-length encoding", f"field '{field}' is missing"
    if list(segmentation["size"]) != [height, width]:
        return "invalid run-length encoding", f"size {segmentation['size']} is not [{height}, {width}] of the image"
    try:
        item["segmentation"] = rle.compress(segmentation)
    except ValueError as error:
        return "invalid run-length encoding", str(error)
    return None


def _area(item: dict, width: int, height: int) -> float:
    """Square pixels; of the box where there is no segmentation."""
    if item["segmentation"] is None:
        return float(item["bbox"][2] * item["bbox"][3])
    return float(rle.mask_areas([rle.encode_segmentation(item["segmentation"], height, width)])[0])


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_finite(values) -> bool:
    try:
        return isinstance(values, list) and math.isfinite(sum(values))  # one number that is not makes the sum so
    except TypeError:
        return False


def _short(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
