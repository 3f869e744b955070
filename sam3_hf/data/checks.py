"""What must hold before a dataset is trained on: fatal problems stop with one message, harmless ones are repaired.

Images are checked by their headers and file ends, in threads; only a file without the end marker of its format, or of
a format without one, is decoded. `sam3_hf.data.decoding` decodes them all.
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

CORNER_TOLERANCE = 1.0  # pixels between a mask and its box as two corners
EDGE_TOLERANCE = 2.0  # pixels over the edge that rounding in annotation tools explains; more is a mistake
LEAST_OVERLAP = 0.1  # IoU of a box and that of its mask: amodal boxes, the loosest there are, stay well above
LISTED = 10  # problems that the message spells out
LONGEST_DETAIL = 400  # characters
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
            where = f"{file}" if annotation_id is None else f"{file}, annotation {short(annotation_id)}"
            self.listed.append(one_line(f"[{kind}] {where}: {detail}"))

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
    `area` (computed); `iscrowd` as text ("0"). Uncompressed run-length encodings become compressed ones.

    Args:
        splits: what the readers return; their rows are changed.
        problems: those already found while reading.

    Raises:
        DatasetError: images missing, unreadable or of another size than stated; boxes out of the image, of negative or
            no area, in 0..1, or malformed; invalid polygons or run-length encodings; masks that are empty or far from
            their box; an `iscrowd` that is neither 0 nor 1; and whatever `problems` holds.
    """
    splits, problems = list(splits), problems or Problems()
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
    for split in splits:
        compute_missing_areas(split)  # only now: what an area takes depends on sizes that are checked


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
    well_formed = _are_numbers(box) and len(box) == 4
    return well_formed and item["segmentation"] is None and min(box[2:]) == 0


def check_object(item: dict, row: dict, problems: Problems, repairs: Counter) -> None:
    """Checks one object and clips it to the image.

    Args:
        item: {"id", "bbox" xywh in pixels, "segmentation", "area", ...}; changed in place.
        row: the image's row, for its `file_name`, or `label_file` if it has its own, `width` and `height`.
        problems, repairs: what is found is added to them.
    """
    width, height = row["width"], row["height"]
    found = check_crowd_flag(item, repairs) or check_box(item, width, height, repairs)
    if item["segmentation"] is not None:
        wrong = check_segmentation(item, width, height, repairs)
        found = wrong or found or check_mask(item)
    if found:
        problems.add(found[0], row.get("label_file", row["file_name"]), found[1], item["id"])


def check_crowd_flag(item: dict, repairs: Counter) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with `item["iscrowd"]`; None if nothing is. Makes a bool of it."""
    flag = item["iscrowd"]
    if flag in ("0", "1"):  # `bool("0")` is true
        flag = int(flag)
        repairs["texts for 'iscrowd' read as numbers"] += 1
    if flag is not None and (not isinstance(flag, (int, float)) or flag not in (0, 1)):
        return "malformed iscrowd", f"{short(flag)}: write 0 for an object, 1 for a region of many"
    item["iscrowd"] = bool(flag)
    return None


def check_box(item: dict, width: int, height: int, repairs: Counter) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with `item["bbox"]`; None if nothing is. Clips the box to the image."""
    box = item["bbox"]
    if not (_are_numbers(box) and len(box) == 4):
        return "malformed box", f"bbox {short(box)} is not [x, y, width, height] in pixels"
    x, y, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        return "box of no area", f"bbox {short(box)} ([x, y, width, height])"
    if _is_relative(box, item["segmentation"]) and min(width, height) > 1:
        remedy = f"multiply x and width by {width}, y and height by {height}"
        return "box in 0..1", f"bbox {short(box)}, where pixels are meant: {remedy}"
    over = max(-x, -y, x + box_width - width, y + box_height - height)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)
    if over > EDGE_TOLERANCE or right <= left or bottom <= top:
        hint = _corners_hint(box) if box[2] <= width + EDGE_TOLERANCE and box[3] <= height + EDGE_TOLERANCE else ""
        return "box out of the image", f"bbox {short(box)} ([x, y, width, height]), image {width}x{height}{hint}"
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
        return "invalid segmentation", f"{short(segmentation)} is neither a list of polygons nor run-length encoded"
    over = 0.0
    for polygon in segmentation:
        if not _are_numbers(polygon):
            return "invalid polygon", f"{short(polygon)} is not a list of finite numbers"
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
    if segmentation["size"] != [height, width]:
        detail = f"size {short(segmentation['size'])} is not [{height}, {width}] of the image"
        return "invalid run-length encoding", detail
    try:
        item["segmentation"] = rle.compress(segmentation)
    except ValueError as error:
        return "invalid run-length encoding", str(error)
    return None


def check_mask(item: dict) -> tuple[str, str] | None:
    """(kind, detail) if a valid segmentation has no pixels or lies elsewhere than its valid box; None otherwise."""
    if item["iscrowd"]:
        return None  # never trained on
    box, extent = item["bbox"], mask_extent(item["segmentation"], min(item["bbox"][2:]))
    if extent is None:
        return "empty mask", "the segmentation covers nothing: outline the object, or leave its segmentation out"
    edges = [(low, low + side) for low, side in zip(box[:2], box[2:], strict=True)]
    own = [(low, low + side) for low, side in zip(extent[:2], extent[2:], strict=True)]
    pairs = list(zip(edges, own, strict=True))
    if all(
        abs(low - first) <= EDGE_TOLERANCE and abs(high - last) <= EDGE_TOLERANCE
        for (low, high), (first, last) in pairs
    ):
        return None  # small objects, of which one pixel more or less is much
    if all(
        abs(corner - edge) <= CORNER_TOLERANCE
        for corner, edge in zip(box, [*map(min, own), *map(max, own)], strict=True)
    ):
        return "box as two corners", f"bbox {short(box)} and its segmentation fit{_corners_hint(box)}"
    overlap = math.prod(max(min(high, last) - max(low, first), 0) for (low, high), (first, last) in pairs)
    union = math.prod(box[2:]) + math.prod(extent[2:]) - overlap
    if overlap < LEAST_OVERLAP * union:
        detail = f"bbox {short(box)}, that of the segmentation is {short(extent)} ([x, y, width, height])"
        return "mask far from its box", f"{detail}: correct the one that is wrong"
    return None


def mask_extent(segmentation: list | dict, thickness: float) -> list[float] | None:
    """
    The box [x, y, width, height] around a valid segmentation; None if it covers nothing. Polygons without area stand
    for objects thinner than a pixel if the box is so thin.

    Args:
        thickness: smaller side of the object's box, in pixels.
    """
    if isinstance(segmentation, dict):
        extent = rle.extent(segmentation)
        return extent if min(extent[2:]) > 0 else None
    if thickness > EDGE_TOLERANCE and not any(_polygon_area(polygon) for polygon in segmentation):
        return None
    left, top = (min(min(polygon[axis::2]) for polygon in segmentation) for axis in (0, 1))
    right, bottom = (max(max(polygon[axis::2]) for polygon in segmentation) for axis in (0, 1))
    return [left, top, right - left, bottom - top]


def compute_missing_areas(split: RawSplit) -> None:
    """Gives the objects of a sound split that lack an `area` that of their mask, or box; counts them in the log."""
    count = 0
    for row in split.rows:
        for item in row["objects"]:
            if not _are_numbers([item["area"]]):
                item["area"] = _area(item, row["width"], row["height"])
                count += "label_file" not in row  # formats of their own state none
            item["area"] = float(item["area"])  # an integer may have more than 64 bits
    if count:
        logger.warning("%s: %d missing areas computed", split.source, count)


def short(value) -> str:
    """A value of an annotation file as text of at most 60 characters in one line."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # deeper than JSON can be written, or a number of thousands of digits
        text = f"{type(value).__name__} that is too deep or long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: str) -> str:
    """Text with all that is not printable, such as line breaks and halves of characters, as escapes; cut if long."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= LONGEST_DETAIL else text[: LONGEST_DETAIL - 3] + "..."


def _area(item: dict, width: int, height: int) -> float:
    """Square pixels; of the box where there is no segmentation."""
    if item["segmentation"] is None:
        return float(item["bbox"][2] * item["bbox"][3])
    return float(rle.mask_areas([rle.encode_segmentation(item["segmentation"], height, width)])[0])


def _corners_hint(box: list) -> str:
    """What to add to a message where [x1, y1, x2, y2] may have been written; empty if that cannot be."""
    left, top, right, bottom = box
    if left < 0 or top < 0 or right <= left or bottom <= top:
        return ""
    return f"; likely it is [x1, y1, x2, y2]: then write {short([left, top, right - left, bottom - top])} in all boxes"


def _polygon_area(polygon: list) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return sum(
        x * below - y * right for x, y, right, below in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    )


def _is_relative(box: list, segmentation) -> bool:
    """Whether a box is meant in shares of the image: within 0..1, and not the pixel at the corner."""
    return max(box) <= 1 and (segmentation is None or any(value != int(value) for value in box))


def _are_numbers(values) -> bool:
    """Whether this is a list of finite numbers."""
    if not (isinstance(values, list) and all(type(value) in (int, float) for value in values)):
        return False
    try:
        return math.isfinite(sum(values))  # one number that is not makes the sum so
    except OverflowError:  # hundreds of digits
        return False
