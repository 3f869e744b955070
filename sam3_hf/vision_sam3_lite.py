"""Vision encoder of SAM 3 Lite: the arithmetic of the stock one with fewer passes over memory."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam3.modeling_sam3 import (
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
    Sam3VisionModel,
    Sam3VisionNeck,
    Sam3ViTEmbeddings,
    Sam3ViTLayer,
    Sam3ViTModel,
    Sam3ViTRoPEAttention,
    eager_attention_forward,
    window_partition,
    window_unpartition,
)

from .precision_sam3_lite import matmul_precision
from .recomputation_sam3_lite import recomputed


class Rotation(NamedTuple):
    """Rotary position table of one kind of layer: each pair of channels turns by an angle per position."""

    cos: Tensor  # (1, positions, head size)
    signed_sin: Tensor  # (1, positions, head size), negative for the first channel of each pair

    def turn(self, tensor: Tensor) -> Tensor:
        """`(batch, heads, positions, head size)` turned by its positions, in its own dtype."""
        swapped = tensor.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(tensor * self.cos, swapped, self.signed_sin)


class Sam3LiteViTAttention(Sam3ViTRoPEAttention):
    """
    The stock attention, with rotary positions applied in the precision of the products they feed, and without the
    output projection, which is left to the layer.
    """

    def forward(self, hidden_states: Tensor, rotation: Rotation) -> Tensor:
        """`(windows, height, width, hidden)` to the same, each window attending to itself."""
        windows, height, width, _ = hidden_states.shape
        shape = (windows, height * width, self.num_attention_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            self,
            rotation.turn(query),
            rotation.turn(key),
            value,
            attention_mask=None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        return attended.reshape(windows, height, width, -1)


class Sam3LiteViTLayer(Sam3ViTLayer):
    """The stock layer on tokens that are in windows already, or that it puts into windows for its attention only."""

    def __init__(self, config, window_size: int = 0):
        super().__init__(config, window_size)
        self.attention = Sam3LiteViTAttention(config)

    def forward(self, hidden_states: Tensor, rotation: Rotation, window: int) -> Tensor:
        """
        Args:
            hidden_states: `(images, height, width, hidden)`, or windows of it `(windows, size, size, hidden)`.
            rotation: of the positions that attend to each other.
            window: side of the windows to cut for the attention, 0 for none. They reach over the edge if they must:
                there, keys and values are those of a zero vector, as in the stock layer.
        """
        normed = matmul_precision(self.layer_norm1(hidden_states))
        if window:
            windows, padded = window_partition(normed, window)
            attended = window_unpartition(self.attention(windows, rotation), window, padded, normed.shape[1:3])
        else:
            attended = self.attention(normed, rotation)
        mlp = self.mlp

        def widen(stream: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
            stream = stream + self.attention.o_proj(attended)
            return stream, mlp.fc1(matmul_precision(self.layer_norm2(stream)))

        def rest(wide: Tensor) -> Tensor:
            return mlp.fc2(mlp.activation_fn(mlp.dropout(wide)))

        # The float32 stream and what is wide cost more memory to keep than time to make again.
        hidden_states, wide = recomputed(widen, hidden_states, attended)
        return hidden_states + self.dropout(recomputed(rest, wide))


class Sam3LiteViTModel(Sam3ViTModel):
    """
    The stock ViT with tokens put into windows once per run of windowed layers instead of in each of them, where the
    windows fit; one rotary table per kind of layer instead of one per layer; and positions told apart from the first
    step of a training from scratch.
    """

    def __init__(self, config):
        super(Sam3ViTModel, self).__init__(config)
        self.embeddings = Sam3ViTEmbeddings(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        windows = [
            0 if i in config.global_attn_indexes else config.window_size for i in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList([Sam3LiteViTLayer(config, window_size=size) for size in windows])
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Sam3ViTEmbeddings):
            # Sine encodings as large as the content: what looks alike differs by position only, and boxes and masks
            # need that at once. Wavelengths are 6 patches and more.
            _, num_patches, width = module.position_embeddings.shape
            side = round(num_patches**0.5)
            encoding = Sam3SinePositionEmbedding.build_sine_position_embedding(
                torch.Size((1, width, side, side)),
                module.position_embeddings.device,
                torch.float32,
                num_position_features=width // 2,
                temperature=100,
            )
            encoding = encoding.flatten(2).transpose(1, 2).to(module.position_embeddings.dtype)
            init.copy_(module.position_embeddings, encoding)

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """
        Args:
            pixel_values: `(images, 3, height, width)`, sides a multiple of the patch size.

        Returns:
            `last_hidden_state` `(images, tokens, hidden)`.
        """
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        window = self.config.window_size
        # Windows that reach over the edge are for the attention only: all else would compute what is cut off again.
        fits = height % window == 0 and width % window == 0
        hidden_states = self.layer_norm(self.embeddings(pixel_values).unflatten(1, (height, width)))
        rotations = {}
        for size, layers in groupby(self.layers, key=lambda layer: layer.window_size):
            layers = list(layers)
            if size not in rotations:
                rotations[size] = self.rotation(layers[0], hidden_states)
            if size and fits:
                hidden_states, _ = window_partition(hidden_states, size)
            for layer in layers:
                hidden_states = layer(hidden_states, rotations[size], 0 if fits else size)
            if size and fits:
                hidden_states = window_unpartition(hidden_states, size, (height, width), (height, width))
        return BaseModelOutput(last_hidden_state=hidden_states.flatten(1, 2))

    @staticmethod
    def rotation(layer: Sam3LiteViTLayer, hidden_states: Tensor) -> Rotation:
        """The table of a kind of layer, in the dtype of the products it feeds."""
        cos, sin = layer.rotary_emb(hidden_states, layer.position_ids)
        half = sin[..., ::2]  # angles are the same for both channels of a pair
        signed_sin = torch.stack((-half, half), dim=-1).flatten(-2)
        return Rotation(*(matmul_precision(table.to(hidden_states.dtype)) for table in (cos, signed_sin)))


class Sam3LiteVisionModel(Sam3VisionModel):
    """The stock vision encoder without position encodings for levels that the detector never attends to."""

    def __init__(self, config):
        super(Sam3VisionModel, self).__init__(config)
        self.backbone = Sam3LiteViTModel(config.backbone_config)
        self.neck = Sam3VisionNeck(config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        # Keeps the scale of the ViT: features many times as large as the prompt's would drown what the prompt adds.
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.ConvTranspose2d):  # stride equals kernel: one weight per input channel
            init.normal_(module.weight, std=module.in_channels**-0.5)

    def forward(self, pixel_values: Tensor) -> Sam3VisionEncoderOutput:
        """
        Args:
            pixel_values: `(images, 3, height, width)`, normalised, sides a multiple of the patch size.

        Returns:
            `last_hidden_state` `(images, tokens, width)` and `fpn_hidden_states`, three maps `(images, 256, h, w)`
            from fine (4 cells per patch side) to coarse (1 per patch).
        """
        hidden_states = self.backbone(pixel_values).last_hidden_state
        patch_size = self.config.backbone_config.patch_size
        height, width = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
        grid = hidden_states.view(hidden_states.shape[0], height, width, -1).permute(0, 3, 1, 2)
        levels = tuple(recomputed(layer, grid) for layer in self.neck.fpn_layers)
        return Sam3VisionEncoderOutput(last_hidden_state=hidden_states, fpn_hidden_states=levels)
