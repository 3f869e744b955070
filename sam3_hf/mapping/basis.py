"""How a residual stream becomes a narrower one: by rotation into its strongest directions, or by selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Basis:
    """
    How the residual stream of the source becomes that of the target.

    Args:
        matrix: `(source width, target width)` with orthonormal columns; `None` leaves the stream as it is.
        folds: fold the affine part of every LayerNorm into the linear layers that read it. A rotation has to, a
            selection of channels cannot.
        energy: share of the estimated second moment of the stream that `matrix` keeps.
    """

    matrix: Tensor | None = None
    folds: bool = False
    energy: float | None = None

    @property
    def action(self) -> str:
        return "copied" if self.matrix is None else "rotated" if self.folds else "selected"

    @property
    def scale(self) -> float:
        """Factor on the rotated stream that keeps the variance per channel, and so the part of LayerNorm's epsilon."""
        return math.sqrt(self.matrix.shape[1] / self.matrix.shape[0]) if self.folds else 1.0

    @property
    def reader(self) -> Tensor:
        """`(source width, target width)`: undoes [`~Basis.write`] within the kept directions."""
        return self.matrix / self.scale

    def read(self, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """A linear layer `(out, width)` behind a LayerNorm."""
        if self.matrix is None:
            return weight, bias
        if not self.folds:
            return weight @ self.reader, bias
        return (weight * gamma) @ self.reader, bias + weight @ beta

    def norm(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of that LayerNorm."""
        if self.matrix is None:
            return gamma, beta
        if not self.folds:
            return self.write(gamma), self.write(beta)
        size = self.matrix.shape[1]
        return gamma.new_ones(size), beta.new_zeros(size)

    def write(self, tensor: Tensor) -> Tensor:
        """What is added to the stream: `(width, ...)`."""
        return tensor if self.matrix is None else self.scale * self.matrix.T @ tensor

    def write_stream(self, stream: Tensor) -> Tensor:
        """The stream itself: `(..., source width)` to `(..., target width)`."""
        return self.write(stream.movedim(-1, 0).flatten(1)).T.unflatten(0, stream.shape[:-1])


def rotation(moment: Tensor, size: int) -> Basis:
    """
    An isometry under which LayerNorm stays LayerNorm: it takes the constant vector to the constant vector, and the
    `size - 1` strongest other directions of the stream to the rest.

    Args:
        moment: `(width, width)` second moment of the stream.
        size: target width, at most `width`.
    """
    width = len(moment)
    moment = moment.double()
    constant = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    centered = moment - constant @ (constant.T @ moment)
    centered = centered - (centered @ constant) @ constant.T
    total = centered.trace().clamp_min(1e-30)
    # The constant vector has no part in the centred moment; below all others, it is not among the strongest.
    values, vectors = torch.linalg.eigh((centered + centered.T) / 2 - total * constant @ constant.T)
    strongest = vectors.flip(1)[:, : size - 1]
    signs = strongest.gather(0, strongest.abs().argmax(0, keepdim=True)).sign()
    small = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    # Householder reflection that swaps the last unit vector and the constant one: its other columns complete it.
    mirror = small.clone()
    mirror[-1] -= 1
    rest = torch.eye(size, dtype=torch.float64)
    if size > 1:
        rest = rest - 2 * mirror @ mirror.T / (mirror.T @ mirror)
    matrix = constant @ small.T + (strongest * signs) @ rest[:, :-1].T
    energy = (values.flip(0)[: size - 1].sum() / total).item()
    return Basis(matrix.float(), folds=True, energy=energy)


def selection(moment: Tensor, size: int) -> Basis:
    """The `size` strongest channels of the stream, in their order; `moment` is `(width, width)`."""
    scores = moment.diagonal()
    chosen = scores.topk(size).indices.sort().values
    return Basis(torch.eye(len(moment))[:, chosen], energy=(scores[chosen].sum() / scores.sum()).item())


__all__ = ["Basis", "rotation", "selection"]
