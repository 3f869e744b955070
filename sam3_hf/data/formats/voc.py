"""
Pascal VOC: an XML file for each picture, with `object/bndbox` in pixels; `Annotations/` beside `JPEGImages/` with the
splits in `ImageSets/Main/`, or the files beside the pictures, in folders for each split.

VOC itself counts pixels from 1, and a box holds its last one. Most tools write corners, counted from 0. The numbers
are VOC's own if all of a split are whole and the smallest is 1.
"""

import logging
import math
from pathlib import Path
from xml.etree import ElementTree

from ..checks import Problems, short
from ..coco import SPLIT_NAMES
from ..rows import RawSplit
from .pictures import Folders, SplitBuilder, files_in, make_object, pair_labels, split_folders

logger = logging.getLogger(__name__)

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(path: Path) -> dict[str, Folders] | None:
    """{split: where it is} of a folder with VOC's XML files; None of anything else."""
    if not path.is_dir():
        return None
    parts = split_folders(path, ("annotations", "labels", "xml", "xmls"))
    if not any(_is_annotation(file) for part in parts.values() for file in _first_of(part.labels)):
        return None
    lists = {}
    for alias, name in SPLIT_NAMES.items():
        file = path / "ImageSets" / "Main" / f"{alias}.txt"
        if file.is_file():
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            lists[name] = frozenset(line.split()[0] for line in lines if line.strip())
    if lists and parts.keys() == {"train"}:
        parts = {name: parts["train"]._replace(only=only) for name, only in lists.items()}
    return parts


def _first_of(folder: Path) -> list[Path]:
    return [file for file, _ in zip(files_in(folder, ".xml"), range(1), strict=False)]


def _is_annotation(file: Path) -> bool:
    try:
        return b"<annotation" in file.read_bytes()
    except OSError:
        return False


def read(name: str, folders: Folders, problems: Problems) -> RawSplit:
    """
    Reads one split.

    Args:
        problems: files that are no XML, objects without name or box, numbers that are none, labels without a picture
            are added, with file and object.
    """
    builder = SplitBuilder(name, str(folders.labels), problems)

    def content_of(file: Path):
        root = _parse(file, problems)
        return None if root is None else (_stated_size(root), _objects(root, file, problems))

    builder.add_all(pair_labels(name, folders, ".xml", problems), content_of)
    _count_from_0(builder)
    return builder.build()


def _parse(file: Path, problems: Problems) -> ElementTree.Element | None:
    try:
        content = file.read_bytes()
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            problems.add("malformed XML", file, "it declares a document type, which VOC has not: remove that")
            return None
        root = ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError) as error:  # of an encoding that is not known
        problems.add("malformed XML", file, f"{error}: correct or remove the file")
        return None
    if root.tag != "annotation":
        problems.add("malformed XML", file, f"the outermost element is '{root.tag}', where VOC has 'annotation'")
        return None
    return root


def _stated_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height; None where they are left out or 0, as some tools do."""
    sides = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    if not all(side.isdecimal() and 0 < int(side) < 2**20 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _objects(root: ElementTree.Element, file: Path, problems: Problems) -> list[dict]:
    objects = []
    for number, element in enumerate(root.findall("object"), start=1):
        name = element.findtext("name", "").strip()
        if not name:
            problems.add("object without a name", file, f"object {number} lacks 'name': add it, or remove the object")
            continue
        box = element.find("bndbox")
        corners = None if box is None else _numbers([box.findtext(corner) for corner in CORNERS])
        if corners is None:
            remedy = f"give it {', '.join(CORNERS)} as numbers, or remove the object"
            problems.add("object without a box", file, f"object {number} ({short(name)}) lacks 'bndbox': {remedy}")
            continue
        polygon = element.find("polygon")
        points = None if polygon is None else _points(polygon)
        if polygon is not None and points is None:
            detail = f"object {number} ({short(name)}): its polygon is not x1, y1, x2, y2, ... of three points or more"
            problems.add("invalid polygon", file, f"{detail}: correct or remove the polygon")
            continue
        ignored = element.findtext("difficult", "0").strip() == "1"
        objects.append(make_object(number, name, corners, points and [points], ignored))
    return objects


def _points(polygon: ElementTree.Element) -> list[float] | None:
    """[x, y, x, y, ...] of the elements x1, y1, x2, y2, ..."""
    count = len(polygon) // 2
    names = [f"{axis}{index}" for index in range(1, count + 1) for axis in "xy"]
    return _numbers([polygon.findtext(name) for name in names]) if count >= 3 else None


def _numbers(texts: list[str | None]) -> list[float] | None:
    try:
        values = [float(text) for text in texts]
    except (TypeError, ValueError):
        return None
    return [_plain(value) for value in values] if all(map(math.isfinite, values)) else None


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _count_from_0(builder: SplitBuilder) -> None:
    """Makes [x, y, width, height] of corners, in the module's sense of them."""
    objects = [item for row in builder.rows for item in row["objects"]]
    numbers = [value for item in objects for value in item["bbox"]]
    first = 1 if numbers and all(type(value) is int for value in numbers) and min(numbers) == 1 else 0
    if first:
        logger.info("%s: pixels are counted from 1, as in VOC itself", builder.source)
    for item in objects:
        left, top, right, bottom = item["bbox"]
        item["bbox"] = [left - first, top - first, right - left + first, bottom - top + first]
        if item["segmentation"]:
            item["segmentation"] = [[value - first for value in polygon] for polygon in item["segmentation"]]
