"""Small datasets in COCO's form, written to a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_hf.data import DatasetError, load_dataset_splits

WIDTH, HEIGHT = 120, 80
CATEGORIES = [{"id": 3, "name": "RBC"}, {"id": 7, "name": "WBC"}, {"id": 9, "name": "platelet"}]


def save_image(path: Path, width: int = WIDTH, height: int = HEIGHT, seed: int = 0, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path, **options)


def damage(path: Path) -> None:
    """Flips bits in the middle of a file, whose header and end stay as they are."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 8)
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.write_bytes(content)


def load_error(*args, **kwargs) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        load_dataset_splits(*args, **kwargs)
    return caught.value


def image(image_id: int, **changes) -> dict:
    return {"id": image_id, "file_name": f"{image_id}.png", "width": WIDTH, "height": HEIGHT, **changes}


def annotation(annotation_id: int, image_id: int = 1, category_id: int = 3, **changes) -> dict:
    """A 30x20 box at (10, 15), with the polygon of the same outline."""
    entry = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 15, 30, 20],
        "area": 600,
        "iscrowd": 0,
        "segmentation": [[10, 15, 40, 15, 40, 35, 10, 35]],
    }
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


def write_coco(folder: Path, images: list, annotations: list, categories=None, name="_annotations.coco.json") -> Path:
    """Writes the annotation file, and each image unless its file name leads elsewhere; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in images:
        if "file_name" in entry and not entry["file_name"].startswith(("/", "..", "C:")):
            save_image(folder / entry["file_name"], seed=entry.get("id", 0))
    content = {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def write_roboflow(folder: Path, images_per_split: int = 4) -> Path:
    """train/ and valid/: image n has n - 1 RBCs, one WBC if n is even, and no platelet."""
    for split in ("train", "valid"):
        images, annotations = [], []
        for number in range(1, images_per_split + 1):
            images.append(image(number))
            for column in range(number - 1):
                x = 2 + 25 * column
                corners = [x, 5, x + 20, 5, x + 20, 30, x, 30]
                entry = {"bbox": [x, 5, 20, 25], "segmentation": [corners], "area": 500}
                annotations.append(annotation(10 * number + column, number, 3, **entry))
            if number % 2 == 0:
                corners = [50, 40, 90, 40, 70, 70]
                entry = {"bbox": [50, 40, 40, 30], "segmentation": [corners], "area": 600}
                annotations.append(annotation(10 * number + 9, number, 7, **entry))
        write_coco(folder / split, images, annotations)
    return folder
