"""Training steps on fake tensors, which have no values: what would be found or matched is fixed."""

from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from common import STOCK, TOKENS, build, training_batch
from torch import Tensor, nn
from train_step import stock_loss

from sam3_hf import Sam3LiteConfig, loss_sam3_lite
from sam3_hf.loss_sam3_lite import Match
from sam3_hf.outputs_sam3_lite import Sam3LiteVisionOutput
from sam3_hf.passes_sam3_lite import TrainingPass
from sam3_hf.training import distillation
from sam3_hf.training.adapter_arguments import AdapterArguments
from sam3_hf.training.adapters import add_adapters
from sam3_hf.training.arguments import DistillationArguments
from sam3_hf.training.distillation import Distillation
from sam3_hf.training.teacher import Segments, Teacher

OBJECTS = 5  # of each concept that is present, which every second one is


def counted_matches(counts: list[int]) -> AbstractContextManager:
    """Within, `torch.bincount` gives these numbers: fake tensors cannot be read."""
    return mock.patch.object(torch, "bincount", lambda *_, **__: SimpleNamespace(tolist=lambda: counts))


def fixed_matches(logits, boxes, targets, config, one_to_many) -> list[Match]:
    """The first queries of each prompt, one per object, and `one_to_many_topk` in the last set of the copy."""
    prompts = np.repeat(np.arange(len(targets.counts)), targets.counts)
    objects = np.arange(len(prompts))
    queries = objects - targets.first[prompts]
    matches = [Match(prompts, queries, objects)] * (len(logits) - one_to_many)
    if one_to_many:
        copies = config.one_to_many_topk
        matches.append(Match(*(np.repeat(column, copies) for column in (prompts, queries, objects))))
    return matches


class FakeTrainer:
    """
    Steps on labels; to be made and used within `fake_cuda` or `fake_cpu`.

    Attributes:
        resident: bytes on the device beside weights and AdamW's moments.
    """

    def __init__(
        self, name: str, image_size: int | None, checkpointing: bool, adapters: AdapterArguments | None = None
    ):
        self.name, self.resident = name, 0
        self.model = build(name, image_size).train()
        self.model.text_encoder = self.model.text_projection = None
        if adapters is not None:
            # Fake weights cannot be moved; these are on their device from the start.
            with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
                add_adapters(self.model, adapters)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.loss_config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK)).loss_config

    def batch(self, images: int, prompts: int) -> dict:
        return training_batch(self.model, images, prompts, objects=OBJECTS)

    def loss(self, batch: dict) -> Tensor:
        counts = [len(label["boxes"]) for label in batch["labels"] if len(label["boxes"])]
        with mock.patch.object(loss_sam3_lite, "match_queries", fixed_matches), counted_matches(counts):
            if self.name.startswith(STOCK):
                return stock_loss(self.model, batch, self.loss_config)
            return self.model(**batch).loss


class FakeTeacher(Teacher):
    """In half precision and without its text encoder; sees every second prompt, and trusts its first queries there."""

    def __init__(self, name: str, image_size: int, cached: bool):
        torch.set_default_dtype(torch.float16)
        self.model = build(name, image_size).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        self.model.text_encoder = self.model.text_projection = None
        self.has_masks, self.confidence = True, 0.3
        self.cache = self._held if cached else None

    def text(self, phrases: list[str]) -> dict[str, Tensor]:
        features = torch.empty(len(phrases), TOKENS, self.model.config.detr_encoder_config.hidden_size)
        return {"text_embeds": features, "attention_mask": torch.ones(len(phrases), TOKENS, dtype=torch.long)}

    def _held(self, pixels: Tensor) -> Sam3LiteVisionOutput:
        """What `PyramidCache` reads from the disk."""
        config = self.model.config.vision_config
        side = config.backbone_config.image_size // config.backbone_config.patch_size
        levels = (
            torch.empty(len(pixels), factor * side, factor * side, config.fpn_hidden_size, dtype=self.model.dtype)
            for factor in (4, 2, 1)
        )
        return Sam3LiteVisionOutput(fpn_hidden_states=tuple(level.permute(0, 3, 1, 2) for level in levels))

    def _refuse_overflow(self, levels, answers) -> None:
        pass

    def _segments(self, asked: TrainingPass, present: Tensor, trust: Tensor, where: torch.device) -> Segments:
        rows = torch.arange(0, len(present), 2)
        prompts, queries = rows.repeat_interleave(OBJECTS), torch.arange(OBJECTS).repeat(len(rows))
        segmented = asked.segment(rows)
        masks = asked.masks(segmented, prompts, queries)
        return Segments(prompts, queries, masks, segmented.prompts, segmented.semantic)


class FakeDistiller(FakeTrainer):
    """Steps on a teacher's answers, after those on its features alone; queries keep their numbers."""

    def __init__(self, name: str, teacher: str, image_size: int | None, checkpointing: bool, cached: bool):
        super().__init__(name, image_size, checkpointing)
        answers = FakeTeacher(teacher, self.model.config.image_size, cached)
        self.resident = sum(parameter.nbytes for parameter in answers.model.parameters())
        with mock.patch.object(distillation, "same_queries", lambda *_: True):
            self.objective = Distillation(answers, self.model, DistillationArguments(teacher=teacher))

    def loss(self, batch: dict) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        asked = {
            "pixel_values": batch["pixel_values"],
            "image_index": batch["image_index"],
            "phrases": [""] * len(batch["image_index"]),
        }
        present = len(range(0, len(asked["phrases"]), 2))
        with ExitStack() as patches:
            patches.enter_context(counted_matches([OBJECTS] * present))
            patches.enter_context(mock.patch.object(Tensor, "unique", lambda sorted_already: sorted_already))
            loss, _ = self.objective(self.model, asked, inputs)
        return loss
