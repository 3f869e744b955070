"""Layers of a smaller model, fitted one after the other to what the larger one computes from the same images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from .least_squares import LeastSquares


class Site(NamedTuple):
    """A linear layer that adds to a residual stream, and the norm that reads the sum; `None`: the layer's output."""

    linear: str
    norm: str | None


VIT_SITES = (Site("attention.o_proj", "layer_norm2"), Site("mlp.fc2", None))
CLIP_SITES = (Site("self_attn.out_proj", "layer_norm2"), Site("mlp.fc2", None))
DETR_DECODER_SITES = (
    Site("self_attn.o_proj", "self_attn_layer_norm"),
    Site("text_cross_attn.o_proj", "text_cross_attn_layer_norm"),
    Site("vision_cross_attn.o_proj", "vision_cross_attn_layer_norm"),
    Site("mlp.fc2", "mlp_layer_norm"),
)
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


def fit_site(
    layer: nn.Module,
    site: Site,
    calls: list[Callable[[], Tensor]],
    targets: list[Tensor],
    ridge: float,
    weights: list[Tensor] | None = None,
):
    """
    Refits the linear layer of a site such that the stream behind it comes near to the targets, one per call.

    Args:
        weights: per call, of each vector of the stream in the sum of squares; all the same by default.
    """
    linear = layer.get_submodule(site.linear)
    fit = LeastSquares(linear.in_features, linear.out_features, linear.weight.device)
    for call, target, weight in zip(calls, targets, weights or [None] * len(calls), strict=True):
        (inputs, *total), stream = observe(layer, [site.linear] if site.norm is None else [*site], call)
        fit.add(inputs, target - ((total[0] if total else stream) - linear(inputs)), weight)
    fit.refit(linear, ridge)


@dataclass
class Stack:
    """
    The layers of one side, and how far its batches have come.

    Args:
        run: runs a layer on the stream of a batch.
        streams: of each batch, in front of the layer that is next.
    """

    layers: nn.ModuleList
    run: Run
    streams: list[Tensor]

    def calls(self, layer: nn.Module) -> list[Callable[[], Tensor]]:
        """What runs a layer on the present streams, one call per batch."""
        return [partial(self.run, layer, stream, index) for index, stream in enumerate(self.streams)]

    def pass_layers(self, first: int, end: int):
        """Takes the streams through some layers, without `end`."""
        for layer in self.layers[first:end]:
            self.streams = [call() for call in self.calls(layer)]


def refit_stack(
    student: Stack,
    teacher: Stack,
    kept: list[int],
    sites: tuple[Site, ...],
    write: Callable[[Tensor], Tensor],
    ridge: float,
    weights: list[Tensor] | None = None,
):
    """
    Refits the linear layers at the sites of pre-LayerNorm layers, in place, such that the stream follows the
    teacher's: inside a layer that of the layer it comes from, behind it the one before the next layer that was kept.
    So what the removed layers did is absorbed as well. The streams of both sides are then those behind the last layer.

    Args:
        student, teacher: with the streams in front of the first layer.
        kept: the teacher layer that each layer comes from.
        write: takes the teacher's stream to that of the smaller model.
        ridge: see [`LeastSquares.solve`].
        weights: per batch, see [`fit_site`].
    """
    norms = [site.norm for site in sites if site.norm is not None]
    teacher.pass_layers(0, kept[0])
    for layer, source, following in zip(student.layers, kept, [*kept[1:], len(teacher.layers)], strict=True):
        teacher_layer, targets, outputs = teacher.layers[source], [], []
        for call in teacher.calls(teacher_layer):
            inside, output = observe(teacher_layer, norms, call)
            targets.append([write(total) for total in inside])
            outputs.append(output)
        teacher.streams = outputs
        teacher.pass_layers(source + 1, following)
        for target, stream in zip(targets, teacher.streams, strict=True):
            target.append(write(stream))
        calls = student.calls(layer)
        for position, site in enumerate(sites):
            fit_site(layer, site, calls, [target[position] for target in targets], ridge, weights)
        student.streams = [call() for call in calls]
