"""The pictures of the page: uploaded or an example, small enough to be shown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..picture_files import find_pictures
from ..reading import read_image
from ..visualization import LONGEST_SIDE
from .phrases import example_text

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_EXAMPLES = 12
ASSETS = Path(__file__).parents[1] / "assets" / "page"
PACKAGED_PHRASES = {  # for `tiny-standard`, whose training never had the second of the first three
    "shapes-1.jpg": "star, checkered heart, orange ring, large orange star",
    "shapes-2.jpg": "ring, dotted crescent, checkered ring, large checkered ring",
    "shapes-3.jpg": "star, green star, dotted ring, small dotted ring",
    "shapes-4.jpg": "ring, red triangle, striped cross, small red circle",
}


@dataclass
class Picture:
    """
    Args:
        name: of its file.
        path: of its file.
        size: height and width in pixels.
        shown: `(3, h, w)` uint8, scaled down to be drawn on.
        max_pixels: as for [`read_image`].
    """

    name: str
    path: Path
    size: tuple[int, int]
    shown: Tensor
    max_pixels: int = MAX_PIXELS

    def read(self) -> Tensor:
        """`(3, height, width)` uint8. Errors as [`open_picture`]."""
        return _read(self.path, self.max_pixels)


@dataclass
class Example:
    """A picture, and phrases to look for in it."""

    picture: Picture
    phrases: str = ""


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """
    Raises:
        OSError: the file is gone, larger than `MAX_BYTES`, has more pixels, or cannot be decoded. The message has the
            name of the file without its folder, which on a server is nobody's business.
    """
    pixels = _read(path, max_pixels)
    height, width = pixels.shape[1:]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((LONGEST_SIDE[1],) * 2, Image.Resampling.LANCZOS)
    return Picture(path.name, path, (height, width), _as_tensor(image), max_pixels)


def find_examples(
    folder: Path | None, vocabulary: Sequence[str] | None, max_pixels: int = MAX_PIXELS
) -> list[Example]:
    """
    The first `MAX_EXAMPLES` pictures of a folder.

    Args:
        folder: default: the packaged pictures of the composed world (`sam3_hf.data.composed`), with phrases that
            models of the demo know.
        vocabulary: all phrases that the model knows, if there is an end to them; see [`example_text`].

    Raises:
        ValueError: there are none.
        OSError: one of them cannot be read.
    """
    found = find_pictures([str(folder or ASSETS)], exclude=ASSETS / "none")[:MAX_EXAMPLES]
    own = PACKAGED_PHRASES if folder is None else {}
    return [
        Example(open_picture(path, max_pixels), example_text(vocabulary) if vocabulary else own.get(path.name, ""))
        for path, _ in found
    ]


def as_url(image: Tensor | Image.Image, longest_side: int | None = None) -> str:
    """
    A picture as a `data:` URL of a PNG, so that it needs no file.

    Args:
        image: PIL, or `(3, height, width)` uint8.
        longest_side: scales larger ones down to so many pixels.
    """
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    if longest_side is not None:
        image = image.copy()
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # more takes longer than a slider should
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read(path: Path, max_pixels: int) -> Tensor:
    name = path.name
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise OSError(f"{name} has {size / 2**20:.0f} MiB, more than {MAX_BYTES / 2**20:.0f}: make it smaller")
        return read_image(path, max_pixels=max_pixels)
    except FileNotFoundError as error:
        raise OSError(f"{name} is not there any more: choose it again") from error
    except OSError as error:
        raise OSError(str(error).replace(str(path), name)) from error


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
