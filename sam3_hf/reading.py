"""Images in any of their forms, as pixels."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import load_image

ImageInput = str | os.PathLike | Image.Image | np.ndarray | Tensor


def read_image(image: ImageInput) -> Tensor:
    """
    Args:
        image: path, URL (`http://`, `https://`), PIL image, array `(height, width[, channels])` or tensor
            `(channels, height, width)`. 1 channel is grey, a fourth one (opacity) is left out. Arrays and tensors are
            uint8, or float in [0, 1]. The EXIF orientation of files and PIL images is applied.

    Returns:
        `(3, height, width)` uint8 RGB on the CPU.

    Raises:
        OSError: the file is missing or cannot be decoded; the message names it.
        ValueError: a shape, dtype or range other than these.
        TypeError: no image at all.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_file(os.fspath(image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        return _check_pixels(pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0), "(height, width, channels)")
    if isinstance(image, Tensor):
        return _check_pixels(image.detach().cpu(), "(channels, height, width)")
    raise TypeError(f"An image is a path, URL, PIL image, array or tensor, not {type(image).__name__}.")


def to_rgb(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`, and of 16-bit grey the upper 8 bits, where Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _read_file(source: str) -> Tensor:
    try:
        if source.startswith(("http://", "https://")):
            return _from_pil(load_image(source))
        with Image.open(source) as image:
            return _from_pil(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise OSError(f"cannot decode image {source}: {error}") from error


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(to_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)


def _check_pixels(pixels: Tensor, layout: str) -> Tensor:
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"Expected {layout} with 1, 3 or 4 channels, got channels, height, width = {tuple(pixels.shape)}."
        )
    pixels = pixels[:3].expand(3, -1, -1)
    if pixels.is_floating_point():
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("Images in floats must be in [0, 1]: divide by 255, or pass uint8.")
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"Images must be uint8, or float in [0, 1], got {pixels.dtype}.")
    return pixels.contiguous()
