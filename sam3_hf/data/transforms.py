"""Geometry and colour of training images.

A `GeometricTransform` is drawn first: which part of the image becomes which square of the model's canvas, mirrored and
turned or not. The pixels then follow through torchvision's v2 functions; boxes and polygon corners follow by
arithmetic, so that polygons are rasterised once, at the size that is needed, and only those that are needed.

As in the published fine-tuning of SAM 3, images are made square (their aspect is not kept), 480 to 1008 pixels wide at
a resolution of 1008, and put at a random position on a black canvas. Flips, rotation, crops and colours are additions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..rle import decode_mask, encode_segmentation

SMALLEST_SIDE = 480 / 1008  # sam3 configs/roboflow_v100: RandomResizeAPI min_size and resolution
VISIBLE_SIDE = 1.0  # pixels of the canvas; what a crop leaves of an object must be as wide and high
BLOCK = 8  # crops start and end at multiples, where a JPEG decoded at 1/8 has whole pixels


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        horizontal_flip, vertical_flip: probabilities, 0 to 1; 0 if phrases tell left from right, or up from down.
        rotation: degrees, 0 to 180, that images are turned by at most, to either side; their corners are cut off.
        crop: probability of cutting out a part, 0 to 1.
        smallest_crop: shortest side of that part, as a share of the image's, above 0 up to 1; its aspect is kept.
        smallest_side: least side of the image on the canvas, as a share of the canvas, above 0 up to 1.
        color_jitter: brightness, contrast and saturation are each multiplied by 1 - this to 1 + this; 0 to below 1.
        mosaic: probability, 0 to 1, of four images in the place of one, each in a quarter of the canvas.

    Raises:
        ValueError: a value is out of its range.
    """

    horizontal_flip: float = 0.5
    crop: float = 0.5
    smallest_crop: float = 0.5
    smallest_side: float = SMALLEST_SIDE
    color_jitter: float = 0.2
    vertical_flip: float = 0.0
    rotation: float = 0.0
    mosaic: float = 0.0

    def __post_init__(self):
        for name in ("horizontal_flip", "vertical_flip", "crop", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("smallest_crop", "smallest_side"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be from 0 to 180 degrees, got {self.rotation}")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color_jitter must be from 0 to below 1, got {self.color_jitter}")


@dataclass(frozen=True)
class GeometricTransform:
    """Where a part of an image comes to lie on the model's square canvas.

    Attributes:
        left, top, width, height: the part, in pixels of the image.
        flip: mirrored left to right.
        side: of the square that the part becomes, in pixels of the canvas.
        x, y: its top left corner on the canvas.
        canvas: side of the canvas in pixels.
        vertical: mirrored upside down, too.
        angle: degrees counter-clockwise that the square's content is then turned by about its middle; what leaves the
            square is cut off.
    """

    left: int
    top: int
    width: int
    height: int
    flip: bool
    side: int
    x: int
    y: int
    canvas: int
    vertical: bool = False
    angle: float = 0.0

    def move(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y in pixels of the image -> pixels of the canvas; may lie outside of the square."""
        moved = (points - (self.left, self.top)) * (self.side / self.width, self.side / self.height)
        if self.flip:
            moved[..., 0] = self.side - moved[..., 0]
        if self.vertical:
            moved[..., 1] = self.side - moved[..., 1]
        moved = moved + (self.x, self.y)
        return self.turn(moved) if self.angle else moved

    def turn(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y in pixels of the canvas, turned by the angle."""
        middle, angle = np.array([self.x, self.y]) + self.side / 2, np.deg2rad(self.angle)
        x, y = np.moveaxis(points - middle, -1, 0)
        turned = (np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)  # y points down
        return np.stack(turned, axis=-1) + middle


def whole_image(width: int, height: int, canvas: int) -> GeometricTransform:
    """That of evaluation, as processors resize: all of the image on all of the canvas."""
    return GeometricTransform(0, 0, width, height, False, canvas, 0, 0, canvas)


def draw_transform(
    width: int, height: int, canvas: int, augmentation: Augmentation, rng: np.random.Generator
) -> GeometricTransform:
    """A random transform of a width x height image on a canvas x canvas square."""
    flip = rng.random() < augmentation.horizontal_flip
    left, top, right, bottom = 0, 0, width, height
    if rng.random() < augmentation.crop:
        share = rng.uniform(augmentation.smallest_crop, 1)
        left, right = _draw_interval(width, share, rng)
        top, bottom = _draw_interval(height, share, rng)
    side = int(rng.integers(max(round(canvas * augmentation.smallest_side), 1), canvas + 1))
    x, y = (int(value) for value in rng.integers(0, canvas - side + 1, size=2))
    # Nothing is drawn for what is switched off, so that it leaves the other random numbers as they are.
    vertical = augmentation.vertical_flip > 0 and rng.random() < augmentation.vertical_flip
    angle = rng.uniform(-augmentation.rotation, augmentation.rotation) if augmentation.rotation else 0.0
    return GeometricTransform(left, top, right - left, bottom - top, flip, side, x, y, canvas, vertical, angle)


def _draw_interval(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    size = length * share
    start = rng.uniform(0, length - size)
    first, last = BLOCK * round(start / BLOCK), BLOCK * round((start + size) / BLOCK)
    return (first, min(last, length)) if first < min(last, length) else (0, length)


def transform_pixels(pixels: torch.Tensor, transform: GeometricTransform, factor: int = 1) -> torch.Tensor:
    """The part of the pixels that the transform takes, as it lies on its square (not yet on the canvas).

    Args:
        pixels: (channels, height, width) uint8.
        factor: 1, 2, 4 or 8: the pixels are those of the image divided by so much.

    Returns:
        (channels, side, side) uint8.
    """
    top, left = transform.top // factor, transform.left // factor
    height, width = -(-transform.height // factor), -(-transform.width // factor)
    transformed = F.resized_crop(
        tv_tensors.Image(pixels), top, left, height, width, [transform.side, transform.side], antialias=True
    )
    if transform.flip:
        transformed = F.horizontal_flip(transformed)
    if transform.vertical:
        transformed = F.vertical_flip(transformed)
    if transform.angle:
        transformed = F.rotate(transformed, transform.angle, interpolation=v2.InterpolationMode.BILINEAR)
    return transformed


def jitter_colors(pixels: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Changes brightness, contrast and saturation of (3, height, width) uint8, in random order."""
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    factors = rng.uniform(1 - strength, 1 + strength, size=3)
    for position in rng.permutation(3):
        pixels = adjust[position](pixels, float(factors[position]))
    return pixels


def pad_to_canvas(pixels: torch.Tensor, transform: GeometricTransform) -> torch.Tensor:
    """(channels, side, side) -> (channels, canvas, canvas), zeros around it."""
    rest = transform.canvas - transform.side
    if rest == 0:
        return pixels
    return F.pad(pixels, [transform.x, transform.y, rest - transform.x, rest - transform.y])


def transform_boxes(boxes: np.ndarray, transform: GeometricTransform) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes on the canvas.

    Args:
        boxes: (n, 4) xywh in pixels of the image.

    Returns:
        (boxes, cut, visible): (n, 4) xyxy in pixels of the canvas, clamped to the square of the image; (n,) bool, what
        the crop may have taken something of; (n,) bool, what the crop left at least a pixel of, each way. Where the
        image is turned, boxes are those around turned boxes, not those of the objects.
    """
    if transform.angle:
        return _turn_boxes(*transform_boxes(boxes, replace(transform, angle=0.0)), transform)
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # (n, 2, 2)
    moved = transform.move(corners)
    return _clamp(moved, transform)


def _clamp(points: np.ndarray, transform: GeometricTransform) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`transform_boxes` of the boxes around points, (n, points, 2) on the canvas."""
    around = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)  # a flip swaps left and right
    low = np.array([transform.x, transform.y] * 2)
    clamped = np.clip(around, low, low + transform.side)
    cut = np.abs(clamped - around).max(axis=1, initial=0) > 1e-6
    sides = clamped[:, 2:] - clamped[:, :2]
    return clamped, cut, ~cut | (sides >= VISIBLE_SIDE).all(axis=1)


def _turn_boxes(
    boxes: np.ndarray, cut: np.ndarray, visible: np.ndarray, transform: GeometricTransform
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    turned, cut_by_turning, left = _clamp(transform.turn(corners), transform)
    return turned, cut | cut_by_turning, visible & left


def transform_mask(segmentation: list | dict, transform: GeometricTransform) -> torch.Tensor:
    """The pixels of one object on the canvas: (canvas, canvas) bool.

    Args:
        segmentation: polygons in pixels of the image, or a compressed run-length encoding.
    """
    side, canvas = transform.side, torch.zeros(transform.canvas, transform.canvas, dtype=torch.bool)
    if isinstance(segmentation, list):
        corner = np.array([transform.x, transform.y])
        polygons = [transform.move(np.array(polygon, dtype=np.float64).reshape(-1, 2)) for polygon in segmentation]
        flat = [(polygon - corner).reshape(-1).tolist() for polygon in polygons]
        inside = torch.from_numpy(decode_mask(encode_segmentation(flat, side, side)))
        if transform.angle:
            inside &= shown(side, transform.angle)  # the polygon may go on where the crop has ended
    else:
        mask = torch.from_numpy(np.ascontiguousarray(decode_mask(segmentation)).view(np.uint8))
        inside = transform_pixels(mask[None] * 255, transform)[0] > 127  # as the image: half covered is inside
    canvas[transform.y : transform.y + side, transform.x : transform.x + side] = inside
    return canvas


@lru_cache(maxsize=8)  # one is asked for again with each object of an image
def shown(side: int, angle: float) -> torch.Tensor:
    """Where a turned square shows something of the image: (side, side) bool."""
    square = GeometricTransform(0, 0, side, side, False, side, 0, 0, side, angle=angle)
    corners = square.move(np.array([[0.0, 0.0], [side, 0.0], [side, side], [0.0, side]]))
    return torch.from_numpy(decode_mask(encode_segmentation([corners.reshape(-1).tolist()], side, side)))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0 to 255 -> float32 -1 to 1: mean and deviation 0.5, as SAM 3's processors do."""
    return v2.functional.to_dtype(pixels, torch.float32).div_(127.5).sub_(1)


def mask_box(mask: torch.Tensor) -> np.ndarray:
    """(4,) xyxy in pixels around the True pixels of a (height, width) bool mask that has some."""
    rows, columns = torch.nonzero(mask.any(dim=1))[:, 0], torch.nonzero(mask.any(dim=0))[:, 0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
