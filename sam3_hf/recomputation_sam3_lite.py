"""Memory of the backward pass for little time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *tensors: Tensor, random: bool = False) -> Result:
    """
    `function(*tensors)`, of which nothing but the arguments is kept for the backward pass. That computes it again, up
    to the last tensor that it needs: a matrix product at the end is not among it.

    Args:
        random: the function draws random numbers.
    """
    if not any(tensor.requires_grad for tensor in tensors):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=random)
