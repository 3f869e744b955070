"""The feature pyramid behind a ViT whose stream became narrower."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints import NECK
from .basis import Basis
from .signals import Stream, activation_moments
from .transfer import Transfer


class Upsampling(NamedTuple):
    """A transposed convolution, and the 1x1 projection behind it."""

    up: Tensor  # (inputs, channels, 2, 2)
    up_bias: Tensor  # (channels,)
    down: Tensor  # (outputs, channels)
    down_bias: Tensor  # (outputs,)
    energy: float = 1.0  # share that is kept of what it gave in the source


def map_neck(transfer: Transfer, basis: Basis, final: Stream, neck: str = NECK):
    """
    Maps the three levels of the pyramid, up to the projection in front of their 3x3 convolutions.

    Args:
        basis: of the ViT's stream.
        final: that stream behind the last layer of the source.
        neck: where its levels are.
    """
    _map_coarse_level(transfer, basis, f"{neck}.2")
    _map_middle_level(transfer, basis, final, f"{neck}.1")
    _map_fine_level(transfer, basis, final, f"{neck}.0")


def _map_coarse_level(transfer: Transfer, basis: Basis, level: str):
    name = f"{level}.proj1.weight"
    weight = transfer.read(name).flatten(1) @ basis.reader
    transfer.put(name, weight[:, :, None, None], name, basis.action, basis.energy)


def _map_middle_level(transfer: Transfer, basis: Basis, final: Stream, level: str):
    """Twice the resolution: a transposed convolution and a projection with nothing between them."""
    up, up_bias = transfer.pair(f"{level}.scale_layers.0")  # (width, channels, 2, 2)
    down, down_bias = transfer.pair(f"{level}.proj1")
    up = torch.einsum("wcij,wn->ncij", up, basis.reader)
    inputs = Stream(basis.write(final.mean), basis.write(basis.write(final.covariance).T))
    narrowed = _narrow(Upsampling(up, up_bias, down.flatten(1), down_bias), inputs, basis)
    _put_level(transfer, f"{level}.scale_layers.0", f"{level}.proj1", narrowed, basis)


def _map_fine_level(transfer: Transfer, basis: Basis, final: Stream, level: str):
    """Four times the resolution: a GELU between two transposed convolutions, then a projection."""
    first, first_bias = transfer.pair(f"{level}.scale_layers.0")  # (width, middle, 2, 2)
    second, second_bias = transfer.pair(f"{level}.scale_layers.2")  # (middle, channels, 2, 2)
    down, down_bias = transfer.pair(f"{level}.proj1")
    down = down.flatten(1)  # (fpn, channels)
    taps = first.movedim(0, -1).flatten(1, 2)  # (middle, 4, width)
    mean = taps @ final.mean + first_bias[:, None]
    variance = ((taps @ final.covariance) * taps).sum(-1)
    mean, variance = (t.view(-1, 4) for t in activation_moments(mean.flatten(), variance.flatten(), "gelu"))
    variance = variance.mean(1) + mean.var(1, unbiased=False)
    mean = mean.mean(1)

    combined = torch.einsum("fc,mcij->fmij", down, second)
    scores = variance * combined.square().sum((0, 2, 3))
    name = f"{level}.scale_layers.0"
    kept = scores.topk(transfer.shapes[f"{name}.bias"][0]).indices.sort().values
    removed = mean.clone()
    removed[kept] = 0
    # One bias serves four taps, so it gets what the removed channels add on average.
    down_bias = down_bias + torch.einsum("fmij,m->f", combined, removed) / 4
    first = torch.einsum("wmij,wn->nmij", first[:, kept], basis.reader)
    energy = (scores[kept].sum() / scores.sum()).item()
    transfer.put_pair(name, (first, first_bias[kept]), name, basis.action, energy)
    inputs = Stream(mean[kept], torch.diag(variance[kept]))
    narrowed = _narrow(Upsampling(second[kept], second_bias, down, down_bias), inputs, basis)
    _put_level(transfer, f"{level}.scale_layers.2", f"{level}.proj1", narrowed, basis)


def _narrow(level: Upsampling, inputs: Stream, basis: Basis) -> Upsampling:
    """
    The channels between the convolution and the projection become half as many as the inputs: the strongest ones, or,
    for a rotation, the strongest directions of the output, which is exact if there are as many as the output has.
    """
    up, up_bias, down, down_bias, _ = level
    width = len(up) // 2
    scores = up.square().sum((0, 2, 3)) * down.square().sum(0)
    if not basis.folds:
        kept = scores.topk(width).indices.sort().values
        energy = (scores[kept].sum() / scores.sum()).item()
        return Upsampling(up[:, kept], up_bias[kept], down[:, kept], down_bias, energy)
    combined = torch.einsum("fc,icjk->fijk", down, up)
    taps = combined.flatten(2).movedim(2, 0)  # (4, outputs, inputs)
    moment = (taps @ inputs.covariance @ taps.mT).sum(0).double()
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    directions = vectors.flip(1)[:, :width].float()  # (outputs, at most width)
    energy = (values.flip(0)[:width].sum() / values.sum().clamp_min(1e-30)).item()
    lost = (taps @ inputs.mean).mean(0)
    lost = lost - directions @ (directions.T @ lost)
    # Channels beyond those directions start as channels of the source that the projection does not read yet.
    spare = scores.topk(width - directions.shape[1]).indices
    new_up = torch.cat([torch.einsum("fr,fijk->irjk", directions, combined), up[:, spare]], dim=1)
    new_up_bias = torch.cat([up_bias.new_zeros(directions.shape[1]), up_bias[spare]])
    new_down = torch.cat([directions, directions.new_zeros(len(down), len(spare))], dim=1)
    return Upsampling(new_up, new_up_bias, new_down, down_bias + (down @ up_bias + lost), energy)


def _put_level(transfer: Transfer, convolution: str, projection: str, level: Upsampling, basis: Basis):
    transfer.put_pair(convolution, (level.up, level.up_bias), convolution, basis.action, level.energy)
    down = level.down[:, :, None, None]
    transfer.put_pair(projection, (down, level.down_bias), projection, basis.action, level.energy)


__all__ = ["map_neck"]
