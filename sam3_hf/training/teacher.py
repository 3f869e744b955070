"""The teacher: a model that does not train, and what it says of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..configuration_sam3_lite import Sam3LiteConfig
from ..errors import usable_device
from ..evaluation.loop import model_inputs
from ..evaluation.text import PhraseFeatures
from ..modeling_sam3_lite import Sam3LiteModel
from ..outputs_sam3_lite import DetectorOutput, Sam3LiteVisionOutput
from ..passes_sam3_lite import TrainingPass
from ..processing_sam3_lite import Sam3LiteProcessor
from .model import open_source
from .phrases import TEXT_PARTS
from .teacher_cache import PyramidCache

logger = logging.getLogger(__name__)


class Segments(NamedTuple):
    """The teacher's masks of the queries that it is confident of, and the semantic maps of prompts."""

    prompts: Tensor  # (masks,) int64 on the CPU, sorted
    queries: Tensor  # (masks,) int64 on the CPU
    masks: Tensor  # (masks, h, w)
    segmented: (
        Tensor  # (segmented,) int64 on the CPU: prompts whose concept is present; one of any kind if there is none
    )
    semantic: Tensor  # (segmented, 1, h, w)


class Answers(NamedTuple):
    """What the teacher's detector says of each prompt."""

    found: DetectorOutput
    present: Tensor  # (prompts,) bool: the teacher sees the concept
    trust: Tensor  # (prompts, queries) float32: scores of the last layer; 0 where the concept is absent
    segments: Segments | None


class Teacher:
    """
    Answers for batches. It is no part of what trains: neither the optimizer nor checkpoints hear of it.

    Attributes:
        model: without its text encoder, whose features for all phrases are stored.
        has_masks: whether it was taught masks.
    """

    def __init__(
        self,
        model: Sam3LiteModel,
        processor: Sam3LiteProcessor,
        phrases: Iterable[str],
        confidence: float,
        cache: PyramidCache | None = None,
    ):
        """
        Args:
            model: on its device and in its precision; loses its text encoder.
            phrases: all that will be asked for.
            confidence: presence from which a concept counts as present, and score above which a query's mask is
                followed, 0 to 1.
            cache: of the model's feature pyramids.
        """
        self.model, self.confidence, self.cache = model.eval().requires_grad_(False), confidence, cache
        self.text = PhraseFeatures(model, processor, phrases, model.device)
        for name in TEXT_PARTS:
            setattr(model, name, None)
        self.has_masks = model.config.mask_supervision

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Sam3LiteVisionOutput:
        """
        The features of pictures, on the teacher's device.

        Args:
            pixels: `(images, 3, height, width)`.
        """
        with torch.autocast(self.model.device.type, enabled=False):
            if self.cache is not None:
                return self.cache(pixels)
            return self.model.get_vision_features(pixels.to(self.model.device, non_blocking=True).to(self.model.dtype))

    @torch.no_grad()
    def sees(self, prompts: dict, vision: Sam3LiteVisionOutput) -> Tensor:
        """
        Whether it sees the concepts: (prompts,) bool.

        Args:
            prompts: "phrases" and "image_index".
            vision: of `look`.
        """

        def presence(asked: TrainingPass) -> Tensor:
            return asked.found.presence_logits[-1].float().sigmoid() >= self.confidence

        return self._ask(prompts, vision, presence)

    @torch.no_grad()
    def __call__(
        self,
        batch: dict,
        device: torch.device,
        detector: bool,
        masks: bool,
        vision: Sam3LiteVisionOutput | None = None,
    ) -> tuple[tuple[Tensor, ...], Answers | None]:
        """
        Args:
            batch: as `PromptCollator` makes it; its labels are not looked at.
            device: where the answers are wanted.
            detector: whether the detector is asked, or the vision encoder alone.
            masks: whether the mask head is asked too.
            vision: what `look` gave for these pictures, if it was asked before.

        Returns:
            The feature pyramid, three maps `(images, hidden, h, w)` from fine to coarse, and the answers.

        Raises:
            ValueError: they are not finite.
        """
        vision = self.look(batch["pixel_values"]) if vision is None else vision
        levels, answers = self._ask(batch, vision, partial(self._answer, device, detector, masks))
        self._refuse_overflow(levels, answers)
        return levels, answers

    def _ask(self, batch: dict, vision: Sam3LiteVisionOutput, criterion: Callable):
        """What `criterion` makes of a pass of the model."""
        prompts = {name: values for name, values in batch.items() if name not in ("labels", "pixel_values")}
        inputs = model_inputs(prompts, self.text, self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model(**inputs, vision_embeds=vision, criterion=criterion)

    def _refuse_overflow(self, levels: tuple[Tensor, ...], answers: Answers | None) -> None:
        said = levels if answers is None else (*levels, answers.found.logits, answers.found.boxes, answers.trust)
        if not torch.stack([values.isfinite().all() for values in said]).all():
            raise ValueError(
                f"what the teacher says is not finite in {str(self.model.dtype).removeprefix('torch.')}: use "
                "--mixed_precision bf16, in which it does not overflow, or --teacher_device cpu"
            )

    def _answer(self, device: torch.device, detector: bool, masks: bool, asked: TrainingPass) -> tuple:
        levels = tuple(level.to(device) for level in asked.levels)
        if not detector:
            return levels, None
        found = asked.found
        presence = found.presence_logits[-1].float().sigmoid()
        present = presence >= self.confidence
        trust = found.logits[-1].float().sigmoid() * (presence * present)[:, None]
        segments = self._segments(asked, present, trust, device) if masks else None
        found = DetectorOutput(**{name: values.to(device) for name, values in found.answers_from(0).items()})
        return levels, Answers(found, present.to(device), trust.to(device), segments)

    def _segments(self, asked: TrainingPass, present: Tensor, trust: Tensor, device: torch.device) -> Segments:
        on_cpu = torch.cat([present[:, None], trust > self.confidence], dim=1).cpu()  # one transfer
        prompts, queries = on_cpu[:, 1:].nonzero().unbind(1)
        rows = on_cpu[:, 0].nonzero().flatten()
        segmented = asked.segment(rows if len(rows) else torch.zeros(1, dtype=torch.long))
        masks = asked.masks(segmented, prompts, queries).to(device)
        return Segments(prompts, queries, masks, segmented.prompts, segmented.semantic.to(device))


def load_teacher(
    source: str,
    student: Sam3LiteConfig,
    phrases: Iterable[str],
    confidence: float,
    device: str | torch.device,
    precision: str,
    cache: str | None = None,
    pictures: int = 0,
) -> Teacher:
    """
    Args:
        source: what `Sam3LiteModel.from_pretrained` takes.
        student: its input size is the teacher's too.
        phrases, confidence: see `Teacher`.
        device: where the teacher runs.
        precision: of the run, "fp16", "bf16" or "no"; but on a CPU the teacher is in float32, and in half precision
            elsewhere.
        cache: folder for its feature pyramids of so many pictures.

    Raises:
        OSError: there is no such source, or the folder cannot be made.
        ValueError: it is no whole model, it does not know a phrase, its features cannot be compared with those of the
            student, or there is no such device.
    """
    device = usable_device(device, "teacher_device")
    config = open_source(source, "--teacher").config
    if config.image_size != student.image_size:
        config = config.changed(image_size=student.image_size)
    check_comparable(source, config, student)
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    dtype = torch.float32 if device.type == "cpu" else half
    model = Sam3LiteModel.from_pretrained(source, config=config, dtype=dtype).to(device)
    processor = Sam3LiteProcessor.of_source(source, model.config)
    pyramids = None if cache is None else PyramidCache(cache, model, pictures)
    teacher = Teacher(model, processor, phrases, confidence, pyramids)
    logger.info("teacher: %s, in %s on %s", source, str(dtype).removeprefix("torch."), device)
    return teacher


def check_comparable(source: str, teacher: Sam3LiteConfig, student: Sam3LiteConfig) -> None:
    """Raises ValueError if the feature maps of two models at the same input size are of different sizes."""
    (width, patch), (own_width, own_patch) = (
        (config.detr_encoder_config.hidden_size, config.vision_config.backbone_config.patch_size)
        for config in (teacher, student)
    )
    if (width, patch) != (own_width, own_patch):
        raise ValueError(
            f"--teacher {source}: its features are {width} wide for patches of {patch} pixels, those of the model "
            f"{own_width} for {own_patch}, so they cannot be compared: leave out --init, which maps the model from "
            "the teacher, or take another teacher"
        )
