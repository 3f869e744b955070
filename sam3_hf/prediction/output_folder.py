"""The folder that predictions are written to: a JSON file per picture, and what is drawn and exported from them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ..files import partial_of, write_file
from ..picture_files import InputFile
from ..precision_sam3_lite import precision_name
from ..rle import compress, decode_mask
from ..sources_sam3_lite import read_json
from ..visualization import draw_instances, drawing_colors, with_legend
from .detections import Detections

logger = logging.getLogger(__name__)

LONGEST_NAME = 255  # bytes, of a file on the usual file systems


class UnwritableName(OSError):
    """The predictions of a picture of this name cannot be written."""


@dataclass
class Contents:
    """
    What a folder holds.

    Args:
        images, detections: how many.
        broken: what is wrong with the files that were left out.
        empty: {name: the highest score in it and its prompt} of the images without detections.
        missed: {prompt: its highest score and the name of the image}, until there is a detection of it: then None.
    """

    images: int = 0
    detections: int = 0
    broken: list[str] = field(default_factory=list)
    empty: dict[str, tuple[float, str]] = field(default_factory=dict)
    missed: dict[str, tuple[float, str] | None] = field(default_factory=dict)

    def add(self, name: str, found: Detections) -> None:
        self.images += 1
        self.detections += len(found)
        for label, score in found.best.items():
            before = self.missed.setdefault(label, (score, name))
            if before is not None:
                self.missed[label] = None if label in found.labels else max(before, (score, name))
        if not len(found) and found.best:
            self.empty[name] = max((score, label) for label, score in found.best.items())


class PredictionFolder:
    """
    Written are, for a picture `a/b.jpg`:

        predictions/a/b.jpg.json   file, its bytes and modification time, width, height; best_scores, by prompt, of
                                   detections or below the threshold; detections: label, score, box (xyxy in pixels),
                                   segmentation (COCO's compressed encoding; null without masks)
        overlays/a/b.jpg.png       the detections drawn over it, if asked
        masks/a/b.jpg/000.png ...  a black and white mask per detection, in the order of the JSON file, if asked
        settings.json              what the predictions were made with
        coco_results.json          all detections as COCO results
        coco_images.json           the images and categories that their ids refer to, as a COCO dataset

    Every file appears whole or not at all, the JSON file of a picture last.

    Args:
        folder: new, empty, or of an earlier run with the same settings.
        settings: plain values that decide on the detections, with `prompts`; `model` is a note.
        overlays, masks: write these pictures.

    Raises:
        ValueError: the folder holds something else, or predictions made with other settings.
    """

    def __init__(self, folder: Path, settings: dict, overlays: bool, masks: bool):
        self.folder, self.prompts, self.overlays, self.masks = folder, settings["prompts"], overlays, masks
        path = folder / "settings.json"
        if path.exists():
            check_settings(path, settings)
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and has no predictions: choose another --output.")
        else:
            write_file(path, json.dumps(settings, indent=2))

    def is_complete(self, picture: InputFile) -> bool:
        """
        Whether all that is asked for is there, made from the file as it is now.

        Raises:
            ValueError: there is the prediction of another file of this name.
        """
        path = self._json(picture.name)
        if not os.path.isfile(path):
            return False
        try:
            record = self._read(path)
        except ValueError as error:
            logger.warning("%s The picture is predicted again.", error)
            return False
        if record["file"] != str(picture.path):
            raise ValueError(
                f"{path} is of {record['file']}, not of {picture.path}: choose another --output, or remove it."
            )
        if not os.path.isfile(picture.path):
            return False
        masks = len(list(self._masks(picture.name).glob("*.png")))
        return (
            state_of(picture.path) == {key: record[key] for key in ("bytes", "modified")}
            and (not self.overlays or self._overlay(picture.name).exists())
            and (not self.masks or masks == len(record["detections"]))
        )

    def write(self, picture: InputFile, found: Detections, small: torch.Tensor | None) -> None:
        """
        Args:
            small: the picture, `(3, h, w)` uint8, at the size to draw an overlay at.

        Raises:
            UnwritableName: the name is too long, or a folder has it.
            FileNotFoundError: the picture is not there any more.
        """
        self._check_name(picture)
        state = state_of(picture.path)
        self._json(picture.name).unlink(missing_ok=True)  # what is being replaced is not complete
        if self.overlays:
            drawing = draw_detections(small, found)
            write_file(self._overlay(picture.name), lambda partial: drawing.save(partial, format="PNG"))
        if self.masks:
            shutil.rmtree(self._masks(picture.name), ignore_errors=True)
            for index, rle in enumerate(found.rle or []):
                mask = Image.fromarray(decode_mask(rle))
                path = self._masks(picture.name) / f"{index:03d}.png"
                write_file(path, lambda partial, mask=mask: mask.save(partial, format="PNG"))
        record = {
            "file": str(picture.path),
            **state,
            "width": found.size[1],
            "height": found.size[0],
            "best_scores": found.best,
            "detections": [
                {"label": label, "score": score, "box": box, "segmentation": rle}
                for label, score, box, rle in zip(
                    found.labels,
                    found.scores.tolist(),
                    found.boxes.tolist(),
                    [None] * len(found) if found.rle is None else found.rle,
                    strict=True,
                )
            ],
        }
        write_file(self._json(picture.name), json.dumps(record))

    @property
    def category_ids(self) -> dict[str, int]:
        """{prompt: id of it in COCO files}"""
        return {prompt: index for index, prompt in enumerate(self.prompts, 1)}

    def write_coco(self) -> Contents:
        """Exports all predictions of the folder, of earlier runs as well."""
        category_ids = self.category_ids
        images, contents = [], Contents()

        def write_results(partial: Path) -> None:
            with partial.open("w", encoding="utf-8") as file:
                file.write("[")
                for image_id, (name, _, found) in enumerate(self._read_all(self._names(), contents.broken), 1):
                    height, width = found.size
                    images.append({"id": image_id, "file_name": name, "width": width, "height": height})
                    for number, entry in enumerate(found.to_coco(image_id, category_ids), contents.detections):
                        file.write((",\n" if number else "\n") + json.dumps(entry))
                    contents.add(name, found)
                file.write("\n]\n")

        write_file(self.folder / "coco_results.json", write_results)
        categories = [{"id": index, "name": prompt} for prompt, index in category_ids.items()]
        dataset = json.dumps({"images": images, "categories": categories})
        write_file(self.folder / "coco_images.json", dataset)
        return contents

    def _names(self) -> list[str]:
        """Of the pictures that have a prediction, in order."""
        root = self.folder / "predictions"
        paths = sorted(path for path in root.rglob("*.json") if path.is_file())
        return [path.relative_to(root).as_posix().removesuffix(".json") for path in paths]

    def _read_all(self, names: list[str], broken: list[str]) -> Iterator[tuple[str, str, Detections]]:
        """Name, file and detections of pictures; adds what is wrong with predictions that are none to `broken`."""
        for name in names:
            try:
                record = self._read(self._json(name))
            except ValueError as error:
                broken.append(f"{error} Predict its picture again.")
                continue
            rows = record["detections"]
            found = Detections(
                boxes=torch.tensor([row["box"] for row in rows]).reshape(-1, 4),
                scores=torch.tensor([row["score"] for row in rows]),
                labels=[row["label"] for row in rows],
                rle=None if None in [row["segmentation"] for row in rows] else [row["segmentation"] for row in rows],
                size=(record["height"], record["width"]),
                prompts=self.prompts,
                best=record.get("best_scores", {}),
            )
            yield name, record["file"], found

    def _read(self, path: Path) -> dict:
        """
        Raises:
            ValueError: the file is none that `write` wrote; the message names it.
        """
        record = read_json(path)
        try:
            whole = all(isinstance(record[key], int) for key in ("bytes", "modified", "width", "height"))
            size = [record["height"], record["width"]]
            scores = record.get("best_scores", {}).values()  # which folders of an earlier version lack
            whole &= all(isinstance(score, (int, float)) for score in scores)
            valid = whole and all(_is_row(row, self.prompts, size) for row in record["detections"])
        except (AttributeError, KeyError, TypeError, ValueError):
            valid = False
        if not valid or not isinstance(record.get("file"), str):
            raise ValueError(f"{path} is no prediction of a picture: it is damaged.")
        return record

    def _files_of(self, picture: InputFile) -> list[Path]:
        """What is written for a picture under its name."""
        return [self._json(picture.name), *([self._overlay(picture.name)] if self.overlays else [])]

    def _check_name(self, picture: InputFile) -> None:
        for path in self._files_of(picture):
            spare = LONGEST_NAME - len(os.fsencode(partial_of(path).name))
            if spare < 0:
                raise UnwritableName(
                    f"{picture.path}: its name is too long to write {path.name}: shorten it by {-spare} bytes."
                )
            taken = next((above for above in path.parents if above.is_file()), path if path.is_dir() else None)
            if taken is not None:
                kind = "folder" if taken.is_dir() else "file"
                raise UnwritableName(
                    f"{picture.path}: {path} cannot be written, as there is a {kind} {taken}: rename the picture, or "
                    "predict it into another --output."
                )

    def _json(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.json"

    def overlay_of(self, picture: InputFile) -> Path:
        """Where its overlay is, if it was asked for and could be made."""
        return self._overlay(picture.name)

    def _overlay(self, name: str) -> Path:
        return self.folder / "overlays" / f"{name}.png"

    def _masks(self, name: str) -> Path:
        return self.folder / "masks" / name


def draw_detections(picture: torch.Tensor, found: Detections) -> Image.Image:
    """
    Detections drawn over their picture, which may be smaller than the image they were found in, above a legend.

    Args:
        picture: `(3, h, w)` uint8.
    """
    height, width = picture.shape[1:]
    boxes, masks = found.scaled(width, height)
    colors = drawing_colors(found.labels)
    drawing = draw_instances(
        picture.permute(1, 2, 0).numpy(),
        boxes,
        masks,
        found.labels,
        found.scores.tolist(),
        colors=colors,
    )
    return with_legend(drawing, found.legend(colors))


def check_settings(path: Path, settings: dict) -> None:
    """
    Raises:
        ValueError: the settings of an earlier run, in the file, are others.
    """
    earlier = read_json(path)
    if "dtype" in earlier:  # under other names in folders of an earlier version
        earlier["dtype"] = precision_name(earlier["dtype"])
    changed = [key for key in settings if key != "model" and settings[key] != earlier.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {earlier.get(key)} and is {settings[key]}" for key in changed)
        raise ValueError(f"{path}: {differences}: choose another --output, or remove this one.")


def state_of(path: Path) -> dict[str, int]:
    """Size in bytes and time in ns of the last change: what tells a file from another of its name."""
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _is_row(row: dict, prompts: list[str], size: list[int]) -> bool:
    """Whether this is a detection as `PredictionFolder.write` writes it; errors also mean that not."""
    numbers = [row["score"], *row["box"]]
    rle = row["segmentation"]
    return (
        row["label"] in prompts
        and len(numbers) == 5
        and all(isinstance(value, (int, float)) for value in numbers)
        and (rle is None or (rle["size"] == size and isinstance(rle["counts"], str) and bool(compress(rle))))
    )
