"""The feature pyramid of a tracker, fitted to pictures."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints import TRACKER_NECK, LoadedTensors, VideoCheckpoint
from ...modeling_sam3_lite import Sam3LiteModel
from ...modeling_video_sam3_lite import Sam3LiteVideoModel
from ...processing_sam3_lite import Sam3LiteProcessor
from ..video import of_model, of_parts
from .images import batches, draw_images, load_pixels
from .neck import refit_neck
from .steps import HELD_OUT, Calibration

IMAGES = 64  # that a pyramid is fitted to by default: at 1008 px 330,000 tokens, for at most 1024 features


class VideoCalibration(Calibration):
    """
    A calibration of detector and pyramid of the tracker in one.

    Args:
        whole: the larger model, with a tracker.
        options: those of [`Calibration`]; its `teacher` is the detector of `whole`.
    """

    def __init__(self, whole: Sam3LiteVideoModel, *options):
        super().__init__(*options)
        self.checkpoint = VideoCheckpoint(self.checkpoint.label, LoadedTensors(whole), whole.config, is_lite=True)
        self.video_config = whole.config.with_detector(self.config)
        self.config = self.video_config.detector_config
        self.tracker_neck = _ready(whole.tracker_neck, self.teacher.device)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return of_parts(Sam3LiteVideoModel.parameter_shapes(self.video_config))

    def assemble(self, state: dict[str, Tensor]) -> Sam3LiteVideoModel:
        model = Sam3LiteVideoModel(copy.deepcopy(self.video_config))
        model.load_state_dict(of_model(state))
        return model

    def detector_of(self, model: Sam3LiteVideoModel) -> Sam3LiteModel:
        return model.detector_model

    def pyramids(self, model: Sam3LiteVideoModel) -> dict[str, tuple[nn.Module, nn.Module]]:
        return super().pyramids(model) | {TRACKER_NECK: (model.tracker_neck, self.tracker_neck)}


@torch.no_grad()
def fit_tracker_neck(
    model: Sam3LiteVideoModel,
    teacher: Sam3LiteVideoModel,
    images: str | os.PathLike | Sequence | None = None,
    *,
    num_images: int = IMAGES,
    ridge: float = 1e-2,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """
    Fits the pyramid of the tracker, in place, to what that of another model gives on the same pictures: after
    fine-tuning moved the ViT of the detector, or after a mapping without pictures.

    Args:
        model: in float32; on its device all is computed.
        teacher: SAM 3, or the model as it was before its detector was replaced.
        images, num_images, ridge, batch_size, seed: as in [`calibrate_mapping`].

    Returns:
        The cosine between both pyramids per level from fine to coarse, on an eighth of the pictures, which is held
        out.

    Raises:
        ValueError: the models differ in input resolution, patch size or width of the pyramid, or there are less than
            two pictures.
        OSError: an image cannot be read.
    """
    config = model.config.detector_config
    for name, of in {
        "image_size": lambda side: side.config.image_size,
        "patch_size": lambda side: side.config.detector_config.vision_config.backbone_config.patch_size,
        "fpn_hidden_size": lambda side: side.config.detector_config.vision_config.fpn_hidden_size,
    }.items():
        if of(model) != of(teacher):
            raise ValueError(
                f"`{name}` of the model is {of(model)}, of the teacher {of(teacher)}: load the teacher at that of the "
                "model."
            )
    images = draw_images(num_images, config.image_size, seed) if images is None else images
    pixels = load_pixels(images, num_images, Sam3LiteProcessor.from_config(config), seed)
    if len(pixels) < 2:
        raise ValueError("Fitting a pyramid needs at least two images: one of them is held out.")
    held_out = max(1, len(pixels) // HELD_OUT)
    teacher_trunk = _ready(teacher.detector_model.vision_encoder.backbone, model.device)
    teacher_neck = _ready(teacher.tracker_neck, model.device)
    trunk, neck = model.detector_model.vision_encoder.backbone, model.tracker_neck

    def maps(part: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        parts = [batch.to(model.device) for batch in batches(part, batch_size)]
        return tuple([_grid(side, batch) for batch in parts] for side in (trunk, teacher_trunk))

    refit_neck(neck, teacher_neck, *maps(pixels[held_out:]), ridge)
    sums = 0
    for own, wanted in zip(*maps(pixels[:held_out]), strict=True):
        levels = zip(neck(own)[0], teacher_neck(wanted)[0], strict=False)  # a stock pyramid has a fourth level
        sums = sums + torch.stack([F.cosine_similarity(a, b, dim=1).mean() for a, b in levels]) * len(own)
    return (sums / held_out).tolist()


def _ready(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in float32, for inference, on a device; a copy."""
    return copy.deepcopy(module).to(device=device, dtype=torch.float32).eval()


def _grid(trunk: nn.Module, batch: Tensor) -> Tensor:
    """What a ViT gives, `(images, width, height, width)`."""
    side = batch.shape[-1] // trunk.config.patch_size
    return trunk(batch).last_hidden_state.transpose(1, 2).unflatten(2, (side, side))


__all__ = ["VideoCalibration", "fit_tracker_neck"]
