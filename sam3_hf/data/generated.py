"""Generated pictures with exact masks, for the demo and for tests: shapes that differ by adjective and by noun.

A concept is an adjective with a noun ("red circle", "striped square"). The concepts share both words, so that neither
the colour nor the outline alone tells them apart. Coloured shapes have a plain fill, patterned shapes have any colour
but those that are adjectives: no shape answers to two concepts.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ..rle import uncompressed
from .raster import SUPERSAMPLING, box_around, polygon_area, rasterize, smooth_noise, to_pixels

CONCEPTS = (  # up to the eighth, each adjective and each noun comes twice
    "red circle",
    "blue circle",
    "red square",
    "striped square",
    "blue triangle",
    "dotted triangle",
    "striped star",
    "dotted star",
    "green square",
    "green circle",
    "yellow triangle",
    "yellow star",
)

COLORS = {"red": (206, 52, 46), "blue": (44, 92, 204), "green": (52, 150, 66), "yellow": (238, 196, 44)}
PATTERN_COLOURS = (  # (figure, ground) of stripes and dots
    ((46, 44, 50), (240, 234, 220)),
    ((112, 62, 148), (238, 222, 242)),
    ((226, 122, 36), (250, 232, 206)),
    ((20, 128, 134), (222, 242, 238)),
)
GROUND_COLOURS = ((170, 160, 142), (142, 148, 152), (196, 188, 174), (120, 112, 104), (158, 144, 132), (132, 140, 128))

MIN_VISIBLE = 0.45  # share of each shape that stays uncovered by later ones
MIN_PIXELS = 24  # visible pixels of an annotated shape
EMPTY_EVERY = 20  # one image in so many shows nothing but ground


def write_dataset(
    folder: str | Path,
    num_train: int,
    num_valid: int,
    num_test: int = 0,
    image_size: int = 128,
    num_concepts: int = 8,
    seed: int = 0,
) -> Path:
    """Writes pictures and COCO annotations in the layout that Roboflow exports.

    `folder/train`, `folder/valid` and (when `num_test` is not 0) `folder/test` each hold `_annotations.coco.json` with
    the PNG files beside it. Boxes and masks cover what is visible: a shape in front hides what is behind it.
    Whole shapes are stored as polygons, covered or cropped ones as uncompressed RLE. Every image shows 0 to 7 shapes
    of 0 to 3 concepts. The same arguments give the same files byte for byte, and image `i` of a split does not depend
    on how many images are written.

    Args:
        folder: created where missing; files of the same name are overwritten.
        num_train, num_valid, num_test: images per split.
        image_size: longest side of the images in pixels, at least 48; the other side is 80% to 100% of it.
        num_concepts: the first so many of `CONCEPTS`, 2 to 12; they are the categories of every split.
        seed: of the random generator.

    Returns:
        `folder` as a `Path`.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 2 <= num_concepts <= len(CONCEPTS):
        raise ValueError(f"num_concepts must be 2 to {len(CONCEPTS)}, got {num_concepts}")
    if image_size < 48:
        raise ValueError(f"image_size must be at least 48 pixels for shapes to be recognisable, got {image_size}")
    counts = {"train": num_train, "valid": num_valid, "test": num_test}
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"num_{split} must not be negative, got {count}")

    folder = Path(folder)
    for split_index, (split, count) in enumerate(counts.items()):
        if count:
            _write_split(folder / split, count, split_index, image_size, CONCEPTS[:num_concepts], seed)
    return folder


def _write_split(folder: Path, count: int, split_index: int, image_size: int, concepts: tuple, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, split_index, index])
        picture, shapes = draw_picture(rng, image_size, _choose_concepts(rng, index, concepts))
        file_name = f"{index:05d}.png"
        Image.fromarray(picture).save(folder / file_name)
        height, width = picture.shape[:2]
        images.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
        for shape in shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": concepts.index(shape["concept"]) + 1,
                    "bbox": box_around(shape["mask"]),
                    "area": int(shape["mask"].sum()),
                    "segmentation": _segmentation(shape),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": name.split()[1]} for number, name in enumerate(concepts, start=1)
    ]
    document = {
        "info": {"description": "generated shapes"},
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def _choose_concepts(rng: np.random.Generator, index: int, concepts: tuple) -> list[str]:
    """One entry per shape to draw, in drawing order. Going through the concepts by index keeps them balanced."""
    if index % EMPTY_EVERY == EMPTY_EVERY - 1:
        return []
    others = [concept for concept in concepts if concept != concepts[index % len(concepts)]]
    extra = rng.choice(others, size=min(int(rng.integers(0, 3)), len(others)), replace=False).tolist()
    wanted = []
    for concept in [concepts[index % len(concepts)], *extra]:
        wanted += [concept] * int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    return [str(concept) for concept in rng.permutation(wanted[:7])]


def draw_picture(rng: np.random.Generator, image_size: int, concepts: list[str]) -> tuple[np.ndarray, list[dict]]:
    """Draws one shape per entry of `concepts` on a textured ground, later ones in front.

    Returns the picture, (height, width, 3) uint8, and the shapes that found room, each a dict of `concept`, `mask`
    ((height, width) bool, visible pixels), `full` (pixels of the shape had nothing covered it, (height, width) bool)
    and `polygon` ((points, 2) float xy in pixels).
    """
    sides = [image_size, int(rng.integers(int(0.8 * image_size), image_size + 1))]
    width, height = rng.permutation(sides).tolist()
    picture = _ground(rng, height, width)  # (height, width, 3) float in [0, 255]
    shapes = []
    for concept in concepts:
        shape = _fit_shape(rng, concept, shapes, image_size, height, width)
        if shape is None:
            continue
        for other in shapes:
            other["mask"] &= ~shape["full"]
        shapes.append(shape)
        picture = _paint(rng, picture, shape)
    picture += rng.normal(0, 3, size=picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), shapes


def _fit_shape(rng, concept: str, shapes: list[dict], image_size: int, height: int, width: int) -> dict | None:
    """Looks for a position at which every shape stays recognisable; None when the picture is full."""
    for _ in range(40):
        radius = image_size * rng.uniform(0.085, 0.2)
        center = rng.uniform([0.6 * radius] * 2, [width - 0.6 * radius, height - 0.6 * radius])
        angle = rng.uniform(-0.45, 0.45)
        unit = _outline(concept.split()[1])
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        polygon = unit @ turn * radius + center
        coverage = rasterize(polygon, height, width)
        full = coverage >= 0.5
        area = polygon_area(polygon)
        if full.sum() < max(MIN_PIXELS, 0.7 * area):  # at most 30% outside the picture
            continue
        left = [(other["mask"] & ~full).sum() for other in shapes]
        if all(
            count >= max(MIN_PIXELS, MIN_VISIBLE * other["area"]) for count, other in zip(left, shapes, strict=True)
        ):
            return {
                "concept": concept,
                "mask": full.copy(),
                "full": full,
                "polygon": polygon,
                "coverage": coverage,
                "area": area,
                "center": center,
                "radius": radius,
                "angle": angle,
            }
    return None


def _outline(noun: str) -> np.ndarray:
    """Corners on a circle of about radius 1 around the origin, (points, 2) float xy, y down."""
    if noun == "circle":
        angles, radii = np.linspace(0, 2 * np.pi, 40, endpoint=False), 0.95
    elif noun == "square":
        angles, radii = np.pi / 4 + np.arange(4) * np.pi / 2, 1.15
    elif noun == "triangle":
        angles, radii = -np.pi / 2 + np.arange(3) * 2 * np.pi / 3, 1.25
    else:  # star
        angles, radii = -np.pi / 2 + np.arange(10) * np.pi / 5, np.tile([1.25, 0.55], 5)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _ground(rng, height: int, width: int) -> np.ndarray:
    first, second = rng.choice(GROUND_COLOURS, size=2, replace=False).astype(np.float64)
    hills = 0.6 * smooth_noise(rng, height, width, 4) + 0.4 * smooth_noise(rng, height, width, 11)
    ground = first + (second - first) * hills[..., None]
    grain_cells = max(height, width) // 2
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 7)
    y, x = np.mgrid[:height, :width]
    weave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    texture = 26 * (smooth_noise(rng, height, width, grain_cells) - 0.5) + rng.uniform(0, 7) * weave
    return ground + texture[..., None]


def _paint(rng, picture: np.ndarray, shape: dict) -> np.ndarray:
    height, width = picture.shape[:2]
    radius = shape["radius"]
    shadow = rasterize(shape["polygon"] + 0.1 * radius, height, width)
    blurred = Image.fromarray((shadow * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.1 * radius))
    picture = picture * (1 - 0.45 * np.asarray(blurred)[..., None] / 255)

    figure, ground, share = _fill(rng, shape, height, width)
    fill = ground + (figure - ground) * share[..., None]
    pixel_y, pixel_x = np.mgrid[:height, :width] + 0.5
    light = -(pixel_x - shape["center"][0] + pixel_y - shape["center"][1]) / (2 * radius)
    mottle = smooth_noise(rng, height, width, 24) - 0.5
    inner = rasterize(shape["center"] + 0.86 * (shape["polygon"] - shape["center"]), height, width)
    fill = fill * (1 + 0.14 * light + 0.14 * mottle - 0.28 * (1 - inner))[..., None]
    alpha = shape["coverage"][..., None]
    return picture * (1 - alpha) + fill * alpha


def _fill(rng, shape: dict, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Figure colour and ground colour, each (3,) in [0, 255], and the figure's share, (height, width) in [0, 1]."""
    adjective, radius = shape["concept"].split()[0], shape["radius"]
    tint = rng.uniform(-16, 16, size=3)
    if adjective in COLORS:
        color = np.asarray(COLORS[adjective]) + tint
        return color, color, np.ones((height, width))
    figure, ground = np.asarray(PATTERN_COLOURS[rng.integers(len(PATTERN_COLOURS))]) + tint
    samples = (np.arange(max(height, width) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x = samples[None, : width * SUPERSAMPLING] - shape["center"][0]
    y = samples[: height * SUPERSAMPLING, None] - shape["center"][1]
    cos, sin = np.cos(shape["angle"]), np.sin(shape["angle"])
    period = max(4.5, 0.5 * radius)  # finer would blur into one colour
    phase = rng.uniform(0, 1)
    across = (y * cos - x * sin) / period + phase
    if adjective == "striped":
        return figure, ground, to_pixels(across % 1 < 0.5)
    along = (x * cos + y * sin) / period + phase
    return figure, ground, to_pixels((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.32**2)


def _segmentation(shape: dict) -> list | dict:
    """A polygon when the whole shape is seen, otherwise uncompressed RLE of the visible pixels."""
    height, width = shape["mask"].shape
    polygon = shape["polygon"]
    inside = (polygon >= 0).all() and (polygon <= [width, height]).all()
    if inside and shape["mask"].sum() == shape["full"].sum():
        return [[round(value, 2) for value in polygon.ravel().tolist()]]
    return uncompressed(shape["mask"])
