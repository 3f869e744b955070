"""Painted shapes are transformed and found again: boxes, masks and pixels must tell the same."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as mask_api
from PIL import Image
from transformers import Sam3ImageProcessor

from sam3_hf.data import Augmentation
from sam3_hf.data.images import load_image
from sam3_hf.data.transforms import (
    GeometricTransform,
    draw_transform,
    jitter_colors,
    mask_box,
    normalize,
    pad_to_canvas,
    transform_boxes,
    transform_mask,
    transform_pixels,
    whole_image,
)

CANVAS = 96


def paint(width, height, box):
    """A red rectangle (xywh) on green: pixels (3, height, width), polygons, run-length encoding."""
    x, y, w, h = box
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[1] = 255
    pixels[:, y : y + h, x : x + w] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    mask = (pixels[0] > 0).numpy().astype(np.uint8)
    return pixels, [[x, y, x + w, y, x + w, y + h, x, y + h]], mask_api.encode(np.asfortranarray(mask))


def found_box(transformed: torch.Tensor) -> np.ndarray:
    return mask_box((transformed[0] > 127) & (transformed[1] < 128))


def assert_boxes_close(actual, expected, tolerance=1.0):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance + 1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_pixels_boxes_and_masks_agree(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(value) for value in rng.integers(60, 200, size=2))
    box = [int(rng.integers(0, width - 30)), int(rng.integers(0, height - 30)), 24, 28]
    pixels, polygons, rle = paint(width, height, box)
    transform = draw_transform(width, height, CANVAS, Augmentation(crop=1.0), rng)
    transformed = pad_to_canvas(transform_pixels(pixels, transform), transform)
    boxes, cut, visible = transform_boxes(np.array([box], dtype=float), transform)
    from_polygons, from_rle = transform_mask(polygons, transform), transform_mask(rle, transform)
    assert transformed.shape == (3, CANVAS, CANVAS) and from_polygons.shape == (CANVAS, CANVAS)
    if not visible[0]:
        assert cut[0] and ((transformed[0] > 127) & (transformed[1] < 128)).sum() <= CANVAS  # a line of pixels at most
        return
    if (boxes[0, 2:] - boxes[0, :2]).min() < 2:
        return  # a sliver may or may not fill a pixel
    assert_boxes_close(boxes[0], found_box(transformed))
    assert_boxes_close(boxes[0], mask_box(from_polygons))
    assert_boxes_close(boxes[0], mask_box(from_rle))
    outside = torch.ones(CANVAS, CANVAS, dtype=torch.bool)
    outside[transform.y : transform.y + transform.side, transform.x : transform.x + transform.side] = False
    assert (transformed[:, outside] == 0).all() and not from_polygons[outside].any() and not from_rle[outside].any()


def test_augmentations_are_drawn_over_their_whole_range():
    rng = np.random.default_rng(0)
    drawn = [draw_transform(400, 200, 1008, Augmentation(), rng) for _ in range(400)]
    assert 150 < sum(transform.flip for transform in drawn) < 250
    assert 150 < sum((transform.width, transform.height) == (400, 200) for transform in drawn) < 250
    sides = [transform.side for transform in drawn]
    assert 480 <= min(sides) < 500 and 990 < max(sides) <= 1008
    assert all(transform.x + transform.side <= 1008 and transform.y + transform.side <= 1008 for transform in drawn)
    crops = [transform for transform in drawn if transform.width < 400]
    assert all(190 <= transform.width and 90 <= transform.height for transform in crops)
    assert all(abs(transform.width / transform.height - 2) < 0.3 for transform in crops)
    assert min(transform.left for transform in crops) == 0
    assert max(transform.left + transform.width for transform in crops) == 400
    none = Augmentation(horizontal_flip=0, crop=0, smallest_side=1, color_jitter=0)
    assert draw_transform(400, 200, 1008, none, rng) == whole_image(400, 200, 1008)


@pytest.mark.parametrize(
    "field, value", [("crop", 1.5), ("horizontal_flip", -0.1), ("smallest_crop", 0), ("color_jitter", 1)]
)
def test_augmentation_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})


def test_transform_by_hand():
    transform = GeometricTransform(left=10, top=20, width=40, height=20, flip=True, side=80, x=6, y=4, canvas=96)
    boxes = np.array([[10, 20, 10, 5], [40, 30, 30, 30], [60, 20, 10, 10], [0, 39, 100, 9]], dtype=float)
    transformed, cut, visible = transform_boxes(boxes, transform)
    np.testing.assert_allclose(transformed[0], [6 + 60, 4, 6 + 80, 4 + 20])  # the left quarter becomes the right one
    np.testing.assert_allclose(transformed[1], [6, 4 + 40, 6 + 20, 4 + 80])
    np.testing.assert_allclose(transformed[3], [6, 4 + 76, 6 + 80, 4 + 80])
    assert cut.tolist() == [False, True, True, True] and visible.tolist() == [True, True, False, True]


def test_eval_pixels_are_those_of_the_processor(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((260, 140))
    picture.save(tmp_path / "a.png")
    processor = Sam3ImageProcessor(size={"height": CANVAS, "width": CANVAS})
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    pixels, _ = load_image({"path": str(tmp_path / "a.png"), "bytes": None}, 260, 140)
    actual = normalize(transform_pixels(pixels, whole_image(260, 140, CANVAS)))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width, height", [(801, 643), (800, 640)])
def test_jpeg_decoded_small_lies_where_the_whole_one_would(tmp_path, width, height):
    box = [320, 240, 160, 120]
    pixels, _, _ = paint(width, height, box)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=95)
    source = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    for seed in range(10):
        transform = draw_transform(width, height, CANVAS, Augmentation(crop=1.0), np.random.default_rng(seed))
        scale_x, scale_y = transform.side / transform.width, transform.side / transform.height
        small, factor = load_image(source, width, height, (width * scale_x, height * scale_y))
        assert factor > 1 and small.shape[2] * factor >= width
        transformed = pad_to_canvas(transform_pixels(small, transform, factor), transform)
        boxes, _, visible = transform_boxes(np.array([box], dtype=float), transform)
        if visible[0] and (boxes[0, 2:] - boxes[0, :2]).min() > 2:
            assert_boxes_close(boxes[0], found_box(transformed))


def test_polygon_parts_and_holes_survive(tmp_path):
    """A run-length encoded ring and a two-part polygon keep their area under a transform."""
    transform = GeometricTransform(left=0, top=0, width=60, height=40, flip=True, side=90, x=3, y=2, canvas=96)
    ring = np.zeros((40, 60), dtype=np.uint8)
    ring[5:35, 10:50] = 1
    ring[15:25, 20:40] = 0
    scale = 90 / 60 * 90 / 40
    transformed = transform_mask(mask_api.encode(np.asfortranarray(ring)), transform)
    assert transformed.sum().item() == pytest.approx(ring.sum() * scale, rel=0.02)
    assert not transformed[2 + 45, 3 + 45]  # the hole
    parts = [[0, 0, 10, 0, 10, 10, 0, 10], [30, 20, 50, 20, 50, 40, 30, 40]]
    transformed = transform_mask(parts, transform)
    assert transformed.sum().item() == pytest.approx(500 * scale, rel=0.02)


def test_color_jitter_keeps_black_padding_and_varies():
    pixels = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    values = {int(jitter_colors(pixels, 0.2, np.random.default_rng(seed))[0, 0, 0]) for seed in range(20)}
    assert len(values) > 5 and min(values) >= 102 and max(values) <= 154
    transform = GeometricTransform(0, 0, 8, 8, False, 8, 1, 2, 12)
    padded = normalize(pad_to_canvas(pixels, transform))
    assert (
        padded[:, 0].eq(-1).all()
        and padded[:, :, 0].eq(-1).all()
        and padded[0, 2, 1] == pytest.approx(1 / 255, abs=1e-6)
    )
