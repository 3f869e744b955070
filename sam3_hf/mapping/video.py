"""A smaller model with a tracker: detector and pyramids are mapped, the tracker is copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ..checkpoints import DETECTOR, TRACKER, TRACKER_NECK
from ..configuration_sam3_lite import Sam3LiteConfig
from ..configuration_video_sam3_lite import Sam3LiteVideoConfig
from .plan import MappingPlan, plan_mapping
from .report import MappingReport

Shapes = dict[str, tuple[int, ...]]


def of_parts(shapes: Shapes) -> Shapes:
    """Parameters of a video model under the names of a [`VideoCheckpoint`], where the detector has no prefix."""
    return {name.removeprefix(DETECTOR): shape for name, shape in shapes.items()}


def of_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`of_parts`]."""
    return {
        name if name.startswith((f"{TRACKER}.", f"{TRACKER_NECK}.")) else f"{DETECTOR}{name}": tensor
        for name, tensor in state.items()
    }


@dataclass(frozen=True, kw_only=True)
class VideoMappingPlan(MappingPlan):
    """
    As [`MappingPlan`], whose `config` is that of the detector here.

    Args:
        video_config: of the model.
    """

    video_config: Sam3LiteVideoConfig

    @property
    def model_config(self) -> Sam3LiteVideoConfig:
        return self.video_config

    def map(
        self, shapes_of: Callable[[Sam3LiteVideoConfig], Shapes], strategy: str
    ) -> tuple[dict[str, Tensor], MappingReport]:
        def parts_of(detector: Sam3LiteConfig) -> Shapes:
            return of_parts(shapes_of(self.video_config.with_detector(detector)))

        state, report = super().map(parts_of, strategy)
        return of_model(state), report


def plan_video_mapping(
    source: str | os.PathLike,
    fields_of_source: dict | None,
    preset: str | None,
    config: Sam3LiteVideoConfig | None,
    keywords: dict,
    text_encoder: str | os.PathLike | None = None,
    text_phrases: Sequence[str] | None = None,
) -> VideoMappingPlan | None:
    """
    As [`plan_mapping`], for [`~Sam3LiteVideoModel.from_pretrained`].

    Raises:
        ValueError: as there, or the source has no tracker.
    """
    tracking = {key: keywords[key] for key in Sam3LiteVideoConfig.tracking_keywords() & set(keywords)}
    rest = {key: value for key, value in keywords.items() if key not in tracking}
    detector = None if config is None else config.detector_config
    plan = plan_mapping(source, fields_of_source, preset, detector, rest, text_encoder, text_phrases, tracker=True)
    if plan is None:
        return None
    video_config = (config or plan.checkpoint.video_config).with_detector(plan.config, **tracking)
    values = {field.name: getattr(plan, field.name) for field in fields(MappingPlan)}
    return VideoMappingPlan(**values | {"config": video_config.detector_config}, video_config=video_config)


__all__ = ["VideoMappingPlan", "of_model", "of_parts", "plan_video_mapping"]
