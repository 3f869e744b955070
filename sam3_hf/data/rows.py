"""The one row schema that every source is brought into.

    image: {"path", "bytes"} (not decoded)        file_name: str, for messages
    image_id: int                                 width, height: int, pixels
    objects: list of
        id: int                                   category: int, position in `concept_names`
        bbox: [x, y, width, height] in pixels     area: float, square pixels
        iscrowd: bool                             segmentation: JSON text, "" without one

Segmentations stay as compact as they came (polygons, or compressed run-length encoding); workers decode them.
"""

import json
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as compute
from datasets import ClassLabel, Features, Image, List, Value


@dataclass
class RawSplit:
    """One split as a reader returns it, before checks and before categories are unified across splits.

    Attributes:
        name: "train", "validation" or "test".
        source: annotation file or repository, for messages.
        rows: dicts with `image_id`, `file_name`, `width`, `height` and `objects`, whose `category` is a name, whose
            `segmentation` is a list, dict or None, and whose `area` and `iscrowd` are as they came.
        images: {"path", "bytes"} of each row: a list, or a dataset with an undecoded `image` column.
        category_names: in the order of the source.
        numbered: the names are bare numbers, for want of any other.
    """

    name: str
    source: str
    rows: list[dict]
    images: list[dict] | datasets.Dataset
    category_names: list[str]
    numbered: bool = False

    def image(self, position: int) -> dict:
        """{"path", "bytes"} of the row at `position`."""
        entry = self.images[position]
        return entry["image"] if isinstance(self.images, datasets.Dataset) else entry


def build_dataset(split: RawSplit, concepts: list[str], category_index: dict[str, int]) -> datasets.Dataset:
    """The `datasets.Dataset` of a checked split.

    Args:
        split: the rows; left as they are.
        concepts: the phrase of each category, common to all splits.
        category_index: {category name in the source: position in `concepts`}.
    """
    rows = [{**row, "objects": [_stored(item, category_index) for item in row["objects"]]} for row in split.rows]
    features = Features(
        {
            "image_id": Value("int64"),
            "file_name": Value("string"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": List(
                {
                    "id": Value("int64"),
                    "category": ClassLabel(names=concepts),
                    "bbox": List(Value("float64")),
                    "area": Value("float64"),
                    "iscrowd": Value("bool"),
                    "segmentation": Value("string"),
                }
            ),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, features=features)
    images = split.images
    if isinstance(images, list):
        images = datasets.Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    return datasets.concatenate_datasets([images, table], axis=1)


def _stored(item: dict, category_index: dict[str, int]) -> dict:
    segmentation = item["segmentation"]
    text = "" if segmentation is None else json.dumps(segmentation, separators=(",", ":"))
    return {**item, "category": category_index[item["category"]], "segmentation": text}


def concept_names(dataset: datasets.Dataset) -> list[str]:
    """The phrase of each category; an object's `category` is a position in this list."""
    return list(dataset.features["objects"].feature["category"].names)


def has_masks(dataset: datasets.Dataset) -> bool:
    """Whether there are objects and each one has a segmentation, so that masks can be scored.

    Crowd regions may lack one. Where only some objects have one, `load_dataset_splits` warns, and the prompts whose
    objects all have one are still trained with masks.
    """
    column = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"]
    objects = compute.list_flatten(column)
    single = compute.invert(compute.struct_field(objects, "iscrowd"))
    segmentations = compute.filter(compute.struct_field(objects, "segmentation"), single)
    return len(segmentations) > 0 and compute.all(compute.not_equal(segmentations, "")).as_py()


def has_some_masks(dataset: datasets.Dataset) -> bool:
    """Whether any object has a segmentation, so that there are masks to learn from."""
    column = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"]
    segmentations = compute.struct_field(compute.list_flatten(column), "segmentation")
    return compute.any(compute.not_equal(segmentations, "")).as_py() or False


def objects_per_category(dataset: datasets.Dataset) -> np.ndarray:
    """(images, concepts) int64: objects of each concept in each image; -1 where there are only crowd regions."""
    column = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"].combine_chunks()
    objects, concepts = compute.list_flatten(column), len(concept_names(dataset))
    images = compute.list_parent_indices(column).to_numpy()
    cells = images * concepts + compute.struct_field(objects, "category").to_numpy()
    crowd = compute.struct_field(objects, "iscrowd").to_numpy(zero_copy_only=False).astype(bool)
    counts = np.bincount(cells[~crowd], minlength=len(dataset) * concepts)
    crowds = np.bincount(cells[crowd], minlength=len(dataset) * concepts)
    return np.where((counts == 0) & (crowds > 0), -1, counts).reshape(len(dataset), concepts)


def first_of(names: list[str]) -> str:
    """The first ten of a list as text."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def crowded_images(rows: datasets.Dataset, limit: int) -> tuple[list[str], int]:
    """
    The images with more than `limit` objects of one concept, as "FILE (COUNT 'CONCEPT')", and the largest number of
    objects of one concept in an image; crowd regions do not count.
    """
    counts = objects_per_category(rows)
    if not counts.size:
        return [], 0
    most, names = counts.argmax(axis=1), concept_names(rows)
    crowded = np.flatnonzero(counts.max(axis=1) > limit)
    files = rows.select(crowded)["file_name"] if len(crowded) else []
    texts = [
        f"{file} ({counts[index, most[index]]} '{names[most[index]]}')"
        for file, index in zip(files, crowded, strict=True)
    ]
    return texts, int(counts.max())


def segmentation_of(item: dict) -> list | dict | None:
    """The segmentation of a row's object: list of polygons, compressed run-length encoding, or None."""
    return json.loads(item["segmentation"]) if item["segmentation"] else None
