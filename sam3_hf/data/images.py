"""Image files: their size as annotations mean it, their soundness, their pixels.

EXIF orientation. Annotation tools show photographs upright, and their files state the upright size; COCO's own files
state the size as stored. So the orientation is applied unless the stated size is the stored one and the upright one
differs from it. Where both are equal (square images, upside-down or mirrored ones) it is applied.
"""

import logging
import os
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps

from ..reading import has_deep_colour, refuse_dark, to_8_bits, to_rgb

logger = logging.getLogger(__name__)

ORIENTATION_TAG = 0x0112  # EXIF
SWAPS_SIDES = (5, 6, 7, 8)  # orientations that turn by a quarter
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL_BYTES = 1024  # some cameras write a little after the end marker

_told: set[str] = set()


def open_image(source: dict) -> Image.Image:
    """Opens {"path": str | None, "bytes": bytes | None} without decoding; bytes win over the path."""
    return Image.open(source["path"] if source["bytes"] is None else BytesIO(source["bytes"]))


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where none is stated."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking for it would decode the whole file
    value = image.getexif().get(ORIENTATION_TAG, 1)
    return value if value in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied."""
    return image.size[::-1] if orientation(image) in SWAPS_SIDES else image.size


def is_turned(image: Image.Image, width: int, height: int) -> bool:
    """Whether the EXIF orientation is to be applied, given the size in the annotations; see the module's text."""
    return orientation(image) != 1 and (upright_size(image) == (width, height) or image.size != (width, height))


def image_fault(source: dict, width: int, height: int) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with an image; None if nothing is.

    Args:
        source: {"path", "bytes"}.
        width, height: stated size in pixels.
    """
    if source["bytes"] is None and not os.path.isfile(source["path"]):
        return "missing image", f"there is no file {source['path']}"
    try:
        with open_image(source) as image:
            if (width, height) not in (image.size, upright_size(image)):
                stated, real = f"{width}x{height}", "{}x{}".format(*upright_size(image))
                return "image size differs", f"{stated} in the annotations, {real} in the file"
            if not _ends_properly(source, image.format):
                image.load()
    except Exception as error:  # as in `load_image`
        return "unreadable image", f"{source['path'] or 'embedded image'}: {error}"
    return None


def _ends_properly(source: dict, file_format: str) -> bool:
    """Whether the end marker of the format is there, which a file cut off in transfer lacks."""
    if file_format not in END_MARKERS:
        return False
    if source["bytes"] is not None:
        tail = source["bytes"][-TAIL_BYTES:]
    else:
        with open(source["path"], "rb") as file:
            file.seek(-min(TAIL_BYTES, os.path.getsize(source["path"])), os.SEEK_END)
            tail = file.read()
    return END_MARKERS[file_format] in tail


def tell_once(source: dict, note: str) -> None:
    """Logs how an image is read, for the first one that it is true of in this process."""
    if note not in _told:
        _told.add(note)
        logger.warning("%s: %s; others alike are not named", source["path"] or "embedded image", note)


def load_image(source: dict, width: int, height: int, at_least: tuple[float, float] | None = None):
    """Decodes an image, upright as its annotations mean it.

    Args:
        source: {"path", "bytes"}.
        width, height: size in pixels that annotations refer to.
        at_least: (width, height) that is enough; JPEG files are then decoded at 1/2, 1/4 or 1/8, if that is as large.

    Returns:
        (pixels, factor): (3, height, width) uint8 RGB, and the 1, 2, 4 or 8 by which sides were divided (rounded up).

    Raises:
        OSError: the file is missing or broken, or its values are in no known range; the message names it.
    """
    try:
        with open_image(source) as image:
            factor, turned = 1, is_turned(image, width, height)
            deep = has_deep_colour(image)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # photographs and their previews
                tell_once(source, "has several frames or pages, of which the first is used")
            if at_least is not None:
                sides = at_least[::-1] if turned and orientation(image) in SWAPS_SIDES else at_least
                stored_width = image.size[0]
                drafted = image.draft("RGB", tuple(int(np.ceil(side)) for side in sides))
                factor = 1 if drafted is None else round(stored_width / drafted[1][2])
            if turned:
                image = ImageOps.exif_transpose(image)
            image, note = to_8_bits(image)
            pixels = np.array(to_rgb(image))  # (height, width, 3)
            if deep:
                refuse_dark(pixels)
            if note:
                tell_once(source, note)
    except Exception as error:  # damage makes Pillow's readers raise whatever they run into
        raise OSError(f"cannot decode image {source['path'] or '(embedded)'}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1), factor
