"""What was detected in the frames of a film, a line each, kept while the film is gone through."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..prediction.detections import Detections


class FoundFrame(NamedTuple):
    """The detections of a frame, with its number and time in seconds."""

    number: int
    time: float
    found: Detections


class DetectionLog:
    """
    Lines of JSON that are read back to the last bit, so that the tracker, given them again, does what it did.

    Args:
        path: of the file; there is none before frames are added.
        prompts: that were asked for.
        group: frames that are computed together. Of an earlier run only whole groups stay, as rounding depends on what
            is computed together.

    Attributes:
        count: frames that it has.
    """

    def __init__(self, path: Path, prompts: list[str], group: int):
        self._path, self._prompts, self.count = path, prompts, 0
        if not path.exists():
            return
        with path.open("rb+") as file:
            end = position = 0
            for number, line in enumerate(file, 1):
                if not self._is_whole(line):
                    break  # a kill left it
                position += len(line)
                if number % group == 0:
                    self.count, end = number, position
            file.truncate(end)

    def __iter__(self) -> Iterator[FoundFrame]:
        """The frames that are there at the start, one in memory."""
        if not self.count:
            return
        with self._path.open("rb") as file:
            for _ in range(self.count):
                yield self._read(file.readline())

    def add(self, group: Sequence[FoundFrame]) -> None:
        """Writes the frames of a group."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(_as_json(frame))}\n" for frame in group)

    def _is_whole(self, line: bytes) -> bool:
        try:
            self._read(line)
        except (ValueError, TypeError, LookupError):
            return False
        return line.endswith(b"\n")

    def _read(self, line: bytes) -> FoundFrame:
        row = json.loads(line)
        found = Detections(
            boxes=torch.tensor(row["boxes"]).reshape(-1, 4),
            scores=torch.tensor(row["scores"]),
            labels=row["labels"],
            rle=row["rle"],
            size=(row["size"][0], row["size"][1]),
            prompts=self._prompts,
            best=row["best"],
        )
        return FoundFrame(row["frame"], row["time"], found)


def _as_json(frame: FoundFrame) -> dict:
    found = frame.found
    return {
        "frame": frame.number,
        "time": frame.time,
        "size": found.size,
        "labels": found.labels,
        "scores": found.scores.tolist(),
        "boxes": found.boxes.tolist(),
        "rle": found.rle,
        "best": found.best,
    }
