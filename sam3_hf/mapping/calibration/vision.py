"""The vision encoder of a smaller model: which layers to keep, and their fit to the larger one."""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis import Basis
from ..measure import measure_signals
from ..refit import VIT_SITES, Run, Stack, refit_stack
from ..signals import TowerSignals
from .neck import refit_neck


def measure_vision(vision: nn.Module, batches: Iterable[Tensor]) -> TowerSignals:
    """
    What passes through a vision encoder; see [`measure_signals`].

    Args:
        vision: [`Sam3LiteVisionModel`] in evaluation mode.
        batches: `(images, 3, height, width)` each, on any device.
    """
    device = next(vision.parameters()).device
    heads = vision.config.backbone_config.num_attention_heads
    streams = (lambda batch=batch: vision.backbone(batch.to(device)).last_hidden_state for batch in batches)
    return measure_signals(vision.backbone.layers, "attention.o_proj", heads, streams)


def refit_vision(
    vision: nn.Module,
    teacher: nn.Module,
    kept: list[int],
    basis: Basis,
    batches: list[Tensor],
    ridge: float,
    pyramids: list[tuple[nn.Module, nn.Module]],
):
    """
    Refits the output layers of attention and MLP and the feature pyramids, in place; see [`refit_stack`].

    Args:
        vision, teacher: [`Sam3LiteVisionModel`].
        kept: the teacher layer that each layer comes from.
        basis: takes the teacher's stream to that of the smaller model.
        batches: `(images, 3, height, width)`.
        pyramids: behind the ViT, that of the smaller model and that of the larger.
    """

    sides = [
        Stack(side.backbone.layers, layer_runner(side.backbone), [embed(side, batch) for batch in batches])
        for side in (vision, teacher)
    ]
    refit_stack(*sides, kept, VIT_SITES, basis.write_stream, ridge)
    maps, teacher_maps = ([stream.movedim(-1, 1) for stream in side.streams] for side in sides)
    for neck, teacher_neck in pyramids:
        refit_neck(neck, teacher_neck, maps, teacher_maps, ridge)


def layer_runner(backbone: nn.Module) -> Run:
    """Runs single layers of a ViT on its stream `(images, height, width, channels)`."""

    def run(layer: nn.Module, grid: Tensor, _: int) -> Tensor:
        return layer(grid, backbone.rotation(layer, grid), layer.window_size)

    return run


def embed(vision: nn.Module, batch: Tensor) -> Tensor:
    """The stream in front of the first layer, `(images, height, width, channels)`."""
    backbone = vision.backbone
    patch = vision.config.backbone_config.patch_size
    embeds = backbone.embeddings(batch)
    grid = embeds.view(len(batch), batch.shape[-2] // patch, batch.shape[-1] // patch, -1)
    return backbone.layer_norm(grid)


def pyramid_cosines(vision: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> list[float]:
    """Cosine between the feature vectors of both, mean over positions and images, per level from fine to coarse."""
    sums, images = 0, 0
    for batch in batches:
        levels = zip(vision(batch).fpn_hidden_states, teacher(batch).fpn_hidden_states, strict=True)
        sums = sums + torch.stack([F.cosine_similarity(a, b, dim=1).mean() for a, b in levels]) * len(batch)
        images += len(batch)
    return (sums / images).tolist()


def with_layers(vision: nn.Module, kept: list[int]) -> nn.Module:
    """A copy with some of the ViT layers."""
    layers = vision.backbone.layers
    vision.backbone.layers = nn.ModuleList()
    try:
        smaller = copy.deepcopy(vision)
    finally:
        vision.backbone.layers = layers
    smaller.backbone.layers = nn.ModuleList([copy.deepcopy(layers[i]) for i in kept])
    return smaller
