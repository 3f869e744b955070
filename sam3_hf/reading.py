"""Images in any of their forms, as pixels."""

from __future__ import annotations

import logging
import os
import stat
import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .downloads import download, is_url

logger = logging.getLogger(__name__)

ImageInput = str | os.PathLike | Image.Image | np.ndarray | Tensor

# The formats that files are read in, by Pillow's names; PPM stands for PBM, PGM and PNM as well, JPEG for MPO.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000
_FILE_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def read_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS, private_addresses: bool = False) -> Tensor:
    """
    Args:
        image: path, URL (`http://`, `https://`), PIL image, array `(height, width[, channels])` or tensor
            `(channels, height, width)`. 1 channel is grey, a fourth one (opacity) is left out. Arrays and tensors are
            uint8, or float in [0, 1]. The EXIF orientation of files and PIL images is applied. Files are BMP, GIF,
            JPEG, PNG, PBM to PPM, TIFF or WebP; of several frames or pages the first is read, with a warning.
        max_pixels: most pixels (width times height) of a file or URL. Pillow's own limit stays: 178,956,970 unless
            `PIL.Image.MAX_IMAGE_PIXELS` is changed.
        private_addresses: whether a URL may lead to this machine or a local network, see
            [`~sam3_hf.downloads.download`].

    Returns:
        `(3, height, width)` uint8 RGB on the CPU.

    Raises:
        OSError: the file is missing, too large, of another format or cannot be decoded, or the URL cannot be had; the
            message names it.
        ValueError: a shape, dtype or range other than these.
        TypeError: no image at all.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_source(os.fspath(image), max_pixels, private_addresses)
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


def has_deep_colour(image: Image.Image) -> bool:
    """Whether an image of a file, not decoded yet, has colour of 16 bits, of which Pillow keeps the upper 8."""
    return image.mode in ("RGB", "RGBA") and ";16" in str(getattr(image, "tile", ""))


def refuse_dark(pixels: np.ndarray) -> None:
    """
    Args:
        pixels: `(height, width, 3)` uint8, the upper 8 bits of 16.

    Raises:
        ValueError: only the lower 12 of the 16 were used, which left almost black.
    """
    if 0 < pixels.max() < 16:
        raise ValueError("colour of 16 bits that uses 12 at most: save it with 8 bits")


def _read_source(source: str, max_pixels: int, private_addresses: bool) -> Tensor:
    if is_url(source):
        file = BytesIO(download(source, private_addresses=private_addresses))
    else:
        _check_regular(source)
        file = source
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
            pixels = _decode(source, file, max_pixels)
    except Exception as error:  # Pillow's readers raise any, from struct.error to NotImplementedError
        reason = _unknown_format(error) or str(error) or type(error).__name__
        raise OSError(f"cannot decode image {source}: {reason}") from error
    for note in dict.fromkeys(str(note.message).strip() for note in notes):
        logger.warning("%s: %s", source, note)
    return pixels


def _decode(source: str, file: str | BytesIO, max_pixels: int) -> Tensor:
    with Image.open(file, formats=FORMATS) as image:
        _check_size(image, max_pixels)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # photographs and their previews
            logger.warning("%s has several frames or pages: the first is used.", source)
            image.seek(0)
        return _from_pil(image)


def _check_regular(path: str) -> None:
    """Refuses what is no file: opening a pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte
        raise OSError(f"cannot read image {path!r}: {error}") from error
    if not stat.S_ISREG(mode):
        raise OSError(f"cannot read image {path}: it is no file, but a {_FILE_KINDS.get(stat.S_IFMT(mode), 'device')}")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise OSError(f"it has {width} x {height} pixels, more than {max_pixels:,}: allow that by `max_pixels`")


def _unknown_format(error: Exception) -> str | None:
    if isinstance(error, UnidentifiedImageError):
        return f"it is damaged or of none of the formats {', '.join(FORMATS)}; save it as PNG"
    return None


def _from_pil(image: Image.Image) -> Tensor:
    deep = has_deep_colour(image)
    image.load()  # a file that is cut off is named as such, before its orientation is asked for
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if not isinstance(orientation, int):
        raise OSError(f"its EXIF orientation is {orientation!r}, no number: save it without EXIF data")
    upright = ImageOps.exif_transpose(image)
    pixels = np.array(to_rgb(upright))
    if deep:
        refuse_dark(pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
