"""LabelMe: a JSON file for each picture, with `shapes` in pixels."""

import json
import logging
import math
from collections import Counter
from pathlib import Path

from ..checks import Problems, short
from ..rows import RawSplit
from .pictures import Folders, SplitBuilder, box_of, files_in, make_object, pair_labels, split_folders

logger = logging.getLogger(__name__)

CIRCLE_CORNERS = 64
NO_AREA = ("point", "points", "line", "linestrip")


def find(path: Path) -> dict[str, Folders] | None:
    """{split: where it is} of a folder with LabelMe's JSON files; None of anything else."""
    if not path.is_dir():
        return None
    parts = split_folders(path, ("annotations", "labels", "json", "jsons"))
    for part in parts.values():
        for file, _ in zip(files_in(part.labels, ".json"), range(1), strict=False):
            try:
                if '"shapes"' in file.read_text(encoding="utf-8-sig", errors="replace"):
                    return parts
            except OSError:
                pass
    return None


def read(name: str, folders: Folders, problems: Problems) -> RawSplit:
    """
    Reads one split. Points and lines, which cover nothing, are left out and counted in the log.

    Args:
        problems: files that are no JSON of LabelMe, shapes without label or of unknown kind, points that are no pairs
            of numbers, labels without a picture are added, with file and shape.
    """
    builder, left_out = SplitBuilder(name, str(folders.labels), problems), Counter()

    def content_of(file: Path):
        content = _load(file, problems)
        return content and (_stated_size(content), _objects(content["shapes"], file, problems, left_out))

    builder.add_all(pair_labels(name, folders, ".json", problems), content_of)
    for kind, count in sorted(left_out.items()):
        logger.warning("%s: %d shapes of kind '%s' left out, which cover no area", builder.source, count, kind)
    return builder.build()


def _load(file: Path, problems: Problems) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        problems.add("malformed JSON", file, f"{error}: correct or remove the file")
        return None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        problems.add("malformed JSON", file, "it lacks the list 'shapes' of LabelMe: correct or remove the file")
        return None
    return content


def _stated_size(content: dict) -> tuple[int, int] | None:
    sides = content.get("imageWidth"), content.get("imageHeight")
    return sides if all(type(side) is int and 0 < side < 2**20 for side in sides) else None


def _objects(shapes: list, file: Path, problems: Problems, left_out: Counter) -> list[dict]:
    objects, groups = [], {}
    for number, shape in enumerate(shapes, start=1):
        label, kind, points = _parts_of(shape)
        if not label:
            problems.add("shape without a label", file, f"shape {number} lacks 'label': add it, or remove the shape")
        elif kind in NO_AREA:
            left_out[kind] += 1
        elif kind not in ("polygon", "rectangle", "circle"):
            detail = f"shape {number}: 'shape_type' is {short(kind)}: make it a polygon, rectangle or circle"
            problems.add("unknown shape", file, detail)
        elif points is None or len(points) < (3 if kind == "polygon" else 2):
            detail = f"shape {number} ({kind}): 'points' is {short(shape.get('points'))}"
            remedy = "write [x, y] of each, of a polygon at least three, of others two"
            problems.add("malformed points", file, f"{detail}: {remedy}")
        else:
            item = _object(number, label, kind, points)
            group = shape.get("group_id")
            if group is not None and item["segmentation"] and (short(group), label) in groups:
                whole = groups[short(group), label]
                whole["segmentation"] += item["segmentation"]
                whole["bbox"] = box_of(whole["segmentation"])
                continue
            if group is not None and item["segmentation"]:
                groups[short(group), label] = item
            objects.append(item)
    return objects


def _parts_of(shape) -> tuple[str, str, list | None]:
    """Label, kind and points of a shape; "" and None in place of what is not right."""
    if not isinstance(shape, dict):
        return "", "", None
    label, points = shape.get("label"), shape.get("points")
    sound = isinstance(points, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and all(type(value) in (int, float) and math.isfinite(value) for value in point)
        for point in points
    )
    label = label.strip() if isinstance(label, str) else ""
    return label, shape.get("shape_type") or "polygon", points if sound else None


def _object(number: int, label: str, kind: str, points: list) -> dict:
    """An object of a polygon, of opposite corners, or of the centre of a circle and a point on it."""
    if kind == "rectangle":
        (left, right), (top, bottom) = (sorted(point[axis] for point in points[:2]) for axis in (0, 1))
        return make_object(number, label, [left, top, right - left, bottom - top])
    if kind == "circle":
        (x, y), radius = points[0], math.dist(points[0], points[1])
        angles = [2 * math.pi * index / CIRCLE_CORNERS for index in range(CIRCLE_CORNERS)]
        points = [[x + radius * math.cos(angle), y + radius * math.sin(angle)] for angle in angles]
    polygon = [value for point in points for value in point]
    return make_object(number, label, box_of([polygon]), [polygon])
