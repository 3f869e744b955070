"""What passes into and out of the parts of a SAM 3 Lite model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput
from transformers.utils import ModelOutput


@dataclass
class Sam3LiteOutput(ModelOutput):
    r"""
    Output of [`Sam3LiteModel`]. All but the losses are those of [`Sam3Model`], one row per prompt.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`): total training loss.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, returned with `labels`): its terms.
        pred_masks (`torch.FloatTensor` of shape `(num_prompts, num_queries, height, width)`, *optional*): mask logits
            at 4 / patch size of the input resolution. `None` in training mode with `labels`, where only the masks of
            matched queries are computed.
        pred_boxes (`torch.FloatTensor` of shape `(num_prompts, num_queries, 4)`): xyxy, relative to the image,
            nominally in [0, 1] and not clamped.
        pred_logits (`torch.FloatTensor` of shape `(num_prompts, num_queries)`): score logits of the queries.
        presence_logits (`torch.FloatTensor` of shape `(num_prompts, 1)`): logits of "the concept is in the image".
            The score of a detection is `sigmoid(pred_logits) * sigmoid(presence_logits)`.
        semantic_seg (`torch.FloatTensor` of shape `(num_prompts, 1, height, width)`, *optional*): logits of the union
            of all instances. `None` in training mode with `labels`.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    pred_masks: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    pred_logits: torch.FloatTensor | None = None
    presence_logits: torch.FloatTensor | None = None
    semantic_seg: torch.FloatTensor | None = None


@dataclass
class Sam3LiteFindings(ModelOutput):
    r"""
    Output of [`~Sam3LiteModel.find`]: the kept detections of all prompts, by prompt and query.

    Args:
        scores (`torch.FloatTensor` of shape `(num_found,)`): in [0, 1].
        boxes (`torch.FloatTensor` of shape `(num_found, 4)`): xyxy, relative to the image, not clamped.
        prompt_index (`torch.LongTensor` of shape `(num_found,)`): the prompt that each belongs to.
        mask_logits (`torch.FloatTensor` of shape `(num_found, height, width)`): at 4 / patch size of the input
            resolution. `None` where the model was trained on boxes alone.
        best (`torch.FloatTensor` of shape `(num_prompts,)`): the highest score of each prompt, of a detection or not.
        finite (`torch.BoolTensor` of shape `()`): whether all that the detector said is finite; what is not is no
            detection.
    """

    scores: torch.FloatTensor | None = None
    boxes: torch.FloatTensor | None = None
    prompt_index: torch.LongTensor | None = None
    mask_logits: torch.FloatTensor | None = None
    best: torch.FloatTensor | None = None
    finite: torch.BoolTensor | None = None


@dataclass
class Sam3LiteVisionOutput(Sam3VisionEncoderOutput):
    r"""
    Output of [`~Sam3LiteModel.get_vision_features`]: that of the vision encoder, and what prompts of an image share.

    Args:
        summary (`torch.FloatTensor` of shape `(num_images, 1, hidden_size)`, *optional*): the token by which the box
            encoder sums up an image, for prompts without boxes.
    """

    summary: torch.FloatTensor | None = None


@dataclass
class DetectorOutput(ModelOutput):
    """What the detector computes for a chunk of prompts, before losses and post-processing; one row per prompt."""

    logits: Tensor | None = None  # (layers, prompts, queries)
    boxes: Tensor | None = None  # (layers, prompts, queries, 4) cxcywh
    presence_logits: Tensor | None = None  # (layers, prompts)
    one_to_many_logits: Tensor | None = None  # (layers, prompts, queries)
    one_to_many_boxes: Tensor | None = None  # (layers, prompts, queries, 4)
    hidden: Tensor | None = None  # (layers, prompts, queries [+ one-to-many queries], hidden), normalised
    encoded: Tensor | None = None  # (prompts, height * width, hidden)
    prompt_features: Tensor | None = None  # (prompts, tokens, hidden)
    prompt_mask: Tensor | None = None  # (prompts, tokens) bool

    @property
    def queries(self) -> Tensor:
        """What masks are made from: `(prompts, queries [+ one-to-many queries], hidden)`, behind the last layer."""
        return self.hidden[-1]

    def of_prompts(self, index: Tensor) -> DetectorOutput:
        """What the mask head reads, for some prompts."""
        return DetectorOutput(
            encoded=self.encoded[index],
            prompt_features=self.prompt_features[index],
            prompt_mask=None if self.prompt_mask is None else self.prompt_mask[index],
        )

    def answers_from(self, first: int) -> DetectorOutput:
        """What it says of the prompts from one on, without what only the mask head or labels need."""
        return DetectorOutput(
            logits=self.logits[:, first:],
            boxes=self.boxes[:, first:],
            presence_logits=self.presence_logits[:, first:],
            hidden=self.hidden[:, first:, : self.logits.shape[2]],
            encoded=self.encoded[first:],
        )


class Prompts(NamedTuple):
    """What the detector is asked, one row per prompt; see [`~Sam3LiteModel.forward`]."""

    image_index: Tensor
    text: Tensor
    text_mask: Tensor | None
    input_boxes: Tensor | None
    input_boxes_labels: Tensor | None


class Chosen(NamedTuple):
    """The queries that are detections, by prompt and query; see [`~Sam3LiteModel.find`]."""

    scores: Tensor  # (chosen,)
    prompt: Tensor  # (chosen,) int64
    query: Tensor  # (chosen,) int64
    best: Tensor  # (prompts,): the highest score of each prompt
    finite: Tensor  # () bool: whether all that the detector said is

    def findings(self, pred_boxes: Tensor, mask_logits: Tensor | None) -> Sam3LiteFindings:
        """
        With what else is known of them.

        Args:
            pred_boxes: `(prompts, queries, 4)`, of all queries.
            mask_logits: `(chosen, height, width)`, of the chosen ones.
        """
        boxes = pred_boxes[self.prompt, self.query]
        return Sam3LiteFindings(self.scores, boxes, self.prompt, mask_logits, self.best, self.finite)


def choose_queries(
    output: Sam3LiteOutput, image_index: Tensor, threshold: float | Tensor, max_detections: int | None
) -> Chosen:
    """
    Args:
        image_index: `(prompts,)` int, the image of each prompt.
        threshold: float or `(prompts, 1)`: detections have a higher score.
        max_detections: of each image, the best so many over its prompts.
    """
    scores = output.pred_logits.sigmoid() * output.presence_logits.sigmoid()  # (prompts, queries)
    said = (output.pred_logits, output.presence_logits, output.pred_boxes)
    prompt, query = (scores > threshold).nonzero(as_tuple=True)
    if max_detections is not None:
        best_first = scores[prompt, query].argsort(descending=True, stable=True)
        owners = image_index[prompt[best_first]]
        kept = torch.cat([best_first[owners == image][:max_detections] for image in owners.unique()] or [owners])
        kept = kept.sort().values
        prompt, query = prompt[kept], query[kept]
    finite = torch.stack([values.isfinite().all() for values in said]).all()
    return Chosen(scores[prompt, query], prompt, query, scores.nan_to_num(0).amax(dim=1), finite)


def check_boxes(boxes: Tensor, labels: Tensor | None) -> Tensor:
    """The labels of box prompts, all positive by default; a ValueError names shapes that are wrong."""
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"`input_boxes` must be (num_prompts, num_boxes, 4), got {tuple(boxes.shape)}.")
    if labels is None:
        return torch.ones(boxes.shape[:2], dtype=torch.long, device=boxes.device)
    if labels.shape != boxes.shape[:2]:
        raise ValueError(
            f"`input_boxes_labels` has shape {tuple(labels.shape)}, `input_boxes` has {tuple(boxes.shape)}."
        )
    return labels


def assign_images(num_images: int, image_index: Tensor | None, *per_prompt: Tensor | None) -> Prompts:
    """Completes `image_index`, broadcasts a single prompt, and checks that all prompt inputs agree in number."""
    counts = {len(tensor) for tensor in per_prompt if tensor is not None}
    num_prompts = max(counts) if image_index is None else len(image_index)
    if image_index is None:
        if num_prompts == 1 < num_images:
            num_prompts = num_images
        device = per_prompt[0].device
        if num_images == 1:
            image_index = torch.zeros(num_prompts, dtype=torch.long, device=device)
        elif num_images == num_prompts:
            image_index = torch.arange(num_prompts, device=device)
        else:
            raise ValueError(
                f"{num_prompts} prompts for {num_images} images: say with `image_index` which image each prompt "
                "belongs to."
            )
    if counts - {1, num_prompts}:
        raise ValueError(f"The prompt inputs differ in number: {sorted(counts)} for {num_prompts} prompts.")
    expanded = (
        tensor if tensor is None or len(tensor) == num_prompts else tensor.expand(num_prompts, *tensor.shape[1:])
        for tensor in per_prompt
    )
    return Prompts(image_index, *expanded)


def refuse_arguments(arguments: dict, config):
    """
    Raises:
        TypeError: what `forward` was given beside its own arguments, or the configuration asks of every call.
    """
    wanted = {"output_attentions": config.output_attentions, "output_hidden_states": config.output_hidden_states}
    for name in wanted:
        if arguments.pop(name, wanted[name]):
            raise TypeError(f"Sam3LiteModel does not record `{name}`: register forward hooks on its layers instead.")
    if arguments:
        raise TypeError(f"Sam3LiteModel takes no argument `{next(iter(arguments))}`.")


__all__ = [
    "Chosen",
    "DetectorOutput",
    "Prompts",
    "Sam3LiteFindings",
    "Sam3LiteOutput",
    "Sam3LiteVisionOutput",
    "assign_images",
    "check_boxes",
    "choose_queries",
    "refuse_arguments",
]
