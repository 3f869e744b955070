"""Box prompts as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .configuration_sam3_lite import BOX_PADDING_LABEL


def relative_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Args:
        boxes: `(n, 4)` float xyxy in pixels.
        size: height and width of their image in pixels.

    Returns:
        `(n, 4)` cxcywh in [0, 1], of the same dtype.
    """
    height, width = size
    return box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh")


def pack_boxes(
    boxes: Sequence[Tensor | None],
    labels: Sequence[Sequence[int] | Tensor | None] | None = None,
    padding_label: int = BOX_PADDING_LABEL,
) -> dict[str, Tensor]:
    """
    The boxes of all prompts as one tensor, padded to those of the prompt with most.

    Args:
        boxes: of each prompt, `(n, 4)` float cxcywh in [0, 1], or None.
        labels: of each prompt, n of 1 (an example) and 0 (none), or None where all are examples. Default: all are.
        padding_label: what marks padding.

    Returns:
        `input_boxes` `(prompts, boxes, 4)` float32, `input_boxes_labels` `(prompts, boxes)` int64.

    Raises:
        ValueError: a prompt has another number of labels than of boxes.
    """
    longest = max((len(own) for own in boxes if own is not None), default=0)
    packed = torch.zeros(len(boxes), longest, 4)
    packed_labels = torch.full((len(boxes), longest), padding_label)
    for row, own in enumerate(boxes):
        if own is None or not len(own):
            continue
        own_labels = None if labels is None else labels[row]
        own_labels = torch.ones(len(own)) if own_labels is None else torch.as_tensor(own_labels)
        if len(own_labels) != len(own):
            raise ValueError(f"Prompt {row} has {len(own)} boxes and {len(own_labels)} box labels.")
        packed[row, : len(own)] = own
        packed_labels[row, : len(own)] = own_labels
    return {"input_boxes": packed, "input_boxes_labels": packed_labels}


__all__ = ["pack_boxes", "relative_boxes"]
