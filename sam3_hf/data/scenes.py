"""What one sample shows: a picture, or four of them in the quarters of the canvas, and where their objects lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch

from . import transforms
from .images import load_image
from .transforms import Augmentation, GeometricTransform


@dataclass(frozen=True)
class Tile:
    """A picture of a scene: its row, and where it comes to lie on the canvas."""

    row: dict
    transform: GeometricTransform


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        canvas: side in pixels.
        objects: of all tiles.
        transforms: of each object.
        boxes, cut, visible: of `transform_boxes`, for each object.
    """

    canvas: int
    objects: list[dict]
    transforms: list[GeometricTransform]
    boxes: np.ndarray
    cut: np.ndarray
    visible: np.ndarray


def draw_tiles(
    rows: datasets.Dataset, index: int, canvas: int, augmentation: Augmentation, rng: np.random.Generator
) -> list[Tile]:
    """
    The picture at `index`, varied; or, by the chance of a mosaic, with three others. They are not turned where an
    object has a box alone.

    Args:
        canvas: side in pixels.
    """
    if augmentation.mosaic > 0 and rng.random() < augmentation.mosaic:
        tiles = _draw_mosaic(rows, index, canvas, augmentation, rng)
    else:
        tiles = [draw_tile(rows[index], canvas, augmentation, rng)]
    if augmentation.rotation and any(map(_has_box_alone, tiles)):
        tiles = [Tile(tile.row, replace(tile.transform, angle=0.0)) for tile in tiles]
    return tiles


def _draw_mosaic(
    rows: datasets.Dataset, index: int, canvas: int, augmentation: Augmentation, rng: np.random.Generator
) -> list[Tile]:
    side, augmentation = canvas // 2, replace(augmentation, smallest_side=1.0)  # they are small already
    chosen = [index, *(int(other) for other in rng.integers(len(rows), size=3))]
    corners = [(0, 0), (side, 0), (0, side), (side, side)]
    tiles = []
    for position, corner in zip(chosen, rng.permutation(4), strict=True):
        tile, (x, y) = draw_tile(rows[position], side, augmentation, rng), corners[corner]
        moved = replace(tile.transform, x=tile.transform.x + x, y=tile.transform.y + y, canvas=canvas)
        tiles.append(Tile(tile.row, moved))
    return tiles


def _has_box_alone(tile: Tile) -> bool:
    """Whether an object has no mask: the box of a turned one cannot be known."""
    return any(not item["iscrowd"] and not item["segmentation"] for item in tile.row["objects"])


def draw_tile(row: dict, canvas: int, augmentation: Augmentation, rng: np.random.Generator) -> Tile:
    """A picture, varied, on all of a canvas."""
    return Tile(row, transforms.draw_transform(row["width"], row["height"], canvas, augmentation, rng))


def whole_tile(row: dict, canvas: int) -> Tile:
    """A picture as it is, on all of the canvas."""
    return Tile(row, transforms.whole_image(row["width"], row["height"], canvas))


def place(tiles: Sequence[Tile]) -> Scene:
    """Where the objects of pictures come to lie."""
    found = [transforms.transform_boxes(boxes_of(tile.row["objects"]), tile.transform) for tile in tiles]
    boxes, cut, visible = (np.concatenate(parts) for parts in zip(*found, strict=True))
    objects = [item for tile in tiles for item in tile.row["objects"]]
    moves = [tile.transform for tile in tiles for _ in tile.row["objects"]]
    return Scene(tiles[0].transform.canvas, objects, moves, boxes, cut, visible)


def boxes_of(objects: list[dict]) -> np.ndarray:
    """(n, 4) float64 xywh in pixels of the image."""
    return np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)


def tile_pixels(tiles: Sequence[Tile], augmentation: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """(3, canvas, canvas) float32 in [-1, 1] of pictures on their canvas, with the colours of each varied."""
    canvas = None
    for tile in tiles:
        pixels = transforms.pad_to_canvas(_varied(tile, augmentation, rng), tile.transform)
        canvas = pixels if canvas is None else canvas + pixels  # where another picture is, there is black
    return transforms.normalize(canvas)


def _varied(tile: Tile, augmentation: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """(3, side, side) uint8 of a picture under its transform, with its colours varied."""
    row, transform = tile.row, tile.transform
    scale = transform.side / transform.width, transform.side / transform.height
    pixels, factor = load_image(
        row["image"], row["width"], row["height"], (row["width"] * scale[0], row["height"] * scale[1])
    )
    pixels = transforms.transform_pixels(pixels, transform, factor).contiguous()
    if augmentation.color_jitter > 0:
        pixels = transforms.jitter_colors(pixels, augmentation.color_jitter, rng)
        if transform.angle:
            pixels = pixels * transforms.shown(transform.side, transform.angle)  # other contrast leaves black grey
    return pixels
