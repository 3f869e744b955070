"""Mask head of SAM 3 Lite: the masks of the stock one, with less arithmetic per prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam3.modeling_sam3 import Sam3MaskDecoder

from .precision_sam3_lite import GroupNorm

# From this many prompts per image on, convolving the image's own map apart from the prompts' costs less than
# convolving their sums: 9 + 4 * prompts against 9 * prompts multiplications per pixel and pair of channels.
PROMPTS_THAT_SHARE = 2


def conv_of_upsampled(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """
    `conv(upsampled)` without bias, where `upsampled` has every pixel four times: `(maps, hidden, h, w)` to
    `(maps, hidden, 2 * h, 2 * w)`, for a 3 x 3 kernel with padding 1.

    Two of three neighbouring pixels are copies of one, so that four weights are left of nine: the sums that a 4 x 4
    kernel of a transposed convolution of stride 2 holds.
    """
    kernel = _fold(_fold(conv.weight, 2), 3).transpose(0, 1)
    return F.conv_transpose2d(pixels, kernel, stride=2, padding=1)


def _fold(weight: Tensor, dim: int) -> Tensor:
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


class Sam3LiteMaskDecoder(Sam3MaskDecoder):
    """
    The stock mask head, split so that masks can be computed for some queries only. `instance_projection` is applied to
    the queries instead of to every pixel, which gives the same products.
    """

    def __init__(self, config):
        super().__init__(config)
        self.pixel_decoder.norms = nn.ModuleList(
            GroupNorm(norm.num_groups, norm.num_channels, norm.eps) for norm in self.pixel_decoder.norms
        )

    def shared_maps(self, levels: tuple[Tensor, ...], num_prompts: int) -> tuple[Tensor, ...] | None:
        """
        What all prompts of an image have in common, for `forward` of some of them at a time: convolutions of the
        image's own maps `(images, hidden, h, w)`, coarse to fine. None if there are too few prompts to gain from it.
        """
        if num_prompts < PROMPTS_THAT_SHARE * len(levels[0]):
            return None
        pairs = zip(reversed(levels[:-1]), self.pixel_decoder.conv_layers, strict=True)
        return tuple(conv(level) for level, conv in pairs)

    def forward(
        self,
        levels: tuple[Tensor, ...],
        encoded: Tensor,
        image_index: Tensor,
        prompt: Tensor,
        prompt_bias: Tensor | None,
        shared: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """
        Args:
            levels: vision maps `(images, hidden, h, w)`, fine to coarse, each half as large as the one before.
            encoded: `(prompts, height * width, hidden)` from the DETR encoder.
            image_index: `(prompts,)` int.
            prompt: `(prompts, tokens, hidden)`.
            prompt_bias: additive mask `(prompts, 1, 1, tokens)`.
            shared: from `shared_maps` of all prompts, where these are some of them.

        Returns:
            Pixel features `(prompts, hidden, h, w)` at the finest level, for `masks`, `matched_masks` and
            `semantic_projection`.
        """
        attended, _ = self.prompt_cross_attn(
            query=self.prompt_cross_attn_norm(encoded), key=prompt, value=prompt, attention_mask=prompt_bias
        )
        encoded = encoded + self.prompt_cross_attn_dropout(attended)
        pixels = encoded.transpose(1, 2).unflatten(2, levels[-1].shape[-2:])
        if shared is None:
            shared = self.shared_maps(levels, len(image_index))
        for i, (conv, norm) in enumerate(zip(self.pixel_decoder.conv_layers, self.pixel_decoder.norms, strict=True)):
            # Maps are channels-last already, except behind a CUDA GroupNorm of older PyTorch.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            if shared is None:
                level = levels[-2 - i]
                pixels = conv(F.interpolate(pixels, scale_factor=2.0, mode="nearest") + level[image_index])
            else:
                pixels = conv_of_upsampled(conv, pixels)
                pixels += shared[i] if len(shared[i]) == 1 else shared[i][image_index]
            pixels = F.relu(norm(pixels))
        return pixels

    def masks(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """
        Mask logits `(prompts, queries, h, w)` of `queries` `(prompts, queries, hidden)` on the pixel features of
        `forward`.
        """
        weight, bias = self._mask_weights(queries)
        return torch.baddbmm(bias, weight, pixels.flatten(2)).unflatten(2, pixels.shape[-2:])

    def matched_masks(self, queries: Tensor, pixels: Tensor, prompt_index: Tensor, query_index: Tensor) -> Tensor:
        """
        Mask logits of single queries, without a copy of the pixel map per query.

        Args:
            queries: `(prompts, queries, hidden)`.
            pixels: `(prompts, hidden, h, w)`, the pixel features of `forward`.
            prompt_index, query_index: `(matches,)` int, sorted by prompt. On the CPU, as the matching leaves them,
                nothing waits for the device.

        Returns:
            `(matches, h, w)`.
        """
        counts = torch.bincount(prompt_index, minlength=len(pixels)).tolist()
        chosen = (index.to(queries.device, non_blocking=True) for index in (prompt_index, query_index))
        weights, biases = self._mask_weights(queries[tuple(chosen)])
        rows = [
            torch.addmm(bias, weight, pixel.flatten(1))
            for weight, bias, pixel in zip(weights.split(counts), biases.split(counts), pixels, strict=True)
        ]
        return torch.cat(rows).unflatten(1, pixels.shape[-2:])

    def _mask_weights(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The linear map `(..., hidden)` and bias `(..., 1)` from pixel features to the mask logits of each query."""
        embeds = self.mask_embedder(queries)
        projection = self.instance_projection
        return embeds @ projection.weight.flatten(1), (embeds @ projection.bias)[..., None]
