"""Pictures and the label file of each, whichever way they lie in folders."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...picture_files import InputFile, find_pictures
from ..checks import DatasetError, Problems
from ..coco import SPLIT_NAMES, split_name
from ..images import open_image, upright_size
from ..rows import RawSplit

IMAGE_FOLDERS = ("images", "jpegimages", "imgs")


class Folders(NamedTuple):
    """Where the pictures and the labels of a split are, and which of them are meant, by name; None for all."""

    images: Path
    labels: Path
    only: frozenset[str] | None = None


class Labelled(NamedTuple):
    """A picture, its name relative to the folder of its split, and its label file if it has one."""

    path: Path
    name: str
    label: Path | None


def split_folders(folder: Path, label_folders: Sequence[str]) -> dict[str, Folders]:
    """
    {split: its folders}, of any of these layouts: train/images and train/labels; images/train and labels/train; all
    of a split in train/. A folder without splits is the training split.

    Args:
        label_folders: names that a folder of labels may have, in small letters.

    Raises:
        DatasetError: two folders are the same split.
    """
    children = folders_in(folder)
    images, labels = _first(children, IMAGE_FOLDERS), _first(children, label_folders)
    found, origins = {}, {}
    for alias, name in SPLIT_NAMES.items():
        inner = folders_in(images).get(alias) if images else None
        if alias in children:
            own = folders_in(children[alias])
            pictures = _first(own, IMAGE_FOLDERS) or children[alias]
            folders = Folders(pictures, _first(own, label_folders) or children[alias])
        elif inner:
            folders = Folders(inner, folders_in(labels).get(alias, inner) if labels else inner)
        else:
            continue
        if name in found:
            raise DatasetError(f"{folders.images} and {origins[name]} are both the {name} split")
        found[name], origins[name] = folders, folders.images
    return found or {"train": Folders(images or folder, labels or folder)}


def folders_in(folder: Path) -> dict[str, Path]:
    """{name in small letters: path} of the folders in a folder; none if it is not one."""
    if not folder.is_dir():
        return {}
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}


def _first(children: dict[str, Path], names: Sequence[str]) -> Path | None:
    return next((children[name] for name in names if name in children), None)


def files_in(folder: Path, ending: str) -> Iterator[Path]:
    """The files of an ending at any depth, in order; hidden ones are left out."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(ending) and not name.startswith("."):
                yield Path(parent, name)


def pictures_in(folder: Path, exclude: Path = Path(os.devnull)) -> list[InputFile]:
    """The pictures at any depth; none if there are none."""
    try:
        return find_pictures([str(folder)], exclude=exclude)
    except ValueError:
        return []


def bare(name: str) -> str:
    """A relative name without its ending."""
    return PurePosixPath(name).with_suffix("").as_posix()


def pair_labels(
    split: str, folders: Folders, ending: str, problems: Problems, others: Sequence[str] = ()
) -> list[Labelled]:
    """
    Each picture with the label file of its name; one without is a picture of nothing.

    Args:
        ending: of label files.
        others: names of files with that ending that are no labels.
        problems: labels without a picture are added, pictures that a list names and that are not there, two pictures
            for one label, and a split (but for the test split) without any label.
    """
    labels = {}
    for path in files_in(folders.labels, ending):
        if path.name not in others:
            labels[bare(path.relative_to(folders.labels).as_posix())] = path
    pairs, first = [], {}
    for picture in pictures_in(folders.images):
        name = bare(picture.name)
        if folders.only is not None and name not in folders.only:
            continue
        if name in first and name in labels:
            detail = f"{first[name]} and {picture.name} are both its picture: rename one, or move it elsewhere"
            problems.add("two pictures of one label", labels[name], detail)
        first.setdefault(name, picture.name)
        pairs.append(Labelled(picture.path, picture.name, labels.get(name)))
    for name, path in labels.items():
        if name not in first and (folders.only is None or name in folders.only):
            detail = f"there is no picture {name}.* in {folders.images}: add it, or remove the label file"
            problems.add("label without a picture", path, detail)
    for name in sorted((folders.only or frozenset()) - first.keys() - labels.keys()):
        detail = f"the list of the {split} split names {name}, which is not there: add it, or take it off the list"
        problems.add("missing image", folders.images, detail)
    if pairs and split != "test" and all(pair.label is None for pair in pairs):
        detail = f"none of the {len(pairs)} pictures in {folders.images} has a label file (*{ending}) here"
        problems.add("no labels", folders.labels, f"{detail}: put them here, named as the pictures")
    return pairs


class SplitBuilder:
    """Collects the pictures of a split with their objects."""

    def __init__(self, name: str, source: str, problems: Problems):
        self.name, self.source, self.problems = split_name(name), source, problems
        self.rows, self.images = [], []

    def size_of(self, picture: Path, name: str) -> tuple[int, int] | None:
        """Width and height as people see it, from the header; None, with a problem, if there is none."""
        try:
            with open_image({"path": str(picture), "bytes": None}) as image:
                return upright_size(image)
        except Exception as error:  # Pillow raises a dozen kinds for damaged headers
            self.problems.add("unreadable image", name, f"{error}; replace or remove the file")
        return None

    def add(self, picture: Labelled, size: tuple[int, int], objects: list[dict]) -> None:
        """
        Args:
            size: width and height in pixels that the objects refer to.
            objects: of `make_object`.
        """
        row = {"image_id": len(self.rows) + 1, "file_name": picture.name, "width": size[0], "height": size[1]}
        self.rows.append({**row, "objects": objects, "label_file": str(picture.label or picture.name)})
        self.images.append({"path": str(picture.path), "bytes": None})

    def add_all(
        self,
        pictures: Iterable[Labelled],
        content_of: Callable[[Path], tuple[tuple[int, int] | None, list[dict]] | None],
    ) -> None:
        """
        Adds pictures with what is in their label files; those without one have no objects.

        Args:
            content_of: the size that a label file states, if it does, and its objects; None where the file is faulty,
                which leaves the picture out.
        """
        for picture in pictures:
            size, objects = None, []
            if picture.label is not None:
                content = content_of(picture.label)
                if content is None:
                    continue
                size, objects = content
            size = size or self.size_of(picture.path, picture.name)
            if size is not None:
                self.add(picture, size, objects)

    def build(self, names: Sequence[str] | None = None) -> RawSplit:
        """
        The split.

        Args:
            names: its categories; default: those of its objects, sorted.
        """
        if not self.rows:
            self.problems.add("no pictures", self.source, f"the {self.name} split has none: correct the folder")
        if names is None:
            names = sorted({item["category"] for row in self.rows for item in row["objects"]})
        numbered = bool(names) and all(name.isdigit() for name in names)
        return RawSplit(self.name, self.source, self.rows, self.images, list(names), numbered)


def make_object(
    number: int, category: str, box: Sequence[float], segmentation: list | dict | None = None, ignored: bool = False
) -> dict:
    """
    One object of a row.

    Args:
        number: its place in the label file, from 1 on: line, object, shape.
        box: [x, y, width, height] in pixels.
        ignored: neither searched for nor counted as wrong when it is found, as COCO's crowd regions.
    """
    return {
        "id": number,
        "category": category,
        "bbox": list(box),
        "area": None,
        "iscrowd": int(ignored),
        "segmentation": segmentation,
    }


def box_of(polygons: list[list[float]]) -> list[float]:
    """[x, y, width, height] around polygons [x, y, x, y, ...]."""
    (left, right), (top, bottom) = (
        (min(min(polygon[axis::2]) for polygon in polygons), max(max(polygon[axis::2]) for polygon in polygons))
        for axis in (0, 1)
    )
    return [left, top, right - left, bottom - top]
