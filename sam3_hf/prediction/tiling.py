"""Large images in overlapping tiles, and their detections as those of one image."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..rle import cut_mask, ious, unite_masks

# Two tiles see the same thing if, where both look, their masks overlap by as much.
SAME_OBJECT_IOU = 0.5


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: Tile) -> Tile | None:
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return Tile(left, top, right, bottom) if left < right and top < bottom else None


class Part(NamedTuple):
    """A detection in one tile, in pixels of the whole image."""

    label: str
    score: float
    box: Tensor  # (4,) float32 xyxy
    rle: dict
    tile: Tile


def cut_tiles(height: int, width: int, side: int | None, overlap: int) -> list[Tile]:
    """
    Args:
        height, width: of the image.
        side: of a tile; tiles are smaller only where the image is. None for the whole image.
        overlap: pixels that neighbours share at least; the last ones of a row or column may share more.
    """
    if side is None:
        return [Tile(0, 0, width, height)]
    return [
        Tile(left, top, min(left + side, width), min(top + side, height))
        for top in _starts(height, side, overlap)
        for left in _starts(width, side, overlap)
    ]


def _starts(length: int, side: int, overlap: int) -> list[int]:
    last = max(length - side, 0)
    return [*range(0, last, side - overlap), last]


def join_parts(parts: list[Part]) -> list[Part]:
    """
    One detection for each object: parts of one label in different tiles belong together if their masks agree in the
    rectangle that both tiles show. This holds for an object that both show whole and for one that the seam cuts, and
    from tile to tile for one that is larger than a tile. The result has the union of the masks, the box around the
    boxes, and the score and tile of the best part.
    """
    root = list(range(len(parts)))

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for first, second in combinations(range(len(parts)), 2):
        if find(first) != find(second) and _same_object(parts[first], parts[second]):
            root[find(second)] = find(first)
    groups: dict[int, list[Part]] = {}
    for index, part in enumerate(parts):
        groups.setdefault(find(index), []).append(part)
    return [_unite(group) for group in groups.values()]


def _same_object(first: Part, second: Part) -> bool:
    if first.label != second.label or first.tile == second.tile:
        return False
    shared = first.tile.overlap(second.tile)
    if shared is None or not (_reaches(first.box, shared) and _reaches(second.box, shared)):
        return False
    return ious([cut_mask(first.rle, shared)], [cut_mask(second.rle, shared)])[0, 0] >= SAME_OBJECT_IOU


def _reaches(box: Tensor, tile: Tile) -> bool:
    left, top, right, bottom = box.tolist()
    return left < tile.right and right > tile.left and top < tile.bottom and bottom > tile.top


def _unite(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    best = max(parts, key=lambda part: part.score)
    boxes = torch.stack([part.box for part in parts])
    box = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    return best._replace(box=box, rle=unite_masks([part.rle for part in parts]))
