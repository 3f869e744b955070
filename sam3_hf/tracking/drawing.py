"""A film of what was followed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ..rle import decode_mask
from ..visualization import LONGEST_SIDE, draw_instances, instance_color
from .tracker import TrackedObject

QUALITY = {"crf": "20", "preset": "veryfast"}  # of x264


class FilmWriter:
    """
    Writes pictures as an MP4 film (H.264), all at the size of the first, which is made even.

    Args:
        path: of the file; its name may have any ending.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float):
        import av

        self._container = av.open(str(path), "w", format="mp4")
        rate = Fraction(rate).limit_denominator(1001 * 60)
        self._stream = self._container.add_stream("libx264", rate=rate, options=QUALITY)
        self._stream.pix_fmt = "yuv420p"
        self._frame = av.VideoFrame
        self._size = None

    def add(self, picture: Image.Image) -> None:
        if self._size is None:
            self._size = tuple(max(side - side % 2, 2) for side in picture.size)
            self._stream.width, self._stream.height = self._size
        picture = picture if picture.size == self._size else picture.resize(self._size)
        self._container.mux(self._stream.encode(self._frame.from_image(picture)))

    def close(self) -> None:
        if self._size is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def draw_objects(picture: np.ndarray, objects: Sequence[TrackedObject], size: tuple[int, int]) -> Image.Image:
    """
    Objects drawn over their frame, which may be smaller than that in which they were found. The colour of an object
    follows from its id.

    Args:
        picture: `(h, w, 3)` uint8.
        size: height and width of the frame that masks and boxes are of.
    """
    height, width = picture.shape[:2]
    scale = np.array([width, height] * 2) / [size[1], size[0], size[1], size[0]]
    masks = None
    if objects and objects[0].rle is not None:
        masks = np.stack([_reduced(decode_mask(each.rle), (width, height)) for each in objects])
    return draw_instances(
        picture,
        np.array([each.box for each in objects]).reshape(-1, 4) * scale,
        masks,
        [f"{each.id} {each.label}" for each in objects],
        colors=[instance_color(each.id - 1) for each in objects],
        crowded=False,
    )


def reduced(pixels: np.ndarray) -> np.ndarray:
    """`(h, w, 3)` uint8 with sides of at most 1280 pixels, as drawings have."""
    scale = LONGEST_SIDE[1] / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    width, height = (max(1, round(side * scale)) for side in pixels.shape[1::-1])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _reduced(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = Image.fromarray(mask).convert("L")
    return np.asarray(whole if whole.size == size else whole.resize(size, Image.Resampling.BOX)) >= 128
