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


def group_norm(norm: nn.GroupNorm, tensor: Tensor) -> Tensor:
    """
    `norm(tensor)` in the dtype of the tensor. Autocast would make it, and keep for the backward pass, float32 tensors
    of which products see half. Sums are float32 inside the kernel in any case.
    """
    with _without_autocast(tensor):
        return F.group_norm(tensor, norm.num_groups, *_affine(norm, tensor), norm.eps)


def layer_norm(norm: nn.LayerNorm, tensor: Tensor) -> Tensor:
    """As `group_norm`."""
    with _without_autocast(tensor):
        return F.layer_norm(tensor, norm.normalized_shape, *_affine(norm, tensor), norm.eps)


def _affine(norm: nn.GroupNorm | nn.LayerNorm, tensor: Tensor) -> tuple[Tensor, Tensor]:
    return norm.weight.to(tensor.dtype), norm.bias.to(tensor.dtype)


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)  # which meta does not know
