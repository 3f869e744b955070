"""Painted shapes are turned, mirrored and joined, and found again: pixels, masks and boxes must tell the same."""

import numpy as np
import pytest
import torch
from data_cases import CATEGORIES, annotation, image, write_coco
from faster_coco_eval.core import mask as mask_api
from PIL import Image

from sam3_hf.data import Augmentation, PromptSampling, TrainDataset, load_dataset_splits
from sam3_hf.data.scenes import draw_tiles
from sam3_hf.data.transforms import (
    draw_transform,
    mask_box,
    pad_to_canvas,
    shown,
    transform_boxes,
    transform_mask,
    transform_pixels,
)
from sam3_hf.rle import encode_masks
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.parts import different_pictures

CANVAS, SIZE = 96, 160
LETTER = [20, 20, 50, 20, 50, 70, 95, 70, 95, 100, 20, 100]  # an L, which looks different however it is turned
ANY = Augmentation(vertical_flip=0.5, rotation=180, crop=0.5, smallest_side=0.7, color_jitter=0)
COLORS = {3: (255, 0, 0), 7: (0, 255, 0), 9: (0, 0, 255)}


def letter(width: int, height: int, ground: tuple, color: tuple) -> np.ndarray:
    """A picture of it, whose pixels are those of the polygon: (height, width, 3) uint8."""
    picture = np.full((height, width, 3), ground, np.uint8)
    picture[20:100, 20:50] = picture[70:100, 20:95] = color
    return picture


def differing(first: torch.Tensor, second: torch.Tensor) -> int:
    """Pixels of which one mask is a whole pixel away from the border of the other."""
    grown = [torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0 for mask in (first, second)]
    return int(((first & ~grown[1]) | (second & ~grown[0])).sum())


@pytest.mark.parametrize("seed", range(25))
def test_turned_pixels_masks_and_boxes_agree(seed):
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(letter(160, 120, (0, 0, 0), (255, 0, 0))).permute(2, 0, 1)
    rle = mask_api.encode(np.asfortranarray((pixels[0] > 0).numpy().astype(np.uint8)))
    transform = draw_transform(160, 120, CANVAS, ANY, rng)
    seen = pad_to_canvas(transform_pixels(pixels, transform), transform)[0] > 127
    from_polygon, from_rle = transform_mask([LETTER], transform), transform_mask(rle, transform)
    assert transform.angle != 0 and torch.equal(from_rle, seen)
    assert differing(from_polygon, seen) == 0
    boxes, cut, visible = transform_boxes(np.array([[20, 20, 75, 80.0]]), transform)
    assert visible[0]
    outer, inner = boxes[0], mask_box(from_polygon)
    assert (outer[:2] <= inner[:2] + 1).all() and (outer[2:] >= inner[2:] - 1).all()  # around the object
    if not cut[0]:
        area = from_polygon.sum().item() / ((transform.side / transform.width) * (transform.side / transform.height))
        assert area == pytest.approx(30 * 50 + 75 * 30, rel=0.05)  # all of it is there


def test_what_is_switched_off_draws_no_random_numbers():
    """As of the version before there were vertical flips, rotation and mosaics."""
    known = [(0, 80, 208, 104, False, 823, 169, 93), (0, 0, 400, 200, False, 498, 73, 420)]
    for seed, (left, top, width, height, flip, side, x, y) in enumerate(known):
        rng = np.random.default_rng(seed)
        drawn = draw_transform(400, 200, 1008, Augmentation(), rng)
        assert (drawn.left, drawn.top, drawn.width, drawn.height) == (left, top, width, height)
        assert (drawn.flip, drawn.side, drawn.x, drawn.y) == (flip, side, x, y)
        assert (drawn.vertical, drawn.angle) == (False, 0.0)
        assert rng.integers(1000) == [606, 948][seed]


@pytest.fixture
def rows(tmp_path):
    """Five pictures, each with an L of its colour, run-length encoded or not; the last has a blue crowd as well."""
    images = [image(number, width=SIZE, height=SIZE) for number in range(1, 6)]
    box = [20, 20, 75, 80]
    annotations = []
    for number, category in enumerate((3, 7, 9, 3, 7), 1):
        picture = letter(SIZE, SIZE, (90, 90, 90), COLORS[category])
        annotations.append(annotation(number, number, category, bbox=box, segmentation=[LETTER], area=3750))
        images[number - 1]["picture"] = picture
    crowd = np.zeros((1, SIZE, SIZE), bool)
    crowd[0, 120:150, 100:150] = True
    (rle,) = encode_masks(crowd)
    annotations.append(annotation(9, 5, 9, iscrowd=1, bbox=[100, 120, 50, 30], segmentation=rle, area=1500))
    pictures = [entry.pop("picture") for entry in images]
    pictures[4][120:150, 100:150] = COLORS[9]
    write_coco(tmp_path / "train", images, annotations)
    for entry, picture in zip(images, pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / "train" / entry["file_name"])
    return load_dataset_splits(tmp_path)["train"]


def painted(pixels: torch.Tensor, phrase: str) -> torch.Tensor:
    """Where a sample shows the colour of a phrase."""
    number = next(entry["id"] for entry in CATEGORIES if entry["name"] == phrase)
    own = COLORS[number].index(255)
    others = [channel for channel in range(3) if channel != own]
    return (pixels[own] > 0) & (pixels[others] < -0.3).all(dim=0)


SAMPLING = PromptSampling(prompts_per_image=3, negative_ratio=0.5)
STRONG = Augmentation(crop=0.5, rotation=30, vertical_flip=0.5, smallest_side=0.7, color_jitter=0, mosaic=1)


def test_a_mosaic_shows_what_its_labels_say(rows):
    dataset = TrainDataset(rows, 128, SAMPLING, STRONG, seed=3)
    most, absent, with_crowd = 0, 0, 0
    for epoch in range(6):
        for index in range(5):
            sample = dataset[epoch, index]
            tiles = draw_tiles(dataset.rows, index, 128, STRONG, np.random.default_rng([3, epoch, index]))
            assert len(tiles) == 4 and tiles[0].row["image_id"] == index + 1 == sample.image_id
            crowd = any(tile.row["image_id"] == 5 for tile in tiles)
            for phrase, label in zip(sample.phrases, sample.labels, strict=True):
                seen = painted(sample.pixel_values, phrase)
                with_crowd += crowd and phrase == "platelet"
                if crowd and phrase == "platelet":
                    assert len(label["boxes"])  # of a crowd nobody can say that it is not there
                    continue
                assert differing(label["masks"].any(dim=0), seen) == 0
                for box, mask in zip(label["boxes"], label["masks"], strict=True):
                    sides = torch.from_numpy(mask_box(mask)) / 128
                    torch.testing.assert_close(box[2:].double(), sides[2:] - sides[:2], atol=1.5 / 128, rtol=0)
                most, absent = max(most, len(label["boxes"])), absent + (len(label["boxes"]) == 0)
    assert most >= 2 and absent > 5 and with_crowd > 0


def test_what_is_turned_stands_on_black(rows):
    varied = Augmentation(horizontal_flip=0, crop=0, smallest_side=1, color_jitter=0.5, rotation=45)
    for index in range(5):
        pixels = TrainDataset(rows, 64, SAMPLING, varied, seed=1)[0, index].pixel_values
        (tile,) = draw_tiles(rows, index, 64, varied, np.random.default_rng([1, 0, index]))
        outside = ~shown(64, tile.transform.angle)
        assert outside.sum() > 20 and (pixels[:, outside] == -1).all()


def test_a_mosaic_depends_on_seed_epoch_and_index_alone(rows):
    first, second = (TrainDataset(rows, 64, SAMPLING, STRONG, seed=3) for _ in range(2))
    first[0, 1]  # what was asked before does not matter
    one, other = first[2, 3], second[2, 3]
    assert torch.equal(one.pixel_values, other.pixel_values) and one.phrases == other.phrases
    assert not torch.equal(one.pixel_values, first[3, 3].pixel_values)
    assert not torch.equal(one.pixel_values, TrainDataset(rows, 64, SAMPLING, STRONG, seed=4)[2, 3].pixel_values)


def test_pictures_with_boxes_alone_are_joined_and_mirrored_but_not_turned(tmp_path, caplog):
    """A picture with masks is not turned either where it is shown beside one of boxes."""
    outline = [10, 15, 40, 15, 40, 35, 10, 35]
    annotations = [annotation(1, 1, segmentation=None), annotation(2, 2, segmentation=[outline])]
    write_coco(tmp_path / "train", [image(1), image(2)], annotations)
    dataset = TrainDataset(load_dataset_splits(tmp_path)["train"], 128, SAMPLING, STRONG)
    assert "rotation: images with an object that has a box alone are not turned" in caplog.text
    turned = set()
    for epoch in range(12):
        tiles = draw_tiles(dataset.rows, 1, 128, STRONG, np.random.default_rng(epoch))
        masks_alone = all(tile.row["image_id"] == 2 for tile in tiles)
        turned.add(masks_alone)
        assert all((tile.transform.angle != 0) == masks_alone for tile in tiles)
    assert turned == {False, True}
    counts = {len(label["boxes"]) for epoch in range(5) for label in dataset[epoch, 0].labels}
    assert 4 in counts


def test_presets_are_filled_in_and_flags_win():
    light = parse_arguments(["--data", "x"]).augmentation
    assert Augmentation(**light.settings()) == Augmentation(smallest_side=0.476)
    none = parse_arguments(["--data", "x", "--augmentation", "none", "--vertical_flip", "0.5"]).augmentation
    expected = Augmentation(horizontal_flip=0, crop=0, smallest_side=1, color_jitter=0, vertical_flip=0.5)
    assert Augmentation(**none.settings()) == expected
    strong = parse_arguments(["--data", "x", "--augmentation", "strong", "--mosaic", "0"]).augmentation
    assert strong.rotation == 15 and strong.mosaic == 0 and strong.smallest_crop < light.smallest_crop


@pytest.mark.parametrize(("flip", "vertical", "times"), [(0, 0, 1), (0.5, 1, 2), (1, 0.5, 2), (0.5, 0.5, 4)])
def test_mirrored_pictures_are_others_to_a_cache(rows, flip, vertical, times):
    data = TrainDataset(rows, 64, augmentation=Augmentation(horizontal_flip=flip, vertical_flip=vertical))
    assert different_pictures(data) == 5 * times


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rotation", "181"], "rotation must be from 0 to 180, got 181"),
        (["--mosaic", "2"], "mosaic must be from 0 to 1, got 2"),
        (["--smallest_crop", "0"], "smallest_crop must be above 0"),
        (["--augmentation", "heavy"], "invalid choice: 'heavy'"),
    ],
)
def test_wrong_augmentation_is_named(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", *flags])
    assert message in capsys.readouterr().err
