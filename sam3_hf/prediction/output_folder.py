"""The folder that predictions are written to: a JSON file per picture, and what is drawn and exported from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import write_file
from ..rle import decode_mask
from ..visualization import draw_instances
from .detections import Detections
from .input_files import InputFile


class PredictionFolder:
    """
    Written are, for a picture `a/b.jpg`:

        predictions/a/b.jpg.json   file, its bytes and modification time, width, height; detections: label, score,
                                   box (xyxy in pixels), segmentation (COCO's compressed encoding; null without masks)
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
            _check_settings(path, settings)
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
        if not path.exists():
            return False
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["file"] != str(picture.path):
            raise ValueError(
                f"{path} is of {record['file']}, not of {picture.path}: choose another --output, or remove it."
            )
        masks = len(list(self._masks(picture.name).glob("*.png")))
        return (
            _state(picture.path) == {key: record[key] for key in ("bytes", "modified")}
            and (not self.overlays or self._overlay(picture.name).exists())
            and (not self.masks or masks == len(record["detections"]))
        )

    def write(self, picture: InputFile, found: Detections, small: torch.Tensor | None) -> None:
        """
        Args:
            small: the picture, `(3, h, w)` uint8, at the size to draw an overlay at.
        """
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
            **_state(picture.path),
            "width": found.size[1],
            "height": found.size[0],
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

    def write_coco(self) -> tuple[int, int]:
        """Exports all predictions of the folder, of earlier runs as well. Returns how many images and detections."""
        category_ids = {prompt: index for index, prompt in enumerate(self.prompts, 1)}
        images, count = [], 0

        def write_results(partial: Path) -> None:
            nonlocal count
            with partial.open("w", encoding="utf-8") as file:
                file.write("[")
                for image_id, (name, found) in enumerate(self._read_all(), 1):
                    height, width = found.size
                    images.append({"id": image_id, "file_name": name, "width": width, "height": height})
                    for entry in found.to_coco(image_id, category_ids):
                        file.write((",\n" if count else "\n") + json.dumps(entry))
                        count += 1
                file.write("\n]\n")

        write_file(self.folder / "coco_results.json", write_results)
        categories = [{"id": index, "name": prompt} for prompt, index in category_ids.items()]
        dataset = json.dumps({"images": images, "categories": categories})
        write_file(self.folder / "coco_images.json", dataset)
        return len(images), count

    def _read_all(self) -> Iterator[tuple[str, Detections]]:
        root = self.folder / "predictions"
        for path in sorted(root.rglob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = record["detections"]
            found = Detections(
                boxes=torch.tensor([row["box"] for row in rows]).reshape(-1, 4),
                scores=torch.tensor([row["score"] for row in rows]),
                labels=[row["label"] for row in rows],
                rle=None if None in [row["segmentation"] for row in rows] else [row["segmentation"] for row in rows],
                size=(record["height"], record["width"]),
                prompts=self.prompts,
            )
            yield path.relative_to(root).as_posix().removesuffix(".json"), found

    def _json(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.json"

    def _overlay(self, name: str) -> Path:
        return self.folder / "overlays" / f"{name}.png"

    def _masks(self, name: str) -> Path:
        return self.folder / "masks" / name


def draw_detections(picture: torch.Tensor, found: Detections) -> Image.Image:
    """
    Detections drawn over their picture, which may be smaller than the image they were found in.

    Args:
        picture: `(3, h, w)` uint8.
    """
    height, width = picture.shape[1:]
    masks = None if found.rle is None else np.zeros((len(found), height, width), dtype=bool)
    for mask, rle in zip(masks, found.rle, strict=True) if found.rle else ():
        mask[:] = Image.fromarray(decode_mask(rle)).convert("L").resize((width, height), Image.Resampling.BOX)
    scale = torch.tensor([width, height, width, height]) / torch.tensor([*found.size[::-1], *found.size[::-1]])
    return draw_instances(
        picture.permute(1, 2, 0).numpy(),
        found.boxes * scale,
        masks,
        found.labels,
        found.scores.tolist(),
    )


def _check_settings(path: Path, settings: dict) -> None:
    earlier = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in settings if key != "model" and settings[key] != earlier.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {earlier.get(key)} and is {settings[key]}" for key in changed)
        raise ValueError(f"{path}: {differences}: choose another --output, or remove this one.")


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
