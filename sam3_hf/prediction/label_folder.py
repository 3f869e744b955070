"""A folder of predictions that is a dataset to train on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.checks import Problems, check_object
from ..data.coco import ROBOFLOW_FILE, locate_image
from ..files import partial_of, write_file
from ..picture_files import InputFile
from ..rle import mask_areas
from .detections import Detections
from .output_folder import PredictionFolder, UnwritableName, state_of
from .polygons import polygons_of

SPLITS = ("train", "valid")
REFERRED = "images"  # in a split: a link to the folder of the pictures, where they are referred to


@dataclass
class Labels:
    """
    What a dataset has.

    Args:
        images, negatives, annotations: {split: how many}; negatives are images without annotations.
        left_out: detections that training would refuse, by what is wrong with them.
        broken: what is wrong with pictures that are left out.
    """

    images: Counter = field(default_factory=Counter)
    negatives: Counter = field(default_factory=Counter)
    annotations: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


class LabelFolder(PredictionFolder):
    """
    What a [`PredictionFolder`] has, but for COCO results. Instead of those:

        train/_annotations.coco.json, valid/_annotations.coco.json
                         the detections as annotations, `score` beside each; images in which nothing was found as well
        train/a/b.jpg    a link to the picture or a copy of it
        train/images     a link to the folder of the pictures, where they are referred to

    Args:
        folder, settings, overlays: as for [`PredictionFolder`].
        images: "link", "copy" or "refer".
        masks: "rle", or "polygon", which has no holes.
        valid_share: about so many of the images are for validation, in [0, 1).
        seed: of the split.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self, folder: Path, settings: dict, overlays: bool, *, images: str, masks: str, valid_share: float, seed: int
    ):
        choices = {"images": images, "masks": masks, "valid_share": valid_share, "seed": seed}
        super().__init__(folder, {**settings, **choices}, overlays, masks=False)
        self.images, self.polygons = images, masks == "polygon"
        self.valid_share, self.seed = valid_share, seed

    def is_complete(self, picture: InputFile) -> bool:
        return super().is_complete(picture) and self._is_placed(picture)

    def write(self, picture: InputFile, found: Detections, small: torch.Tensor | None) -> None:
        self._check_name(picture)
        if not self._is_placed(picture):
            self._place(picture)
        super().write(picture, found, small)

    def write_coco(self) -> Labels:
        """Writes the annotation files of all predictions of the folder, of earlier runs as well."""
        labels, names = Labels(), {split: [] for split in SPLITS}
        for name in self._names():
            names[self._split(name)].append(name)
        if self.images == "refer":
            self._refer(names)
        for split in SPLITS:
            file = self.folder / split / ROBOFLOW_FILE
            if names[split]:
                write_file(file, lambda partial, split=split: self._write_split(partial, split, names[split], labels))
            else:
                file.unlink(missing_ok=True)
        return labels

    def _write_split(self, path: Path, split: str, names: list[str], labels: Labels) -> None:
        """One annotation file. Images and annotations are written as they are read, and joined at the end."""
        categories = [{"id": index, "name": prompt} for prompt, index in self.category_ids.items()]
        with (
            path.open("w", encoding="utf-8") as file,
            tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent) as annotations,
        ):
            file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
            for name, source, found in self._read_all(names, labels.broken):
                file_name = self._file_name(split, name, source)
                if not os.path.isfile(self.folder / split / file_name):
                    labels.broken.append(f"{source} is not there any more, or cannot be read: label it again.")
                    continue
                labels.images[split] += 1
                image = {"id": labels.images[split], "file_name": file_name}
                image |= {"width": found.size[1], "height": found.size[0]}
                file.write(("," if image["id"] > 1 else "") + "\n" + json.dumps(image))
                entries = self._annotations(image, found, labels.left_out)
                labels.negatives[split] += not entries
                for entry in entries:
                    labels.annotations[split] += 1
                    entry = {"id": labels.annotations[split], **entry}
                    annotations.write(("," if entry["id"] > 1 else "") + "\n" + json.dumps(entry))
            file.write('\n],\n"annotations": [')
            annotations.seek(0)
            shutil.copyfileobj(annotations, file)
            file.write("\n]}\n")

    def _annotations(self, image: dict, found: Detections, left_out: Counter) -> list[dict]:
        """Detections as training takes them; those that it would refuse are counted in `left_out`."""
        sound = []
        for entry in found.to_coco(image["id"], self.category_ids):
            rle, score = entry.get("segmentation"), entry.pop("score")
            entry |= {"area": _area(rle, entry["bbox"]), "iscrowd": 0}
            if rle is not None:
                entry["segmentation"] = (self.polygons and polygons_of(rle)) or rle
            problems, item = Problems(), {"id": None, "segmentation": None, **entry}
            check_object(item, image, problems, Counter())
            left_out.update(problems.counts)
            if not problems.counts:
                sound.append({**entry, "score": score})
        return sound

    def _split(self, name: str) -> str:
        """By seed and name alone, so that it stays when there are more pictures."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode("utf-8", "surrogateescape")).digest()
        return "valid" if int.from_bytes(digest[:8], "big") < self.valid_share * 2**64 else "train"

    def _file_name(self, split: str, name: str, source: str) -> str:
        if self.images != "refer":
            return name
        return f"{REFERRED}/{Path(source).relative_to(os.readlink(self.folder / split / REFERRED)).as_posix()}"

    def _placed(self, picture: InputFile) -> Path:
        return self.folder / self._split(picture.name) / picture.name

    def _is_placed(self, picture: InputFile) -> bool:
        placed = self._placed(picture)
        if self.images == "copy":
            return placed.is_file() and state_of(placed) == state_of(picture.path)
        return self.images == "refer" or (placed.is_symlink() and os.readlink(placed) == str(picture.path))

    def _place(self, picture: InputFile) -> None:
        placed = self._placed(picture)
        if self.images == "copy":
            write_file(placed, lambda partial: shutil.copy2(picture.path, partial))
        else:
            _link(placed, picture.path)

    def _refer(self, names: dict[str, list[str]]) -> None:
        """Links each split that has pictures to the folder that all of them have in common."""
        common = None
        for _, source, _ in self._read_all([name for own in names.values() for name in own], []):
            common = os.path.commonpath([common or os.path.dirname(source), os.path.dirname(source)])
        for split, own in names.items():
            if own and common:
                _link(self.folder / split / REFERRED, Path(common))

    def _files_of(self, picture: InputFile) -> list[Path]:
        return [*super()._files_of(picture), *([self._placed(picture)] if self.images != "refer" else [])]

    def _check_name(self, picture: InputFile) -> None:
        """Also refuses what cannot be a `file_name`: `\\` and drives are read as on Windows, and text is UTF-8."""
        name = picture.path.relative_to(picture.path.anchor).as_posix() if self.images == "refer" else picture.name
        root = Path("root")
        if locate_image(name, [root]) != str(root / name) or not _is_unicode(name):
            raise UnwritableName(
                f"{picture.path}: training cannot read a file of this name, with a backslash, drive or bytes that are "
                "no UTF-8: rename it."
            )
        super()._check_name(picture)


def _area(rle: dict | None, box: list[float]) -> float:
    """Square pixels, of the mask or else the box."""
    return float(mask_areas([rle])[0]) if rle is not None else box[2] * box[3]


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _link(path: Path, target: Path) -> None:
    """A symbolic link, instead of an older one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, path)
