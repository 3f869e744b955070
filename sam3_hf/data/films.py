"""Drawn films with their truth: objects of the composed world on the move, for tests and to score tracking.

The objects of a film in turn cross it from side to side, from top to bottom, leave it in the middle of the film and
come back, or go to and fro inside of it. They meet, and later ones pass in front. No object is small or large.
"""

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from .painting import MIN_PIXELS, Kind, choose_camera, draw_ground, photograph, place, put_in_front
from .raster import box_around, polygon_area
from .words import FILLS, MEDIUM, SHAPES, TRAINED

RATE = 15  # frames per second that these films are meant for
MIN_SHARE = 0.25  # of an object that must be seen for it to count as there


class FilmObject(NamedTuple):
    """An object in a frame.

    Attributes:
        id: from 1, the same in all frames, also where the object was gone in between.
        label: its fill and shape, such as "red star".
        box: xyxy in pixels, around what is visible.
        mask: (height, width) bool, visible pixels.
    """

    id: int
    label: str
    box: list[int]
    mask: np.ndarray


def film_phrases(seed: int) -> list[str]:
    """The four labels that objects of a film have in turn: two fills with two shapes, pairs that training combined.

    Neither word alone tells an object from all others.
    """
    return [f"{kind.fill} {kind.shape}" for kind in _kinds(seed)]


def draw_film(
    seed: int, num_frames: int = 60, image_size: int = 128, num_objects: int = 5
) -> Iterator[tuple[np.ndarray, list[FilmObject]]]:
    """The same arguments give the same film.

    Args:
        seed: of the random generator.
        num_frames: the objects do the same in fewer frames, faster.
        image_size: longer side in pixels, at least 48; the other one is three quarters of it.
        num_objects: later ones in front.

    Yields:
        Frames, (height, width, 3) uint8, and what is there in each: objects of which a quarter or more is visible.

    Raises:
        ValueError: an argument out of its range.
    """
    if image_size < 48 or num_frames < 2 or num_objects < 0:
        raise ValueError(
            f"a film has sides of 48 pixels or more, 2 frames or more and 0 objects or more, got {image_size}, "
            f"{num_frames}, {num_objects}"
        )
    height, width = image_size * 3 // 4, image_size
    rng = np.random.default_rng([seed, 0])
    ground, light, camera = draw_ground(rng, height, width), rng.uniform(0, 2 * np.pi), choose_camera(rng, image_size)
    kinds, labels = _kinds(seed), film_phrases(seed)
    paths = [_path(rng, index, image_size, height, width) for index in range(num_objects)]
    for frame in range(num_frames):
        picture, shown = ground.copy(), []
        for index, path in enumerate(paths):
            painted = place(kinds[index % len(kinds)], None, *path(frame / (num_frames - 1)), (height, width))
            put_in_front(np.random.default_rng([seed, 1, index]), picture, shown, painted, light)
        objects = [
            FilmObject(index + 1, labels[index % len(labels)], _corners(painted.mask), painted.mask)
            for index, painted in enumerate(shown)
            if painted.mask.sum() >= max(MIN_PIXELS, MIN_SHARE * polygon_area(painted.polygon))
        ]
        yield photograph(np.random.default_rng([seed, 2, frame]), picture, light, camera), objects


def _kinds(seed: int) -> list[Kind]:
    squares = [
        pairs
        for fills, shapes in product(combinations(FILLS, 2), combinations(SHAPES, 2))
        if set(pairs := list(product(fills, shapes))) <= set(TRAINED)
    ]
    rng = np.random.default_rng([seed, 3])
    pairs = squares[rng.integers(len(squares))]
    return [Kind(shape, fill) for fill, shape in (pairs[index] for index in rng.permutation(len(pairs)))]


def _path(rng, index: int, image_size: int, height: int, width: int) -> Callable[[float], tuple]:
    """Where an object is at a time from 0 to 1: center (2,), radius and angle."""
    radius = image_size * rng.uniform(*MEDIUM)
    low, high = np.array([radius, radius]), np.array([width - radius, height - radius])
    start, phase, turning = rng.uniform(low, high), rng.uniform(0, 2 * np.pi, size=2), rng.uniform(0, 2 * np.pi)
    backwards = rng.random() < 0.5
    outside = 1.4 * radius

    def at(time: float) -> tuple[np.ndarray, float, float]:
        angle = 0.4 * np.sin(2 * np.pi * time + turning)
        along = 1 - time if backwards else time
        if index % 4 == 0:
            x, y = -outside + (width + 2 * outside) * along, start[1]
        elif index % 4 == 1:
            x, y = start[0], -outside + (height + 2 * outside) * along
        elif index % 4 == 2:
            away = (-outside if backwards else width + outside) - start[0]
            x, y = start[0] + 1.15 * away * np.sin(np.pi * time), start[1]
        else:
            x, y = (low + high) / 2 + (high - low) / 2 * np.sin(2 * np.pi * time * np.array([1, 1.5]) + phase)
        return np.array([x, y]), radius, angle

    return at


def _corners(mask: np.ndarray) -> list[int]:
    left, top, width, height = box_around(mask)
    return [left, top, left + width, top + height]
