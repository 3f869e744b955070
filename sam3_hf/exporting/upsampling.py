"""Upsampling by convolutions of a coarser map: runtimes have transposed ones neither in int8 nor fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CellConv(nn.Module):
    """
    As a transposed convolution with kernel and stride 2, and a 1 x 1 convolution behind it if there is one, by one
    1 x 1 convolution that makes the four pixels of a cell as channels.
    """

    def __init__(self, upsampling: nn.ConvTranspose2d, following: nn.Conv2d | None = None):
        super().__init__()
        with torch.no_grad():
            weight, bias = upsampling.weight, upsampling.bias  # (in, out, 2, 2)
            if following is not None:
                mixing = following.weight[..., 0, 0].double()
                weight = torch.einsum("iohw,po->iphw", weight.double(), mixing).to(weight)
                bias = (mixing @ bias.double()).to(bias) + following.bias
            self.conv = nn.Conv2d(len(weight), 4 * len(bias), 1)
            self.conv.weight = nn.Parameter(weight.flatten(1).T[..., None, None].contiguous())
            self.conv.bias = nn.Parameter(bias.repeat_interleave(4))

    @property
    def weight(self) -> Tensor:
        """Whose dtype a level of the neck computes in."""
        return self.conv.weight

    def forward(self, pixels: Tensor) -> Tensor:
        """`(images, in, h, w)` to `(images, out, 2 * h, 2 * w)`."""
        return F.pixel_shuffle(self.conv(pixels), 2)


class ConvOfUpsampled(nn.Module):
    """As `conv_of_upsampled`, by a 2 x 2 convolution that makes the four pixels of a cell as channels."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        with torch.no_grad():
            above, here, below = conv.weight.unbind(2)
            rows = (torch.stack([above, here + below], 2), torch.stack([above + here, below], 2))
            kernels = []
            for row in rows:
                left, own, right = row.unbind(3)
                kernels += [torch.stack([left, own + right], 3), torch.stack([left + own, right], 3)]
        out_channels, in_channels = conv.weight.shape[:2]
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 2, padding=1, bias=False)
        self.conv.weight = nn.Parameter(torch.cat(kernels))

    def forward(self, pixels: Tensor) -> Tensor:
        """`(maps, hidden, h, w)` to `(maps, hidden, 2 * h, 2 * w)`."""
        height, width = pixels.shape[-2:]
        upper_left, upper_right, lower_left, lower_right = self.conv(pixels).chunk(4, dim=1)
        upper = [upper_left[..., :height, :width], upper_right[..., :height, 1:]]
        lower = [lower_left[..., 1:, :width], lower_right[..., 1:, 1:]]
        return F.pixel_shuffle(torch.stack(upper + lower, dim=2).flatten(1, 2), 2)
