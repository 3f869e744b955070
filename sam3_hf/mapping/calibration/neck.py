"""The feature pyramid of a smaller model, fitted to that of the larger one."""

import torch
from torch import Tensor, nn

from ..least_squares import LeastSquares


def refit_neck(
    neck: nn.Module,
    teacher_neck: nn.Module,
    streams: list[Tensor],
    teacher_streams: list[Tensor],
    ridge: float,
):
    """
    Refits the last layer of each pyramid level that depends on the width of the ViT, in place, to what the teacher
    has in front of its 3x3 convolution.

    Args:
        streams, teacher_streams: `(images, width, height, width)` each, from the last ViT layer.
    """
    for level, teacher_level in zip(neck.fpn_layers, teacher_neck.fpn_layers, strict=True):
        if len(level.scale_layers) == 0:
            _refit_projection(level, teacher_level, streams, teacher_streams, ridge)
        else:
            _refit_upsampling(level, teacher_level, streams, teacher_streams, ridge)


def _projected(level: nn.Module, grid: Tensor) -> Tensor:
    for layer in level.scale_layers:
        grid = layer(grid)
    return level.proj1(grid)


def _refit_projection(level, teacher_level, streams, teacher_streams, ridge):
    weight = level.proj1.weight.flatten(1)
    fit = LeastSquares(weight.shape[1], weight.shape[0], weight.device)
    for x, y in zip(streams, teacher_streams, strict=True):
        fit.add(x.movedim(1, -1), _projected(teacher_level, y).movedim(1, -1))
    weight, bias = fit.solve(weight, ridge)
    level.proj1.weight.copy_(weight[:, :, None, None])
    level.proj1.bias.copy_(bias)


def _refit_upsampling(level, teacher_level, streams, teacher_streams, ridge):
    """
    The last transposed convolution together with the projection behind it: one regression per tap, then the rank that
    the channels between them allow (reduced-rank regression, Izenman 1975: the strongest directions of what was
    fitted). Channels beyond the rank keep their convolution and are not read.
    """
    *before, up = level.scale_layers
    down = level.proj1.weight.flatten(1)  # (fpn, channels)
    taps = [(row, column) for row in range(2) for column in range(2)]
    fits = [LeastSquares(up.in_channels, len(down), down.device) for _ in taps]
    for x, y in zip(streams, teacher_streams, strict=True):
        for layer in before:
            x = layer(x)
        wanted = _projected(teacher_level, y).movedim(1, -1)  # (images, 2 h, 2 w, fpn)
        for fit, (row, column) in zip(fits, taps, strict=True):
            fit.add(x.movedim(1, -1), wanted[:, row::2, column::2])
    solved = [
        fit.solve(down @ up.weight[:, :, row, column].T, ridge) for fit, (row, column) in zip(fits, taps, strict=True)
    ]
    energy = sum(
        weight.double() @ fit.covariance @ weight.double().T for fit, (weight, _) in zip(fits, solved, strict=True)
    )
    rank = min(up.out_channels, len(down))
    directions = torch.linalg.eigh(energy).eigenvectors.flip(1)[:, :rank].to(down.dtype)  # (fpn, rank)
    for (row, column), (weight, _) in zip(taps, solved, strict=True):
        up.weight[:, :rank, row, column] = (directions.T @ weight).T
    up.bias[:rank] = 0
    level.proj1.weight.zero_()
    level.proj1.weight[:, :rank, 0, 0] = directions
    level.proj1.bias.copy_(torch.stack([bias for _, bias in solved]).mean(0))
