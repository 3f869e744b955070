"""Attention of plain operators, whose scores are never in memory all at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.sam3.modeling_sam3 import eager_attention_forward

from ..modeling_sam3_lite import Sam3LiteModel

# Scores of an image (or prompt) that are made at once, over all heads: 128 MB in float32. All of a global layer of
# `lite` at 1008 px are 1.3 GB.
SCORES_AT_ONCE = 2**25
_NAME = "sam3_lite_blocks"


def attend_in_blocks(model: Sam3LiteModel) -> None:
    """Sets the attention among pixels of a model, in the vision encoder and in the detector, to a block at a time."""
    AttentionInterface.register(_NAME, attention_in_blocks)
    model.vision_encoder.config.backbone_config._attn_implementation = _NAME
    model.detr_encoder.config._attn_implementation = _NAME


def attention_in_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """
    As `eager_attention_forward` of Transformers, for some queries after the other where there are too many. Each of
    them sees all keys, so that the results are the same. Of sizes that are free in a graph, all are taken at once.

    Args:
        query, key, value: `(batch, heads, tokens, width)`.

    Returns:
        `(batch, tokens, heads, width)`, and no scores.
    """
    sizes = (query.shape[1], query.shape[2], key.shape[2])
    known = attention_mask is None and all(isinstance(size, int) for size in sizes)
    blocks = math.ceil(math.prod(sizes) / SCORES_AT_ONCE) if known else 1
    parts = [
        eager_attention_forward(module, some, key, value, attention_mask, **kwargs)[0]
        for some in query.split(math.ceil(query.shape[2] / blocks), dim=2)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None
