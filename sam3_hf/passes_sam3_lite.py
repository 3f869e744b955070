"""A forward pass in training: its parts, as far as a loss asks for them."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_sam3_lite import DetectionOutputs, sam3_lite_loss
from .outputs_sam3_lite import DetectorOutput, Prompts


class Segmented(NamedTuple):
    """What the mask head says of some prompts."""

    prompts: Tensor  # (segmented,) int64 on the CPU, sorted
    pixels: Tensor  # (segmented, hidden, h, w), from which masks of single queries are made
    semantic: Tensor  # (segmented, 1, h, w)


class TrainingPass:
    """
    One pass over images and prompts; what the `criterion` of [`~Sam3LiteModel.forward`] is called with. The detector
    runs when it is first asked for, and once, the mask head for those prompts that it is asked for.

    Args:
        model: a [`Sam3LiteModel`].
        levels: vision maps `(images, hidden, h, w)` from fine to coarse.
        summary: tokens `(images, 1, hidden)` of prompts without boxes, or None.
        prompts: what is asked.
        labels: see [`~Sam3LiteModel.forward`]; with a criterion, maybe of the first prompts only.
    """

    def __init__(
        self,
        model,
        levels: tuple[Tensor, ...],
        summary: Tensor | None,
        prompts: Prompts,
        labels: list[dict[str, Tensor]] | None = None,
    ):
        self.model, self.levels, self.summary, self.prompts, self.labels = model, levels, summary, prompts, labels
        self.num_queries = model.config.detr_decoder_config.num_queries

    @cached_property
    def found(self) -> DetectorOutput:
        """What the detector computes; with labels, in training, for a one-to-many copy of the queries as well."""
        loss = self.model.config.loss_config
        one_to_many = self.labels is not None and self.model.training and loss.one_to_many_weight > 0
        return self.model._run_detector(self.levels, self.summary, self.prompts, one_to_many)

    def segment(self, prompts: Tensor) -> Segmented:
        """
        Runs the mask head.

        Args:
            prompts: `(segmented,)` int64 on the CPU, sorted, at least one.
        """
        index = prompts.to(self.prompts.image_index.device, non_blocking=True)
        images = self.prompts.image_index[index]
        pixels = self.model._mask_features(self.levels, images, self.found.of_prompts(index))
        return Segmented(prompts, pixels, self.model.mask_decoder.semantic_projection(pixels))

    def masks(self, segmented: Segmented, prompts: Tensor, queries: Tensor, one_to_many: bool = False) -> Tensor:
        """
        Mask logits `(matches, h, w)` of single queries.

        Args:
            prompts, queries: `(matches,)` int64 on the CPU, sorted by prompt; prompts are among the segmented ones.
            one_to_many: of the one-to-many copy of the queries.
        """
        index = segmented.prompts.to(self.found.queries.device, non_blocking=True)
        row_of_prompt = torch.zeros(len(self.prompts.image_index), dtype=torch.long)
        row_of_prompt = row_of_prompt.index_copy(0, segmented.prompts, torch.arange(len(segmented.prompts)))
        count = self.num_queries
        own = self.found.queries[:, count:] if one_to_many else self.found.queries[:, :count]
        return self.model.mask_decoder.matched_masks(own[index], segmented.pixels, row_of_prompt[prompts], queries)

    def prompts_with_masks(self) -> Tensor:
        """
        The prompts that the losses on labels need the mask head for, as `segment` takes them: all in evaluation; in
        training those with masks to learn from, or one, which keeps the mask head in the graph, as DDP needs.
        """
        chosen = range(len(self.labels))
        if self.model.training:
            masks = [label.get("masks") for label in self.labels]
            chosen = [i for i, mask in enumerate(masks) if mask is not None and len(mask)] or [0]
        return torch.tensor(list(chosen))

    def label_loss(self, segmented: Segmented) -> tuple[Tensor, dict[str, Tensor]]:
        """
        The loss on labels, and its terms, of the prompts that have labels; see
        [`~sam3_hf.loss_sam3_lite.sam3_lite_loss`].

        Args:
            segmented: at least those of `prompts_with_masks`.
        """
        found, count = self.found, len(self.labels)
        labelled = len(segmented.prompts)
        if count < len(self.prompts.image_index):
            labelled = int((segmented.prompts < count).sum())  # they are sorted
        index = segmented.prompts[:labelled].to(segmented.semantic.device, non_blocking=True)
        semantic = segmented.semantic[:labelled]
        one_to_many = found.one_to_many_logits is not None
        outputs = DetectionOutputs(
            logits=found.logits[:, :count],
            boxes=found.boxes[:, :count],
            presence_logits=found.presence_logits[:, :count],
            one_to_many_logits=found.one_to_many_logits[:, :count] if one_to_many else None,
            one_to_many_boxes=found.one_to_many_boxes[:, :count] if one_to_many else None,
            semantic_logits=semantic.new_zeros(count, *semantic.shape[1:]).index_copy(0, index, semantic),
        )

        def mask_logits(prompts: Tensor, queries: Tensor, one_to_many: bool) -> Tensor:
            return self.masks(segmented, prompts, queries, one_to_many)

        return sam3_lite_loss(outputs, self.labels, self.model.config.loss_config, mask_logits)


__all__ = ["Segmented", "TrainingPass"]
