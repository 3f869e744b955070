"""A SAM 3 checkpoint with the tracker that follows through a film what its detector finds."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Sam3VideoConfig

from ..configuration_sam3_lite import Sam3LiteConfig
from ..configuration_video_sam3_lite import Sam3LiteVideoConfig
from .checkpoint import Checkpoint
from .names import Stored
from .readers import LoadedTensors, PickledTensors, SafetensorsFiles
from .tracker_names import POINTS, TRACKER, UNREAD_LEVEL, from_tracker

# Prefix of the detector's parameters in a model with a tracker.
DETECTOR = "detector_model."


class VideoCheckpoint(Checkpoint):
    """
    As [`Checkpoint`], with the tensors of tracker and pyramid under the names that they have in [`Sam3VideoModel`].

    Args:
        label, files, is_lite: as there.
        config: of the whole; if there is none, the tracker has the sizes of SAM 3's.

    Raises:
        ValueError: the file holds no SAM 3, or no tracker.
    """

    def __init__(
        self,
        label: str,
        files: SafetensorsFiles | PickledTensors | LoadedTensors,
        config: Sam3LiteVideoConfig | None = None,
        is_lite: bool = False,
    ):
        super().__init__(label, files, config and config.detector_config, is_lite)
        self._points: list[Stored] = []
        for name in list(self.dropped):
            found = from_tracker(name)
            if any(target.startswith(UNREAD_LEVEL) for target in found):
                self.dropped[name] = "read by nothing"
            elif found:
                del self.dropped[name]
                self._stored.update(found)
                self._points += [stored for stored in found.values() if stored.form == "stacked"]
        self._points.sort(key=lambda stored: stored.part)
        if not any(name.startswith(f"{TRACKER}.") for name in self):
            raise no_tracker(label)
        self.video_config = config or Sam3LiteVideoConfig(detector_config=self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        if name == POINTS and self._points:
            rows = [self.stored_shape(stored.name) for stored in self._points]
            return (sum(shape[0] for shape in rows), *rows[0][1:])
        return super().shape(name)

    def read(self, name: str) -> Tensor:
        if name == POINTS and self._points:
            return torch.cat([self._read_stored(stored) for stored in self._points])
        return super().read(name)


def no_tracker(label: str) -> ValueError:
    return ValueError(
        f"{label} has no tracker: start a video model from `facebook/sam3`, or another checkpoint of type "
        "`sam3_video`, then put your detector into it with `replace_detector`."
    )


def lite_video_config(config: Sam3VideoConfig, detector: Sam3LiteConfig) -> Sam3LiteVideoConfig:
    """
    The configuration of a standard video model as one of ours.

    Args:
        detector: its own, as one of ours.
    """
    tracking = {name: getattr(config, name) for name in Sam3LiteVideoConfig.tracking_keywords()}
    return Sam3LiteVideoConfig(detector_config=detector, tracker_config=config.tracker_config, **tracking)


__all__ = ["DETECTOR", "VideoCheckpoint", "lite_video_config", "no_tracker"]
