"""What autocast would do in other places, or more often than needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_OTHER_NAMES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}


def precision_name(precision: str | torch.dtype) -> str:
    """fp16, bf16 or fp32, of a dtype or any name of it (float16, half, torch.bfloat16, ...); others as they are."""
    name = str(precision).removeprefix("torch.")
    return _OTHER_NAMES.get(name, name)


def as_dtype(precision: str | torch.dtype) -> torch.dtype:
    """
    Raises:
        ValueError: it is neither a floating point dtype nor a name of one.
    """
    name = precision_name(precision)
    dtype = PRECISIONS.get(name) or getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"`dtype` must be a floating point dtype, its name (fp16, bf16, fp32, ...) or 'auto', got {precision!r}."
        )
    return dtype


def matmul_precision(tensor: Tensor) -> Tensor:
    """
    The tensor as autocast would cast it for a matrix product; unchanged without autocast. What several products read
    is cast, and kept for the backward pass, once instead of once per product.
    """
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises on the meta device
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class GroupNorm(nn.GroupNorm):
    """
    In the dtype of its input. Autocast would run it in float32, and keep float32 tensors for the backward pass, though
    the next product reads half. Sums are float32 inside the kernel in any case.
    """

    def forward(self, input: Tensor) -> Tensor:
        with _without_autocast(input):
            return F.group_norm(input, self.num_groups, *_affine(self, input), self.eps)


class LayerNorm(nn.LayerNorm):
    """As `GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        with _without_autocast(input):
            return F.layer_norm(input, self.normalized_shape, *_affine(self, input), self.eps)


def _affine(norm: nn.GroupNorm | nn.LayerNorm, tensor: Tensor) -> tuple[Tensor, Tensor]:
    return norm.weight.to(tensor.dtype), norm.bias.to(tensor.dtype)


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)  # which meta does not know
