"""Pictures of the composed world (see `words`): shapes of all sizes on textured grounds, one before the other."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .raster import SUPERSAMPLING, polygon_area, rasterize, smooth_noise, to_pixels
from .words import COLORS, FILLS, MEDIUM, PATTERNS, SIZES

PLAIN_COLORS = ((112, 72, 46), (58, 56, 62), (236, 232, 226), (236, 160, 178))  # brown, dark, white, pink: no words
PATTERN_COLORS = (  # (figure, ground)
    ((46, 44, 50), (240, 234, 220)),
    ((104, 66, 42), (240, 222, 196)),
    ((24, 112, 120), (222, 240, 240)),
    ((120, 50, 74), (246, 222, 230)),
)
GROUND_COLORS = ((170, 160, 142), (142, 148, 152), (196, 188, 174), (120, 112, 104), (158, 144, 132), (132, 140, 128))
UNNAMED_SHAPES = ("bar", "blob", "bolt", "arrow")
SMALLEST_PATTERN = 0.05  # radius, as a share of the longer side, from which stripes can be told from dots
MIN_VISIBLE = 0.45  # share of each shape that stays uncovered by later ones
MIN_PIXELS = 20  # visible pixels of each shape
TRIES = 40  # places tried for a shape before it is left out


@dataclass(frozen=True)
class Kind:
    """What an object is, but for its size: `fill` is None for a plain colour without a name."""

    shape: str
    fill: str | None


@dataclass
class Painted:
    """An object of a picture.

    Attributes:
        kind: shape and fill.
        size: "small", "large" or None.
        radius: pixels.
        mask: (height, width) bool, visible pixels.
        full: (height, width) bool, its pixels if nothing covered it.
    """

    kind: Kind
    size: str | None
    radius: float
    mask: np.ndarray
    full: np.ndarray
    polygon: np.ndarray = field(repr=False)
    center: np.ndarray = field(repr=False)
    angle: float


class Camera(NamedTuple):
    """How a painted picture is taken.

    Attributes:
        falloff: of the light across the picture, as a share.
        blur: pixels.
        noise: standard deviation, of values to 255.
    """

    falloff: float
    blur: float
    noise: float


def draw_scene(rng: np.random.Generator, image_size: int, kinds: list[Kind]) -> tuple[np.ndarray, list[Painted]]:
    """Draws one object per entry of `kinds`, later ones in front; smaller ones where there are many.

    Args:
        rng: what it draws follows from.
        image_size: longer side in pixels; the other one is 80% to 100% of it.
        kinds: in drawing order; one that finds no room is left out.

    Returns:
        The picture, (height, width, 3) uint8, and the objects.
    """
    sides = [image_size, int(rng.integers(int(0.8 * image_size), image_size + 1))]
    width, height = rng.permutation(sides).tolist()
    picture = draw_ground(rng, height, width)
    light = rng.uniform(0, 2 * np.pi)
    objects: list[Painted] = []
    for kind in kinds:
        painted = _find_room(rng, kind, objects, image_size, (height, width), crowded=len(kinds) > 10)
        if painted is not None:
            put_in_front(rng, picture, objects, painted, light)
    return photograph(rng, picture, light, choose_camera(rng, image_size)), objects


def _find_room(rng, kind: Kind, objects, image_size: int, frame: tuple[int, int], crowded: bool) -> Painted | None:
    """A place at which every object stays recognisable; None when the picture is full."""
    height, width = frame
    size = str(rng.choice(["small", "medium", "large"], p=[0.75, 0.24, 0.01] if crowded else [0.3, 0.45, 0.25]))
    low, high = SIZES.get(size, MEDIUM)
    if kind.fill in PATTERNS:
        low = max(low, SMALLEST_PATTERN)
    for _ in range(TRIES):
        radius = image_size * rng.uniform(low, high)
        center = rng.uniform([0.6 * radius] * 2, [width - 0.6 * radius, height - 0.6 * radius])
        angle = rng.uniform(-0.45, 0.45)
        painted = place(kind, size if size in SIZES else None, center, radius, angle, frame)
        full = painted.full
        if full.sum() < max(MIN_PIXELS, 0.7 * polygon_area(painted.polygon)):  # at most 30% outside the picture
            continue
        if all((other.mask & ~full).sum() >= max(MIN_PIXELS, MIN_VISIBLE * other.full.sum()) for other in objects):
            return painted
    return None


def place(
    kind: Kind, size: str | None, center: np.ndarray, radius: float, angle: float, frame: tuple[int, int]
) -> Painted:
    """An object with nothing in front of it, not painted yet. It may lie outside of the picture.

    Args:
        center: (2,) float xy in pixels.
        radius: about that of a circle around it, in pixels.
        angle: in radians, to the left.
        frame: height and width of the picture.
    """
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    polygon = _outline(kind.shape) @ turn * radius + center
    full = np.zeros(frame, dtype=bool)
    window = _window(polygon, frame, 0)
    full[window] = _coverage(polygon, window) >= 0.5
    return Painted(kind, size, radius, full.copy(), full, polygon, center, angle)


def _outline(shape: str) -> np.ndarray:
    """Corners within about 1.3 of the origin, (points, 2) float xy, y down; a ring's hole is joined by a seam."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "circle":
        return 0.95 * circle
    if shape == "ring":
        outer, inner = 1.05 * circle, 0.55 * circle[::-1]
        return np.concatenate([outer, outer[:1], inner, inner[:1]])
    if shape in ("square", "triangle", "star"):
        corners, radii, first = {
            "square": (4, [1.15], np.pi / 4),
            "triangle": (3, [1.25], -np.pi / 2),
            "star": (10, [1.25, 0.55], -np.pi / 2),
        }[shape]
        angles = first + np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, corners)[:, None]
    if shape == "cross":
        arm, end = 0.38, 1.15
        quarter = np.array([[arm, end], [arm, arm], [end, arm]])
        quarters = [quarter, quarter[::-1] * [1, -1], -quarter, quarter[::-1] * [-1, 1]]
        return np.concatenate(quarters)
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return np.stack([x, y + 2], axis=1) / 14.5
    if shape == "crescent":  # a disc of radius 1.1 without one of 0.9 that is 0.55 to the right of it
        tip = np.arccos(0.638 / 1.1)
        outer = np.linspace(tip, 2 * np.pi - tip, 30)
        bite = np.arctan2(0.896, 0.638 - 0.55)
        inner = np.linspace(2 * np.pi - bite, bite, 24)[1:-1]
        outer = 1.1 * np.stack([np.cos(outer), np.sin(outer)], axis=1)
        inner = 0.9 * np.stack([np.cos(inner), np.sin(inner)], axis=1) + [0.55, 0]
        return np.concatenate([outer, inner]) + [0.25, 0]
    return {
        "bar": np.array([[-1.35, -0.3], [1.35, -0.3], [1.35, 0.3], [-1.35, 0.3]]),
        "blob": circle * (0.85 + 0.3 * np.sin(3 * turn + 0.6) + 0.15 * np.cos(2 * turn))[:, None],
        "bolt": np.array([[-0.1, -1.3], [0.6, -1.3], [0.2, -0.3], [0.75, -0.3], [-0.4, 1.3], [0, 0.2], [-0.65, 0.2]]),
        "arrow": np.array([[-1.3, -0.25], [0.2, -0.25], [0.2, -0.8], [1.3, 0], [0.2, 0.8], [0.2, 0.25], [-1.3, 0.25]]),
    }[shape]


def _window(polygon: np.ndarray, frame: tuple[int, int], margin: float) -> tuple[slice, slice]:
    """Rows and columns of the picture that a polygon and a margin around it touch."""
    low = np.maximum(np.floor(polygon.min(axis=0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(polygon.max(axis=0) + margin) + 1, frame[::-1]).astype(int)
    return slice(low[1], max(high[1], low[1] + 1)), slice(low[0], max(high[0], low[0] + 1))


def _coverage(polygon: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """Share of each pixel of a window inside the polygon, (rows, columns) float in [0, 1]."""
    rows, columns = window
    return rasterize(polygon - [columns.start, rows.start], rows.stop - rows.start, columns.stop - columns.start)


def draw_ground(rng, height: int, width: int) -> np.ndarray:
    """(height, width, 3) float in about [0, 255]: hills of two colours with grain, and weave, boards or tiles."""
    first, second = rng.choice(GROUND_COLORS, size=2, replace=False).astype(np.float64)
    hills = 0.6 * smooth_noise(rng, height, width, 4) + 0.4 * smooth_noise(rng, height, width, 11)
    ground = first + (second - first) * hills[..., None]
    texture = 26 * (smooth_noise(rng, height, width, max(height, width) // 2) - 0.5)
    angle, fine, coarse = rng.uniform(0, np.pi), rng.uniform(3, 7), rng.uniform(10, 28)
    y, x = np.mgrid[:height, :width]
    across, along = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    figure = str(rng.choice(["weave", "boards", "tiles"]))
    if figure == "weave":
        texture += rng.uniform(0, 8) * np.sin(across * 2 * np.pi / fine)
    elif figure == "boards":
        texture += rng.uniform(0, 10) * (np.sin(across * 2 * np.pi / coarse) > 0.8)
    else:
        texture += rng.uniform(0, 9) * (((across // coarse) + (along // coarse)) % 2)
    return ground + texture[..., None]


def put_in_front(rng, picture: np.ndarray, objects: list[Painted], painted: Painted, light: float) -> None:
    """Paints an object into a picture, takes what it hides from the masks of the others, and adds it to them.

    Args:
        picture: (height, width, 3) float in about [0, 255], as `draw_ground` gives it.
        objects: what is in it.
        light: where it comes from, in radians.
    """
    for other in objects:
        other.mask &= ~painted.full
    objects.append(painted)
    _paint(rng, picture, painted, light)


def _paint(rng, picture: np.ndarray, painted: Painted, light: float) -> None:
    """Paints an object with its soft shadow into a picture."""
    radius, frame = painted.radius, picture.shape[:2]
    softness, offset = radius * rng.uniform(0.08, 0.28), radius * rng.uniform(0.06, 0.2)
    thrown = painted.polygon - offset * np.array([np.cos(light), np.sin(light)])
    window = _window(thrown, frame, 3 * softness)
    shadow = Image.fromarray((_coverage(thrown, window) * 255).astype(np.uint8))
    blurred = np.asarray(shadow.filter(ImageFilter.GaussianBlur(softness))) / 255
    picture[window] *= 1 - rng.uniform(0.25, 0.5) * blurred[..., None]

    window = _window(painted.polygon, frame, 0)
    alpha = _coverage(painted.polygon, window)[..., None]
    fill = _fill(rng, painted, window)
    mottle = smooth_noise(rng, *fill.shape[:2], 8) - 0.5
    y, x = np.mgrid[window] + 0.5
    toward = ((x - painted.center[0]) * np.cos(light) + (y - painted.center[1]) * np.sin(light)) / (1.4 * radius)
    inner = _coverage(painted.center + 0.86 * (painted.polygon - painted.center), window)
    fill *= (1 + 0.13 * toward + 0.13 * mottle - 0.25 * (1 - inner))[..., None]
    picture[window] = picture[window] * (1 - alpha) + fill * alpha


def _fill(rng, painted: Painted, window: tuple[slice, slice]) -> np.ndarray:
    """Colours of an object without light and edge, (rows, columns, 3) float."""
    rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    tint = rng.uniform(-16, 16, size=3)
    fill = painted.kind.fill
    if fill not in PATTERNS:
        color = COLORS[fill] if fill is not None else PLAIN_COLORS[rng.integers(len(PLAIN_COLORS))]
        return np.broadcast_to(np.asarray(color) + tint, (height, width, 3)).copy()
    figure, ground = np.asarray(PATTERN_COLORS[rng.integers(len(PATTERN_COLORS))]) + tint
    samples = (np.arange(max(height, width) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x = samples[None, : width * SUPERSAMPLING] + columns.start - painted.center[0]
    y = samples[: height * SUPERSAMPLING, None] + rows.start - painted.center[1]
    cos, sin = np.cos(painted.angle), np.sin(painted.angle)
    period = max(4.5, 0.5 * painted.radius)  # finer would blur into one colour
    phases = rng.uniform(0, 1, size=2)
    across, along = (y * cos - x * sin) / period + phases[0], (x * cos + y * sin) / period + phases[1]
    if fill == "striped":
        share = to_pixels(across % 1 < 0.5)
    elif fill == "dotted":
        share = to_pixels((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.32**2)
    else:
        share = to_pixels((along % 1 < 0.5) != (across % 1 < 0.5))
    return ground + (figure - ground) * share[..., None]


def choose_camera(rng: np.random.Generator, image_size: int) -> Camera:
    """For pictures of this many pixels along the longer side."""
    return Camera(rng.uniform(0, 0.25), rng.uniform(0, 0.8) * image_size / 128, rng.uniform(1, 7))


def photograph(rng, picture: np.ndarray, light: float, camera: Camera) -> np.ndarray:
    """(height, width, 3) uint8 of a painted picture: uneven light, blur, and noise that `rng` draws."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    toward = ((x - width / 2) * np.cos(light) + (y - height / 2) * np.sin(light)) / max(height, width)
    lit = picture * (1 + camera.falloff * toward)[..., None]
    if camera.blur > 0.25:
        sharp = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
        lit = np.asarray(sharp.filter(ImageFilter.GaussianBlur(camera.blur)), dtype=np.float64)
    noisy = lit + rng.normal(0, camera.noise, size=lit.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def choose_kinds(rng: np.random.Generator, first: Kind, others: list[Kind], count: int) -> list[Kind]:
    """What to draw: the first kind and up to seven others, some of which share a word with it, in any order.

    One object in eight has a fill without a name, and one in eight a shape without one.

    Args:
        others: what to choose from.
        count: objects, at least 1.
    """
    near = [kind for kind in others if (kind.shape == first.shape) != (kind.fill == first.fill)]
    kinds = [first]
    for _ in range(int(rng.integers(0, 8))):
        pool = near if near and rng.random() < 0.4 else others
        kinds.append(pool[rng.integers(len(pool))])
    chosen = [first]
    for _ in range(count - 1):
        kind, chance = kinds[rng.integers(len(kinds))], rng.random()
        if chance < 0.125:
            kind = Kind(kind.shape, None)
        elif chance < 0.25:
            kind = Kind(str(rng.choice(UNNAMED_SHAPES)), str(rng.choice(FILLS)))
        chosen.append(kind)
    return [chosen[index] for index in rng.permutation(count)]
