"""Memory of the backward pass for little time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """
    `function(*tensors)`, of which nothing but the arguments is kept for the backward pass. That computes it again with
    the same random numbers, up to the last tensor that it needs: a matrix product at the end is not among it.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)
