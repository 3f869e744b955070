"""
YOLO: a text file for each picture, a line for each object, in shares of the picture's width and height:
`class x y width height` of a box's centre, or `class x y x y x y ...` of a polygon. `data.yaml` names the classes and
the folders of the splits; without one, `classes.txt` or `obj.names` has a class in each line.
"""

import math
from pathlib import Path
from typing import NamedTuple

import yaml

from ..checks import DatasetError, Problems, one_line, short
from ..coco import split_name
from ..rows import RawSplit
from .pictures import (
    Folders,
    Labelled,
    SplitBuilder,
    box_of,
    files_in,
    folders_in,
    make_object,
    pair_labels,
    split_folders,
)

NAME_LISTS = ("classes.txt", "obj.names")


class Part(NamedTuple):
    """
    The pictures of a split, in folders or in lists of files, or in `folders` where nothing names them; the name of
    each class, and the file that says so.
    """

    sources: list[Path]
    names: dict[int, str]
    file: Path
    folders: Folders | None = None


def find(path: Path) -> dict[str, Part] | None:
    """
    {split: what to read} of a `data.yaml`, or of a folder with one or with a list of names; None of anything else.

    Raises:
        DatasetError: the YAML file cannot be used, or there are labels and no names of classes.
    """
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, _load(path)) if path.is_file() else None
    if not path.is_dir():
        return None
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")], key=lambda file: file.stem not in ("data", "dataset"))
    for file in files:
        content = _load(file) if file.stem in ("data", "dataset") else _load_if_sound(file)
        if isinstance(content, dict) and "names" in content and {"train", "val", "test"} & content.keys():
            return _from_yaml(file, content)
    for file in (place / name for place in (path, path / "labels") for name in NAME_LISTS):
        if file.is_file():
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
            names = dict(enumerate(line for line in lines if line))
            parts = {split: Part([], names, file, each) for split, each in split_folders(path, ("labels",)).items()}
            labels = (label for part in parts.values() for label in files_in(part.folders.labels, ".txt"))
            return parts if any(label.name not in NAME_LISTS for label in labels) else None
    children = folders_in(path)
    if {"images", "labels"} <= children.keys() and any(files_in(children["labels"], ".txt")):
        raise DatasetError(f"{path} has labels of YOLO and no names of its classes: name its data.yaml, or add one")
    return None


def _load_if_sound(file: Path):
    try:
        return _load(file)
    except DatasetError:
        return None


def _load(file: Path):
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise DatasetError(one_line(f"{file} is not valid YAML: {error}")) from error


def _from_yaml(file: Path, content) -> dict[str, Part]:
    if not isinstance(content, dict) or "names" not in content:
        raise DatasetError(f"{file} lacks 'names': list the classes there, e.g. 'names: [cat, dog]'")
    names = _names(content["names"], file)
    root = file.parent / str(content.get("path") or "")
    parts = {}
    for key in ("train", "val", "valid", "validation", "test"):
        if content.get(key):
            entries = content[key] if isinstance(content[key], list) else [content[key]]
            if split_name(key) in parts:
                raise DatasetError(f"{file}: two of its keys are the {split_name(key)} split: leave one")
            sources = [_locate(str(entry), root, file, key) for entry in entries]
            parts[split_name(key)] = Part([source for source in sources if source], names, file)
    parts = {name: part for name, part in parts.items() if part.sources}
    if "train" not in parts and "validation" not in parts and "test" not in parts:
        raise DatasetError(f"{file} names no pictures: give 'train' and 'val', folders relative to this file")
    return parts


def _names(names, file: Path) -> dict[int, str]:
    """{class: name} of a list, or of a mapping whose keys are whole numbers."""
    entries = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(entries, dict) or not entries:
        raise DatasetError(f"{file}: 'names' is {short(names)}: make it a list of names, or 'number: name' a line")
    result = {}
    for number, name in entries.items():
        if not str(number).isdigit():
            raise DatasetError(f"{file}: 'names' has the key {short(number)}, where a whole number is meant")
        if not isinstance(name, (str, int, float)) or not str(name).strip():
            raise DatasetError(f"{file}: 'names' has {short(name)} for class {number}, where a name is meant")
        result[int(number)] = str(name).strip()
    doubled = sorted({name for name in result.values() if list(result.values()).count(name) > 1})
    if doubled:
        raise DatasetError(f"{file}: 'names' has {short(doubled[0])} twice: give each class a name of its own")
    return result


def _locate(entry: str, root: Path, file: Path, key: str) -> Path | None:
    """
    A folder or list of pictures, or None for a test split that is not there. Exports name it relative to `path`, to
    the file, or, as if the file lay deeper, by `../train/images`.
    """
    inward = entry
    while inward.startswith("../"):
        inward = inward[len("../") :]
    places = [root / entry, file.parent / entry, root / inward, file.parent / inward]
    for place in places:
        if place.exists():
            return place
    if key == "test":
        return None  # exports name one whether they hold it or not
    remedy = "correct it: a folder or list of pictures, relative to 'path' or to this file"
    raise DatasetError(f"{file}: {key}: {entry} is neither in {root} nor in {file.parent}; {remedy}")


def read(name: str, part: Part, problems: Problems) -> RawSplit:
    """
    Reads one split.

    Args:
        problems: lines that are neither box nor polygon, numbers that are none, classes without a name, labels without
            a picture are added, with file and line.
    """
    builder = SplitBuilder(name, str(part.sources[0] if part.sources else part.folders.images), problems)
    for picture in _pairs(name, part, problems):
        size = builder.size_of(picture.path, picture.name)
        if size is not None:
            objects = [] if picture.label is None else _read_label(picture.label, size, part, problems)
            builder.add(picture, size, objects)
    return builder.build([part.names[number] for number in sorted(part.names)])


def _pairs(name: str, part: Part, problems: Problems) -> list[Labelled]:
    if part.folders is not None:
        return pair_labels(name, part.folders, ".txt", problems, NAME_LISTS)
    pairs = []
    for source in part.sources:
        if source.is_dir():
            pairs += pair_labels(name, Folders(source, _label_folder(source)), ".txt", problems, NAME_LISTS)
        else:
            pairs += _listed(source, problems)
    return pairs


def _label_folder(images: Path) -> Path:
    """The folder with `labels` in place of the last `images` in its path; the same one if there is no such folder."""
    parts = list(images.parts)
    for index in range(len(parts) - 1, -1, -1):
        if parts[index].lower() == "images":
            folder = Path(*parts[:index], "labels", *parts[index + 1 :])
            return folder if folder.is_dir() else images
    return images


def _listed(file: Path, problems: Problems) -> list[Labelled]:
    """The pictures that a text file names, one a line, relative to it."""
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        path = file.parent / line.strip()
        if not line.strip():
            continue
        if path.is_file():
            label = _label_folder(path.parent) / f"{path.stem}.txt"
            pairs.append(Labelled(path, line.strip(), label if label.is_file() else None))
        else:
            problems.add("missing image", file, f"line {number}: there is no file {path}: add it, or remove the line")
    return pairs


def _read_label(file: Path, size: tuple[int, int], part: Part, problems: Problems) -> list[dict]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.add("unreadable label file", file, f"{error}: replace or remove the file")
        return []
    objects = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            kind, values = _class_of(words[0], part), _numbers(words[1:])
            objects.append(_object(number, part.names[kind], values, size))
        except _Fault as fault:
            problems.add(fault.kind, file, f"line {number}: {fault}")
    return objects


class _Fault(ValueError):
    """What is wrong with a line."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def _class_of(word: str, part: Part) -> int:
    (value,) = _numbers([word])
    if value != int(value):
        raise _Fault(
            "malformed class", f"class {short(word)} is no whole number: write its place in 'names', from 0 on"
        )
    if int(value) not in part.names:
        known = f"{len(part.names)} classes, the last of which is {max(part.names)}"
        remedy = "correct the line, or add the name there"
        raise _Fault("class beyond the names", f"class {int(value)}, where {part.file} names {known}: {remedy}")
    return int(value)


def _numbers(words: list[str]) -> list[float]:
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise _Fault("malformed line", f"{short(word)} is no number: correct or remove the line") from None
        if not math.isfinite(values[-1]):
            raise _Fault("malformed line", f"{short(word)} is no finite number: correct or remove the line")
    return values


def _object(number: int, category: str, values: list[float], size: tuple[int, int]) -> dict:
    width, height = size
    if len(values) == 4:
        x, y, box_width, box_height = values
        box = [(x - box_width / 2) * width, (y - box_height / 2) * height, box_width * width, box_height * height]
        if max(values) > 2 and min(size) > 2:
            remedy = f"divide x and width by {width}, y and height by {height}"
            raise _Fault("box in pixels", f"{short(values)}, where shares of the picture are meant: {remedy}")
        return make_object(number, category, box)
    if len(values) < 6:
        forms = "a box has 4, a polygon has x and y of at least 3 points"
        raise _Fault("malformed line", f"{len(values)} numbers after the class: {forms}; correct or remove the line")
    if len(values) % 2:
        remedy = "x and y must alternate, and no score may follow: correct or remove the line"
        raise _Fault("invalid polygon", f"{len(values)} numbers after the class, an odd count; {remedy}")
    polygon = [value * size[index % 2] for index, value in enumerate(values)]
    return make_object(number, category, box_of([polygon]), [polygon])
