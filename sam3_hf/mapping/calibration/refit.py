"""Layers of a smaller model, fitted one after the other to what the larger one computes from the same images."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .least_squares import LeastSquares


class Site(NamedTuple):
    """A linear layer that adds to a residual stream, and the norm that reads the sum; `None`: the layer's output."""

    linear: str
    norm: str | None


VIT_SITES = (Site("attention.o_proj", "layer_norm2"), Site("mlp.fc2", None))
DETR_ENCODER_SITES = (
    Site("self_attn.o_proj", "layer_norm2"),
    Site("cross_attn.o_proj", "layer_norm3"),
    Site("mlp.fc2", None),
)

# Runs a layer on batch `index` of its stream: (layer, stream, index) -> stream.
Run = Callable[[nn.Module, Tensor, int], Tensor]


def inputs_of(modules: list[nn.Module], call: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """The first inputs that modules get in a call, and what the call returns."""
    seen: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.update({i: (*args, *kwargs.values())[0]}), with_kwargs=True
        )
        for i, module in enumerate(modules)
    ]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[i] for i in range(len(modules))], result


def observe(layer: nn.Module, modules: list[str], call: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """What modules of a layer get in a call, and the stream that the call returns."""
    return inputs_of([layer.get_submodule(name) for name in modules], call)


def fit_site(layer: nn.Module, site: Site, calls: list[Callable[[], Tensor]], targets: list[Tensor], ridge: float):
    """Refits the linear layer of a site such that the stream behind it comes near to the targets, one per call."""
    linear = layer.get_submodule(site.linear)
    fit = LeastSquares(linear.in_features, linear.out_features, linear.weight.device)
    for call, target in zip(calls, targets, strict=True):
        (inputs, *total), stream = observe(layer, [site.linear] if site.norm is None else [*site], call)
        fit.add(inputs, target - ((total[0] if total else stream) - linear(inputs)))
    fit.refit(linear, ridge)


def refit_stack(
    layers: nn.ModuleList,
    teacher_layers: nn.ModuleList,
    kept: list[int],
    sites: tuple[Site, ...],
    streams: list[Tensor],
    teacher_streams: list[Tensor],
    run: Run,
    teacher_run: Run,
    write: Callable[[Tensor], Tensor],
    ridge: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """
    Refits the linear layers at the sites of pre-LayerNorm layers, in place, such that the stream follows the
    teacher's: inside a layer that of the layer it comes from, behind it the one before the next layer that was kept.
    So what the removed layers did is absorbed as well.

    Args:
        kept: the teacher layer that each layer comes from.
        streams, teacher_streams: batches of the streams in front of the first layer.
        run, teacher_run: run a layer of either side.
        write: takes the teacher's stream to that of the smaller model.
        ridge: see [`LeastSquares.solve`].

    Returns:
        Both streams behind the last layer.
    """
    done = 0
    for layer, source, following in zip(layers, kept, [*kept[1:], len(teacher_layers)], strict=True):
        for k in range(done, source):
            teacher_streams = [teacher_run(teacher_layers[k], x, i) for i, x in enumerate(teacher_streams)]
        norms = [site.norm for site in sites if site.norm is not None]
        targets, outputs = [], []
        for i, x in enumerate(teacher_streams):
            teacher_layer = teacher_layers[source]
            inside, output = observe(teacher_layer, norms, partial(teacher_run, teacher_layer, x, i))
            targets.append([write(total) for total in inside])
            outputs.append(output)
        teacher_streams = outputs
        for k in range(source + 1, following):
            teacher_streams = [teacher_run(teacher_layers[k], x, i) for i, x in enumerate(teacher_streams)]
        done = following
        for i, x in enumerate(teacher_streams):
            targets[i].append(write(x))
        calls = [partial(run, layer, x, i) for i, x in enumerate(streams)]
        for place, site in enumerate(sites):
            fit_site(layer, site, calls, [target[place] for target in targets], ridge)
        streams = [run(layer, x, i) for i, x in enumerate(streams)]
    return streams, teacher_streams


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
