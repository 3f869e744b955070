"""COCO annotation files, with their images in one folder or in the Roboflow layout.

Roboflow's exports hold a category that names the whole project: no annotation uses it and the others state it as
their `supercategory`. As a negative prompt it would teach the model that a "blood cells" image has no blood cells, and
it may bear the name of a real category, so it is left out (and logged).
"""

import json
import logging
import os
from collections import Counter
from pathlib import Path, PureWindowsPath

from .checks import DatasetError, Problems, one_line, short
from .rows import RawSplit

logger = logging.getLogger(__name__)

ROBOFLOW_FILE = "_annotations.coco.json"
SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
REQUIRED_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
ID_LIMIT = 2**63  # ids are stored in 64 bits
LARGEST_IMAGE = 2**31  # pixels; the runs of COCO's masks are counted in 32 bits


def split_name(name: str) -> str:
    """ "train", "validation" or "test" from a name in use for it ("valid", "val"); others pass through."""
    return SPLIT_NAMES.get(name, name)


def find_roboflow_files(folder: Path) -> dict[str, Path]:
    """{split: annotation file} of a folder in the Roboflow layout; empty if it is not in that layout.

    Raises:
        DatasetError: two folders are the same split (valid/ and val/).
    """
    files = {}
    for name in SPLIT_NAMES:
        file = folder / name / ROBOFLOW_FILE
        if file.is_file():
            if split_name(name) in files:
                raise DatasetError(f"{file} and {files[split_name(name)]} are both the {split_name(name)} split")
            files[split_name(name)] = file
    if not files and (folder / ROBOFLOW_FILE).is_file():
        files["train"] = folder / ROBOFLOW_FILE
    return files


def read_coco(name: str, file: Path, image_folder: Path | None, problems: Problems) -> RawSplit:
    """Reads one COCO file.

    Args:
        name: split.
        file: JSON with `images`, `annotations`, `categories`.
        image_folder: where each `file_name` starts; default: the folder of `file`, or `images/` in it; of a file in
            `annotations/`, a folder beside that one, which may be named after the split.
        problems: what is wrong inside is added: missing fields, ids that are no whole numbers of 64 bits, duplicate or
            dangling ids, duplicate category names, names that are no text, file names that lead out of the image
            folder by `..`, a root or a drive (a symbolic link in the folder may point anywhere, as the Hub's cache
            does). Entries concerned are missing from the result.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or lacks one of the three lists.
    """
    content = load_json(file)
    images = _valid_entries(content, "images", file, problems)
    annotations = _valid_entries(content, "annotations", file, problems)
    categories = _read_categories(_valid_entries(content, "categories", file, problems), annotations, file, problems)
    roots = [image_folder] if image_folder is not None else _image_folders(file)
    rows, sources, objects_by_image = [], [], {}
    for image in images:
        objects_by_image[image["id"]] = objects = []
        fault = _image_entry_fault(image)
        path = None if fault else locate_image(image["file_name"], roots)
        if fault:
            problems.add(fault[0], file, f"image {image['id']}: {fault[1]}")
        elif path is None:
            problems.add("file_name leads out of the image folder", file, f"image {image['id']}: {image['file_name']}")
        else:
            sources.append({"path": path, "bytes": None})
            fields = {field: image[field] for field in ("file_name", "width", "height")}
            rows.append({"image_id": image["id"], **fields, "objects": objects})
    for annotation in annotations:
        if annotation["image_id"] not in objects_by_image:
            problems.add("dangling image_id", file, f"there is no image {annotation['image_id']}", annotation["id"])
        elif annotation["category_id"] not in categories:
            detail = f"there is no category {annotation['category_id']}"
            problems.add("dangling category_id", file, detail, annotation["id"])
        else:
            objects_by_image[annotation["image_id"]].append(_object(annotation, categories))
    return RawSplit(name, str(file), rows, sources, list(dict.fromkeys(categories.values())))


def find_annotation_files(folder: Path) -> dict[str, Path]:
    """
    {split: annotation file} of a folder with `annotations/instances_train.json`, as CVAT and COCO itself write it;
    CVAT's `default` is the training split. Empty if there is none.

    Raises:
        DatasetError: two files are the same split.
    """
    files = {}
    for file in sorted((folder / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_").lower().rstrip("0123456789")  # of instances_train2017.json: train
        name = "train" if name == "default" else split_name(name)
        if name in files:
            raise DatasetError(f"{file} and {files[name]} are both the {name} split: leave one")
        files[name] = file
    return files


def _image_folders(file: Path) -> list[Path]:
    """Where the images of an annotation file may be, where nobody says so."""
    beside = [file.parent, file.parent / "images"]
    if file.parent.name != "annotations":
        return beside
    folder, subset = file.parent.parent, file.stem.removeprefix("instances_")
    return [folder / "images" / subset, folder / "images", folder / subset, folder, *beside]


def load_json(file: Path) -> dict:
    """The content of a COCO file. Raises DatasetError naming the file and what it lacks."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # with or without the mark that Windows tools write
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(one_line(f"cannot read the annotation file {file}: {error}")) from error
    except RecursionError as error:
        raise DatasetError(f"{file} is not a COCO file: its lists or objects are nested too deep") from error
    except ValueError as error:  # or an integer of thousands of digits
        raise DatasetError(one_line(f"{file} is not valid JSON: {error}")) from error
    for field in REQUIRED_FIELDS:
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise DatasetError(f"{file} lacks the list '{field}'; a COCO file has {', '.join(REQUIRED_FIELDS)}")
    return content


def _valid_entries(content: dict, kind: str, file: Path, problems: Problems) -> list[dict]:
    """Entries of a list that have all fields, with whole numbers for ids, the first of each id."""
    valid, seen = [], set()
    for position, entry in enumerate(content[kind]):
        if not isinstance(entry, dict):
            problems.add("malformed entry", file, f"{kind}[{position}] is not an object")
            continue
        missing = [field for field in REQUIRED_FIELDS[kind] if entry.get(field) is None]
        ids = [field for field in ("id", "image_id", "category_id") if field in REQUIRED_FIELDS[kind]]
        entry.update({field: _whole_number(entry[field]) for field in ids if field in entry})
        malformed = [field for field in ids if field not in missing and not _is_id(entry[field])]
        annotation_id = entry.get("id") if kind == "annotations" else None
        if missing:
            detail = f"{kind}[{position}] lacks '{missing[0]}'"
            problems.add("missing field", file, detail, annotation_id)
        elif malformed:
            detail = f"{kind}[{position}]: '{malformed[0]}' is {short(entry[malformed[0]])}"
            problems.add("malformed id", file, f"{detail}, not a whole number of 64 bits", annotation_id)
        elif entry["id"] in seen:
            problems.add(f"duplicate id in {kind}", file, f"{entry['id']}", annotation_id)
        else:
            seen.add(entry["id"])
            valid.append(entry)
    return valid


def _read_categories(entries: list[dict], annotations: list[dict], file: Path, problems: Problems) -> dict[int, str]:
    """{id: name}, without Roboflow's project category."""
    used = {annotation["category_id"] for annotation in annotations}
    parents = [entry.get("supercategory") for entry in entries]
    parents = {parent for parent in parents if isinstance(parent, str) and parent != "none"}
    categories = {}
    for entry in entries:
        name = entry["name"]
        if type(name) in (int, float):
            name = str(name)
        if not _is_text(name):
            problems.add("malformed category name", file, f"category {entry['id']}: {short(name)} is no text")
        elif entry.get("supercategory") == "none" and name in parents and entry["id"] not in used:
            logger.info("%s: category '%s' names the project, no annotation uses it; left out", file, name)
        elif not name.strip():
            problems.add("empty category name", file, f"category {entry['id']}")
        else:
            categories[entry["id"]] = name.strip()
    for name, count in Counter(categories.values()).items():
        if count > 1:
            ids = ", ".join(str(category_id) for category_id, other in categories.items() if other == name)
            problems.add("duplicate category name", file, f"'{name}' is the name of categories {ids}")
    return categories


def _image_entry_fault(image: dict) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with an entry of `images` that has all fields; None if nothing is."""
    width, height = image["width"], image["height"]
    if not _is_text(image["file_name"]) or "\0" in image["file_name"]:
        return "malformed file_name", f"{short(image['file_name'])} is no text that can name a file"
    if not all(type(side) is int and side > 0 for side in (width, height)) or width * height > LARGEST_IMAGE:
        return "invalid image size", f"{short(width)}x{short(height)}"
    return None


def _whole_number(value):
    """A whole number for one that is written as a fraction or as text (`2.0`, `"2"`); anything else as it is."""
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.removeprefix("-").isdigit():
        return int(value)
    return value


def _is_id(value) -> bool:
    return type(value) is int and -ID_LIMIT <= value < ID_LIMIT


def _is_text(value) -> bool:
    """Whether this is text without halves of characters (surrogates), which JSON lets pass and no file can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def locate_image(file_name: str, roots: list[Path]) -> str | None:
    """The path of an image, or None if its name leads out of the folder.

    Symbolic links are followed wherever they point: whoever made the folder put them there, while the name comes from
    the annotations. Folders that the Hub's client downloads consist of links into its cache.

    Args:
        file_name: as in the annotations; `/` or `\\` between its parts.
        roots: folders to look in, in this order; where the file is in none, the path is the one in the first.
    """
    name = PureWindowsPath(file_name)  # knows both separators, and drives
    if ".." in name.parts or name.anchor:
        return None
    for root in roots:
        path = os.path.join(root, *name.parts)
        if os.path.lexists(path):
            return path
    return os.path.join(roots[0], *name.parts)


def _object(annotation: dict, categories: dict[int, str]) -> dict:
    return {
        "id": annotation["id"],
        "category": categories[annotation["category_id"]],
        "bbox": annotation["bbox"],
        "area": annotation.get("area"),
        "iscrowd": annotation.get("iscrowd"),
        "segmentation": annotation.get("segmentation") or None,
    }
