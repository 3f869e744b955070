"""Datasets of the Hub, or saved by `datasets`, whose rows hold an image and its `objects`.

`objects` is a list of dicts or a dict of lists with `bbox` ([x, y, width, height] in pixels, as in COCO) and
`category` (ClassLabel, text, or whole numbers that a category map names); optional are `segmentation`, `iscrowd`,
`area` and `id`. Beside it stand `image`, and optionally `image_id`, `width` and `height`.
"""

import json

import datasets

from .checks import DatasetError, Problems
from .images import open_image, upright_size
from .rows import RawSplit

LISTS = (datasets.List, datasets.LargeList)


def read_objects(name: str, dataset: datasets.Dataset, source: str, problems: Problems) -> RawSplit:
    """Reads one split.

    Args:
        name: split.
        dataset: with the columns of the module's text.
        source: repository or folder, for messages.
        problems: images whose size cannot be read, missing values and labels without a name are added; the images and
            objects concerned are missing from the result.

    Raises:
        DatasetError: a column or field is missing or of the wrong type.
    """
    label = _check_features(dataset.features, source)
    images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    rows, kept, names = [], [], list(label.names) if isinstance(label, datasets.ClassLabel) else []
    known = dict.fromkeys(names)
    for position, entry in enumerate(dataset.remove_columns(["image"]).with_format(None)):
        where = f"{source}, {name} row {position}"
        image = images[position]["image"]
        if image is None:
            problems.add("missing image", where, "column 'image' is empty")
            continue
        size = _image_size(entry, image, where, problems)
        if size is None:
            continue
        image_id = entry.get("image_id")
        row = {
            "image_id": image_id if isinstance(image_id, int) else position,
            "file_name": where,
            "width": size[0],
            "height": size[1],
            "objects": [],
        }
        for index, item in enumerate(_as_list_of_dicts(entry["objects"])):
            category, item_id = _category_name(item["category"], names), item.get("id")
            item_id = item_id if isinstance(item_id, int) else index
            if category is None:
                problems.add("object without a category", where, f"category is {item['category']}", item_id)
                continue
            known[category] = None
            row["objects"].append(_object(item, item_id, category))
        rows.append(row)
        kept.append(position)
    if len(kept) < len(images):
        images = images.select(kept)
    if len({row["image_id"] for row in rows}) < len(rows):
        problems.add("duplicate id in images", source, f"column image_id of split {name} repeats a value")
    numbered = not names and isinstance(label, datasets.Value) and label.dtype.startswith(("int", "uint"))
    names = names or sorted(known, key=int if numbered else None)
    return RawSplit(name, source, rows, images, names, numbered)


def _check_features(features: datasets.Features, source: str):
    """The feature of an object's category. Raises DatasetError if the columns are not those needed."""
    for column in ("image", "objects"):
        if column not in features:
            raise DatasetError(f"{source} lacks the column '{column}'; it has {', '.join(features)}")
    if not isinstance(features["image"], datasets.Image):
        raise DatasetError(f"{source}: column 'image' must be a datasets.Image, it is {features['image']}")
    objects = features["objects"]
    fields = objects.feature if isinstance(objects, LISTS) else objects
    for field in ("bbox", "category"):
        if not isinstance(fields, dict) or field not in fields:
            raise DatasetError(f"{source}: column 'objects' lacks the field '{field}'; it is {objects}")
    label = fields["category"]
    return label if isinstance(objects, LISTS) else getattr(label, "feature", label)


def _image_size(entry: dict, image: dict, where: str, problems: Problems) -> tuple[int, int] | None:
    if isinstance(entry.get("width"), int) and isinstance(entry.get("height"), int):
        return entry["width"], entry["height"]
    try:
        with open_image(image) as opened:
            return upright_size(opened)
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        problems.add("unreadable image", where, f"{error}")
        return None


def _as_list_of_dicts(objects) -> list[dict]:
    if isinstance(objects, list):
        return objects
    names = list(objects)
    return [dict(zip(names, values, strict=True)) for values in zip(*objects.values(), strict=True)]


def _category_name(value, names: list[str]) -> str | None:
    if isinstance(value, int) and names:
        return names[value] if 0 <= value < len(names) else None
    return None if value is None or not str(value).strip() else str(value).strip()


def _object(item: dict, item_id: int, category: str) -> dict:
    segmentation = item.get("segmentation") or None
    if isinstance(segmentation, str):
        try:
            segmentation = json.loads(segmentation) or None
        except (ValueError, RecursionError):
            pass  # the check that follows names it
    if isinstance(segmentation, dict) and all(value is None for value in segmentation.values()):
        segmentation = None  # how a struct feature may state that there is none
    return {
        "id": item_id,
        "category": category,
        "bbox": list(item["bbox"]) if item["bbox"] is not None else None,
        "area": item.get("area"),
        "iscrowd": item.get("iscrowd"),
        "segmentation": segmentation,
    }
