"""Memory of the backward pass for little time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[[Tensor], Tensor], tensor: Tensor, random: bool = False) -> Tensor:
    """
    `function(tensor)`, of which nothing but the argument is kept for the backward pass. That computes it again up to
    the last tensor that it needs: a matrix product at the end is not among it.

    Args:
        random: the function draws random numbers.
    """
    if not tensor.requires_grad:
        return function(tensor)
    return checkpoint(function, tensor, use_reentrant=False, preserve_rng_state=random)
