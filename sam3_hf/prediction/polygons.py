"""Masks as polygons."""

from __future__ import annotations

import numpy as np
from contourpy import FillType, contour_generator

from ..rle import decode_mask, extent


def polygons_of(rle: dict) -> list[list[float]]:
    """
    The outlines of the parts of a mask along the edges of its pixels: where there are no holes, which polygons cannot
    express in COCO, their union has exactly these pixels.

    Args:
        rle: in COCO's compressed encoding.

    Returns:
        [x, y, x, y, ...] in pixels for each part; whole numbers. Empty for an empty mask.
    """
    left, top, width, height = map(int, extent(rle))
    if not (width and height):
        return []
    mask = np.pad(decode_mask(rle)[top : top + height, left : left + width], 1)
    # Every pixel as four samples at its corners. Neighbours have two each where they touch, so that the contour
    # between them is there to the digit.
    samples = mask.repeat(2, 0).repeat(2, 1)[1:-1, 1:-1].astype(np.float64)
    x, y = (start + np.arange(length + 1).repeat(2) for start, length in ((left, width), (top, height)))
    parts, offsets = contour_generator(x, y, samples, fill_type=FillType.OuterOffset).filled(0.5, 2)
    return [_corners(part[: offset[1]]) for part, offset in zip(parts, offsets, strict=True)]


def _corners(points: np.ndarray) -> list[float]:
    """Those points (n, 2) of a closed outline, whose last is its first, at which it turns."""
    points = points[:-1][(np.diff(points, axis=0) != 0).any(1)]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return points[turns].ravel().tolist()
