"""What autocast would do in other places, or more often than needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
