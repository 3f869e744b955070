"""Images in any of their forms, as pixels."""

from __future__ import annotations

import os
import warnings

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
    """
    `image.convert("RGB")`, but grey of more than 8 bits through `to_8_bits`, where Pillow would clip at 255; its note
    is given as a Python warning.

    Raises:
        ValueError: as `to_8_bits`.
    """
    image, note = to_8_bits(image)
    if note:
        warnings.warn(note, stacklevel=2)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image: Image.Image) -> tuple[Image.Image, str | None]:
    """
    Grey of 16 or 32 bits, or in floats, as 8 bits; other images as they are.

    Whole numbers are taken for 8, 12 or 16 bits, the fewest that hold the largest of them: microscopes and X-ray
    detectors store 12 bits in files of 16. Floats are from 0 to 1.

    Returns:
        (image, what the user should know of how it was read or None)

    Raises:
        ValueError: the values are in none of these ranges.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image, None
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise ValueError(f"floats (mode F) from {low:g} to {high:g}: scale them to 0..1, or save it with 8 bits")
        return Image.fromarray((values * 255).round().astype(np.uint8)), None
    if low < 0 or high >= 2**16:
        raise ValueError(f"integers (mode {image.mode}) from {low} to {high}: save it with 8 bits, or 16 without sign")
    bits = next(bits for bits in (8, 12, 16) if high < 2**bits)
    note = f"grey of 16 bits or more (mode {image.mode}) that uses {bits} was read as of {bits} bits"
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)), note if 0 < high < 2**12 else None


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
