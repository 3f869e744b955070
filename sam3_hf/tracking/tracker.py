"""Which detections of a film's frames are one object: ByteTrack of the library `trackers`, for each label its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..prediction.detections import Detections


@dataclass
class TrackingSettings:
    """
    What decides on the tracks, beside model, prompts and detections.

    Args:
        threshold: a detection of this score or more may begin a track, in [0, 1].
        low_threshold: one of a higher score than this may go on with a track, in [0, 1].
        lost_seconds: a track of which nothing was seen for longer has ended; what comes back later is another object.

    Raises:
        ValueError: a value outside of its range; the message names it.
    """

    threshold: float = 0.3
    low_threshold: float = 0.1
    lost_seconds: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low_threshold <= self.threshold <= 1:
            raise ValueError(
                f"`threshold`={self.threshold} and `low_threshold`={self.low_threshold} must be in 0..1, and the "
                "second not above the first."
            )
        if self.lost_seconds < 0:
            raise ValueError(f"`lost_seconds`={self.lost_seconds} must be 0 or more.")


class TrackedObject(NamedTuple):
    """An object in a frame: its id, which is unique among all labels, and what was detected of it."""

    id: int
    label: str
    score: float
    box: list[float]  # xyxy in pixels
    rle: dict | None


class Tracker:
    """
    Detections of one frame after the other in, tracked objects out. The same detections give the same objects.

    An object gets its id in the second frame in a row in which it is seen. Ids count from 1 in the order in which they
    are given; objects of two labels never share one.

    Args:
        rate: frames per second of those that it is given.

    Raises:
        ImportError: `trackers` is not installed.
    """

    def __init__(self, settings: TrackingSettings, rate: float):
        byte_track = check_tracker()
        self._new = lambda: byte_track(
            lost_track_buffer=round(settings.lost_seconds * 30),  # in frames of 1/30 s, whatever the rate
            frame_rate=rate,
            track_activation_threshold=settings.threshold,
            high_conf_det_threshold=settings.threshold,
        )
        self._trackers, self._ids = {}, {}

    def update(self, found: Detections) -> list[TrackedObject]:
        """The objects of the next frame, by id."""
        import supervision

        objects = []
        for label in found.prompts:
            rows = np.array([row for row, own in enumerate(found.labels) if own == label], dtype=int)
            if label not in self._trackers:
                self._trackers[label] = self._new()
            tracked = self._trackers[label].update(
                supervision.Detections(
                    xyxy=found.boxes[rows].double().numpy(),
                    confidence=found.scores[rows].double().numpy(),
                    data={"row": rows},
                )
            )
            for own, row in zip(tracked.tracker_id, tracked.data.get("row", ()), strict=True):
                if own >= 0:
                    number = self._ids.setdefault((label, int(own)), len(self._ids) + 1)
                    objects.append(_object(number, found, int(row)))
        return sorted(objects, key=lambda one: one.id)


def check_tracker() -> type:
    """
    The class of ByteTrack.

    Raises:
        ImportError: `trackers` is not installed; the message says how to.
    """
    try:
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise ImportError("tracking needs the library trackers: pip install 'sam3-hf[video]'") from error
    return ByteTrackTracker


def _object(number: int, found: Detections, row: int) -> TrackedObject:
    rle = None if found.rle is None else found.rle[row]
    return TrackedObject(number, found.labels[row], found.scores[row].item(), found.boxes[row].tolist(), rle)
