"""The vision encoder in operators that runtimes have fast."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .upsampling import CellConv


def for_runtimes(encoder: nn.Module) -> nn.Module:
    """
    A vision encoder that computes what another does, without transposed convolutions, and with rotary positions from
    constant tables. Parameters that stay are shared, the encoder itself is not changed.
    """
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    encoder = copy.deepcopy(encoder, shared)
    backbone = encoder.backbone
    with torch.no_grad():
        example = backbone.embeddings.position_embeddings
        tables = {layer.window_size: PlainRotation.of(backbone.rotation(layer, example)) for layer in backbone.layers}
    backbone.rotation = lambda layer, _: tables[layer.window_size]
    for level in encoder.neck.fpn_layers:
        layers = list(level.scale_layers)
        if layers and isinstance(layers[-1], nn.ConvTranspose2d):
            level.proj1 = CellConv(layers.pop(), level.proj1)
        level.scale_layers = nn.ModuleList(
            CellConv(layer) if isinstance(layer, nn.ConvTranspose2d) else layer for layer in layers
        )
    return encoder


class PlainRotation(NamedTuple):
    """As `Rotation`. Channels are swapped by a product, as runtimes go through memory in strides to swap them."""

    cos: Tensor  # (1, positions, head size)
    signed_sin: Tensor  # (1, positions, head size)
    swap: Tensor  # (head size, head size), a permutation

    @classmethod
    def of(cls, rotation) -> PlainRotation:
        identity = torch.eye(rotation.cos.shape[-1], dtype=rotation.cos.dtype)
        return cls(*rotation, identity.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))

    def turn(self, tensor: Tensor) -> Tensor:
        """`(batch, heads, positions, head size)` turned by its positions."""
        return tensor * self.cos + (tensor @ self.swap) * self.signed_sin
