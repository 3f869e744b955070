"""Memory of the backward pass for little time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")

WORTH_IT = 2**20  # elements; below, in miniature models, time is scarcer than memory


def recomputed(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """
    `function(*tensors)`, of which nothing but the arguments is kept for the backward pass. That computes it again with
    the same random numbers, up to the last tensor that it needs: a matrix product at the end is not among it. Small
    tensors are not worth it.
    """
    if not torch.is_grad_enabled() or max(tensor.numel() for tensor in tensors) < WORTH_IT:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)
