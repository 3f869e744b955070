"""The folder that tracks are written to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import partial_of, put_in_place, start_folder, sync, write_file
from ..prediction.output_folder import check_settings
from ..rle import decode_mask
from .drawing import FilmWriter, draw_objects
from .log import DetectionLog, FoundFrame
from .tracker import TrackedObject

LARGEST_ID = np.iinfo(np.uint16).max  # of those in `masks/`


@dataclass
class Followed:
    """
    What was followed.

    Args:
        frames: how many were looked at.
        objects: {label: ids of it}.
        best: {label: its highest score, of a detection or below the threshold, and the number of the frame}.
    """

    frames: int = 0
    objects: dict[str, set[int]] = field(default_factory=dict)
    best: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, frame: FoundFrame, objects: Sequence[TrackedObject]) -> None:
        self.frames += 1
        for each in objects:
            self.objects.setdefault(each.label, set()).add(each.id)
        for label, score in frame.found.best.items():
            self.best[label] = max(self.best.get(label, (0.0, 0)), (score, frame.number), key=lambda one: one[0])


class TrackFolder:
    """
    Written are:

        tracks.json        film: source, width, height, rate (frames per second of the source), every; frames: number
                           (from 0), time in seconds, and objects: id, label, score, box (xyxy in pixels),
                           segmentation (COCO's compressed encoding; null without masks)
        tracks.txt         the same boxes in the format of MOT Challenge: frame (from 1), id, left, top, width, height,
                           score, -1, -1, -1
        overlay.mp4        the objects drawn over the film
        masks/000000.png   of each frame, if asked: pixels are ids (16 bits), 0 where there is nothing, the better
                           score in front
        settings.json      what it was made with
        detections.jsonl   what was found in each frame: with it the same command goes on where an earlier one stopped

    All but the last appear when they are complete, and none before something is to be kept in [`~TrackFolder.start`]:
    a command that was mistyped leaves nothing that a corrected one would be refused for.

    Args:
        folder: new, empty, or of an earlier run with the same settings.
        settings: plain values that decide on the tracks, with `prompts`; `model` is a note.
        masks: write them.
        live: the frames come only once, so that there is nothing to go on with.

    Raises:
        ValueError: the folder holds something else, or was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict, *, masks: bool, live: bool = False):
        self.folder, self._settings, self._masks = folder, settings, masks
        path = folder / "settings.json"
        if path.exists() and not live:
            check_settings(path, settings)
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and has no tracks to go on with: choose another --output.")

    def start(self) -> None:
        """Makes the folder and its settings, where they are not there."""
        path = self.folder / "settings.json"
        if not path.exists():
            write_file(path, json.dumps(self._settings, indent=2))

    def log(self, group: int) -> DetectionLog:
        """What earlier runs detected; `group` as there."""
        return DetectionLog(self.folder / "detections.jsonl", self._settings["prompts"], group)

    def writer(self, film: dict, rate: float) -> TrackWriter:
        """
        After `start`.

        Args:
            film: what `tracks.json` says of it.
            rate: frames per second of the overlay.
        """
        return TrackWriter(self.folder, film, rate, self._masks)


class TrackWriter:
    """
    Writes frame by frame. As a context it gives the files their names when it is left, or removes them after an error.
    There must be one frame or more.
    """

    def __init__(self, folder: Path, film: dict, rate: float, masks: bool):
        self._paths = [folder / name for name in ("tracks.json", "tracks.txt", "overlay.mp4")]
        self._json, self._mot = (open(partial_of(path), "w", encoding="utf-8") for path in self._paths[:2])
        self._overlay = FilmWriter(partial_of(self._paths[2]), rate)
        self._masks = folder / "masks" if masks else None
        self._partial = None if self._masks is None else start_folder(self._masks)
        self._film, self._empty = film, True
        self.followed = Followed()

    def add(self, frame: FoundFrame, objects: Sequence[TrackedObject], picture: np.ndarray) -> None:
        """
        Args:
            picture: the frame, `(h, w, 3)` uint8, at the size to draw it at.
        """
        height, width = frame.found.size
        if self._empty:
            film = json.dumps({**self._film, "width": width, "height": height})
            self._json.write(f'{{"film": {film},\n"frames": [')
        entries = [
            {"id": each.id, "label": each.label, "score": each.score, "box": each.box, "segmentation": each.rle}
            for each in objects
        ]
        entry = json.dumps({"frame": frame.number, "time": frame.time, "objects": entries})
        self._json.write(f"{'' if self._empty else ','}\n{entry}")
        self._mot.writelines(mot_line(frame.number, each) for each in objects)
        self._overlay.add(draw_objects(picture, objects, frame.found.size))
        if self._partial is not None:
            ids = id_mask(objects, height, width)
            Image.fromarray(ids).save(self._partial / f"{frame.number:06d}.png", compress_level=1)
        self._empty = False
        self.followed.add(frame, objects)

    def __enter__(self) -> TrackWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._json.write("\n]}\n")
        for file in (self._json, self._mot, self._overlay):
            file.close()
        if kind is not None:
            for path in self._paths:
                partial_of(path).unlink(missing_ok=True)
            if self._partial is not None:
                shutil.rmtree(self._partial)
            return
        for path in self._paths:
            sync(partial_of(path))
            os.replace(partial_of(path), path)
        if self._partial is not None:
            put_in_place(self._partial, self._masks)


def id_mask(objects: Sequence[TrackedObject], height: int, width: int) -> np.ndarray:
    """
    `(height, width)` uint16, the ids of objects, 0 where there is none, the better score in front.

    Raises:
        ValueError: an id is too large.
    """
    ids = np.zeros((height, width), dtype=np.uint16)
    for each in sorted(objects, key=lambda each: each.score):
        if each.id > LARGEST_ID:
            raise ValueError(f"Pictures of ids hold ids up to {LARGEST_ID}, and there are more: leave --masks out.")
        if each.rle is not None:
            ids[decode_mask(each.rle)] = each.id
    return ids


def mot_line(number: int, each: TrackedObject) -> str:
    """A line of MOT Challenge's format, for the frame of this number from 0."""
    left, top, right, bottom = each.box
    sides = ",".join(f"{value:.2f}" for value in (left, top, right - left, bottom - top))
    return f"{number + 1},{each.id},{sides},{each.score:.4f},-1,-1,-1\n"
