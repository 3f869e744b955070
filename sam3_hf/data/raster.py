"""Polygons as pixels, and noise: what drawn pictures are made of."""

import numpy as np
from PIL import Image

SUPERSAMPLING = 4


def polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def rasterize(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of each pixel inside the polygon, (height, width) float in [0, 1]."""
    start = polygon * SUPERSAMPLING
    end = np.roll(start, -1, axis=0)
    samples = np.arange(height * SUPERSAMPLING) + 0.5
    edge, row = np.nonzero((start[:, 1, None] <= samples) != (end[:, 1, None] <= samples))
    share = (samples[row] - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    crossing = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
    column = np.clip(np.ceil(crossing - 0.5), 0, width * SUPERSAMPLING).astype(int)
    crossings = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING + 1), dtype=np.uint8)
    np.add.at(crossings, (row, column), 1)
    return to_pixels(np.cumsum(crossings[:, :-1], axis=1, dtype=np.uint8) & 1)  # inside after an odd number of edges


def to_pixels(fine: np.ndarray) -> np.ndarray:
    """Mean of each pixel's samples, (height * s, width * s) -> (height, width)."""
    height, width = (side // SUPERSAMPLING for side in fine.shape)
    rows = fine.reshape(height, SUPERSAMPLING, -1).sum(axis=1, dtype=np.uint8)  # along memory first: faster
    return rows.reshape(height, width, SUPERSAMPLING).sum(axis=2, dtype=np.uint8) / SUPERSAMPLING**2


def smooth_noise(rng, height: int, width: int, cells: int) -> np.ndarray:
    """Random hills about `cells` across, (height, width) float in [0, 1]."""
    coarse = rng.integers(0, 256, size=(cells, cells), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255


def box_around(mask: np.ndarray) -> list[int]:
    """COCO box (x, y, width, height) of the pixels that are set."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [
        int(columns[0]),
        int(rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    ]
