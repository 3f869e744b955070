import json

import numpy as np
import pytest
import torch
from PIL import Image

from sam3_hf.prediction.detections import LEGEND_LABELS, Detections
from sam3_hf.prediction.output_folder import draw_detections
from sam3_hf.rle import encode_masks
from sam3_hf.visualization import draw_instances, drawing_colors, instance_colors, plot_curves, side_by_side

GREY = np.full((64, 96, 3), 128, dtype=np.uint8)


def one_instance():
    mask = np.zeros((1, 64, 96), dtype=bool)
    mask[0, 20:44, 30:60] = True
    return {"boxes": np.array([[30.0, 20, 60, 44]]), "masks": mask, "labels": ["red circle"]}


def test_small_pictures_grow_and_large_ones_shrink():
    assert draw_instances(GREY).size == (512, 341)
    assert draw_instances(np.zeros((700, 600, 3), dtype=np.uint8)).size == (600, 700)
    assert draw_instances(Image.new("L", (4000, 2000))).size == (1280, 640)


def disc(center: tuple[int, int], radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:64, :96]
    return (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2


def has_color(canvas, color) -> np.ndarray:
    return (np.asarray(canvas) == color).all(axis=2)


@pytest.mark.parametrize("named", [(200, 40, 40), (40, 60, 200), (30, 150, 50), (240, 240, 240), (15, 15, 15)])
def test_things_keep_their_colour_under_any_overlay(named):
    """What a phrase such as "blue circle" names must be seen in the picture."""
    image, mask = GREY.copy(), disc((32, 48), 14)
    image[mask] = named
    core = disc((32, 48), 9).repeat(5, 0).repeat(5, 1)
    for color in instance_colors(12):
        canvas = draw_instances(image, masks=mask[None], colors=[color], tag_labels=False).resize((480, 320))
        seen = np.asarray(canvas).astype(float)[core].mean(axis=0)
        moved, left = np.abs(seen - named).max(), np.abs(seen - color).max()
        assert moved < left / 3
        assert moved > 0.1 * np.abs(np.subtract(color, named)).max()  # and yet it is tinted


def test_a_mask_has_an_outline_with_a_halo_and_the_rest_is_as_it_was():
    image, mask, color = GREY.copy(), disc((32, 48), 14), (0, 161, 228)
    image[mask] = color  # the outline alone would not be seen
    canvas = np.asarray(draw_instances(image, masks=mask[None], colors=[color], tag_labels=False))
    scale = 512 / 96
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    radius = np.hypot(rows + 0.5 - 32.5 * scale, columns + 0.5 - 48.5 * scale)
    halo = radius[has_color(canvas, (255, 255, 255))]
    assert 14 * scale - 8 < halo.min() and halo.max() < 14 * scale + 6
    ring = has_color(draw_instances(GREY, masks=mask[None], colors=[color], tag_labels=False), color)
    across = ring[round(32.5 * scale)]  # the outline is cut twice, each time some pixels wide
    assert across.sum() in range(4, 11)
    assert 2 * 14 * scale - 12 < np.ptp(np.flatnonzero(across)) < 2 * 14 * scale + 4
    assert (canvas[radius > 85] == np.asarray(draw_instances(image))[radius > 85]).all()


def test_instances_of_one_phrase_differ_in_colour():
    masks = np.stack([disc((20, 20), 10), disc((40, 70), 10)])
    canvas = draw_instances(GREY, masks=masks, labels=["red circle"] * 2)
    first, second = (has_color(canvas, color) for color in instance_colors(2))
    assert first[:, :256].sum() > 300 and second[:, 256:].sum() > 300
    assert not first[:, 256:].any() and not second[:, :256].any()


def test_a_mask_at_the_edge_of_the_picture():
    mask = np.zeros((1, 64, 96), dtype=bool)
    mask[0, :20, :30] = True
    found = has_color(draw_instances(GREY, masks=mask, tag_labels=False), instance_colors(1)[0])
    assert found[0, :150].all() and found[:100, 0].all() and not found[5:90, 5:140].any()


def test_a_box_is_drawn_where_it_is():
    canvas = draw_instances(GREY, boxes=[[30, 20, 60, 44]], labels=["red circle"], colors=[(0, 255, 0)])
    found = has_color(canvas, (0, 255, 0))
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    scale = 512 / 96
    assert abs(columns[0] - 30 * scale) <= 1.5 and abs(columns[-1] + 1 - 60 * scale) <= 1.5
    assert abs(rows[-1] + 1 - 44 * scale) <= 1.5
    assert rows[0] < 20 * scale - 5  # the tag sits on top of it


def test_an_instance_with_an_empty_mask_shows_its_box():
    instance = one_instance()
    empty = draw_instances(GREY, instance["boxes"], np.zeros_like(instance["masks"]), instance["labels"])
    assert empty.tobytes() == draw_instances(GREY, instance["boxes"], None, instance["labels"]).tobytes()


def test_tags_stay_in_the_picture_and_avoid_each_other():
    colors = [(250, 10, 10), (10, 250, 10)]
    boxes = [[0, 0, 30, 20], [0, 0, 30, 21]]
    canvas = draw_instances(GREY, boxes=boxes, labels=["a", "b"], scores=[0.9, 0.8], colors=colors)
    for color in colors:
        assert has_color(canvas, color).sum() > 600  # each tag's ground is seen


def test_tensors_draw_as_arrays_do():
    instance = one_instance()
    arrays = draw_instances(GREY, **instance, scores=[0.75])
    tensors = draw_instances(
        Image.fromarray(GREY),
        torch.tensor(instance["boxes"]),
        torch.tensor(instance["masks"]),
        instance["labels"],
        torch.tensor([0.75]),
    )
    assert arrays.tobytes() == tensors.tobytes()


def test_wrong_lengths_and_sizes_are_refused():
    instance = one_instance()
    with pytest.raises(ValueError, match="equally many"):
        draw_instances(GREY, instance["boxes"], labels=["a", "b"])
    with pytest.raises(ValueError, match=r"\(64, 96\)"):
        draw_instances(GREY, masks=instance["masks"].transpose(0, 2, 1))


def test_instance_colours_are_distinct_and_stable():
    colors = instance_colors(40)
    assert len(set(colors)) == 40
    assert instance_colors(5) == colors[:5]


def test_side_by_side_holds_both_and_is_deterministic():
    prediction, truth = {**one_instance(), "scores": [0.8]}, one_instance()
    panel = side_by_side(GREY, prediction, truth, title="a/very/long/path/" * 20 + "image.png")
    again = side_by_side(GREY, prediction, truth, title="a/very/long/path/" * 20 + "image.png")
    assert panel.tobytes() == again.tobytes()
    assert panel.width > 2 * 512 and panel.height > 341
    nothing = side_by_side(GREY, {}, truth)
    found = has_color(nothing, instance_colors(1)[0])
    assert not found[:, : nothing.width // 2].any() and found[:, nothing.width // 2 :].any()
    assert side_by_side(GREY, {}, {}).width == panel.width


def test_side_by_side_shows_one_thing_in_one_colour():
    masks = np.stack([disc((20, 20), 10), disc((40, 70), 10)])
    prediction = {"masks": masks, "labels": ["a", "b"], "scores": [0.9, 0.8]}
    truth = {"masks": masks[::-1], "labels": ["a", "a"]}
    panel = side_by_side(GREY, prediction, truth)
    left, right = panel.crop((0, 0, panel.width // 2, panel.height)), panel.crop((panel.width // 2, 0, *panel.size))
    found, missed = instance_colors(2), instance_colors(4)[2]
    assert has_color(left, found[0]).sum() > 300 and has_color(left, found[1]).sum() > 300
    assert has_color(right, found[0]).sum() > 300  # the second true object is what the first prediction covers
    assert has_color(right, missed).sum() > 300  # a "b" was found where an "a" is
    assert not has_color(right, found[1]).any() and not has_color(left, missed).any()


def test_side_by_side_names_the_concepts_where_there_are_several():
    one, other = one_instance(), {**one_instance(), "labels": ["blue circle"]}
    alone, mixed = side_by_side(GREY, {}, one), side_by_side(GREY, other, one)
    colors = instance_colors(2)
    assert has_color(mixed, colors[1]).sum() > has_color(alone, colors[0]).sum() + 500  # the ground of its tag


def crowd(labels=("cell",)) -> dict:
    """48 things of 6 pixels, of which so many concepts take turns."""
    places = [(6 + 10 * row, 6 + 11 * column) for row in range(6) for column in range(8)]
    masks = np.stack([disc(place, 3) for place in places])
    return {"masks": masks, "labels": [labels[index % len(labels)] for index in range(48)]}


def test_many_small_things_stay_visible():
    crowded = crowd()
    canvas = draw_instances(GREY, **crowded, scores=[0.5] * 48)
    assert max(canvas.size) == 1024
    assert canvas.tobytes() == draw_instances(GREY, **crowded).tobytes()  # there are no tags
    for mask, color in zip(crowded["masks"], drawing_colors(crowded["labels"]), strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) * 1024 // 96 for axis in (1, 0))
        own = np.asarray(canvas)[rows[0] : rows[-1], columns[0] : columns[-1]]
        outline = has_color(own, color).mean()
        assert 0.02 < outline < 0.4  # it has its own outline, which leaves most of it to be seen


def test_many_things_of_several_concepts_have_the_colour_of_their_concept():
    labels = crowd(("cell", "debris"))["labels"]
    assert drawing_colors(labels) == instance_colors(2) * 24
    assert drawing_colors(labels[:30]) == instance_colors(30)
    assert drawing_colors(["cell"] * 48) == instance_colors(48)
    few = {"masks": crowd()["masks"][:2], "labels": ["cell", "debris"]}
    panel = side_by_side(GREY, crowd(("cell", "debris")), few)
    left, right = panel.crop((0, 0, panel.width // 2, panel.height)), panel.crop((panel.width // 2, 0, *panel.size))
    assert all(has_color(half, color).any() for half in (left, right) for color in instance_colors(2))
    assert not has_color(right, instance_colors(50)[48]).any()


def detections(count: int, best: dict | None = None, prompts=("cell", "debris")) -> Detections:
    masks = crowd()["masks"][:count]
    boxes = torch.tensor([[columns[0], rows[0], columns[-1], rows[-1]] for rows, columns in map(edges, masks)])
    scores = torch.linspace(0.9, 0.31, count)
    rle = encode_masks(masks)
    return Detections(boxes.float().reshape(-1, 4), scores, ["cell"] * count, rle, (64, 96), list(prompts), best or {})


def edges(mask):
    return np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))


def test_an_overlay_has_a_legend():
    found = detections(2, {"cell": 0.9, "debris": 0.004})
    assert found.legend(instance_colors(2)) == [
        ("cell: 2 (0.31 to 0.90)", instance_colors(2)),
        ("debris: none (best score 0.004)", []),
    ]
    picture = torch.from_numpy(GREY).permute(2, 0, 1)
    drawing = draw_instances(GREY, found.boxes, found.masks, found.labels, found.scores)
    overlay = draw_detections(picture, found)
    assert overlay.width == drawing.width and overlay.height > drawing.height
    below = overlay.crop((0, drawing.height, *overlay.size))
    assert all(has_color(below, color).sum() > 150 for color in instance_colors(2))
    assert overlay.crop((0, 0, *drawing.size)).tobytes() == drawing.tobytes()


def test_an_overlay_of_nothing_says_the_best_scores():
    found = detections(0, {"cell": 0.21, "debris": 0.1})
    assert found.legend([]) == [
        ("Nothing above the threshold.", []),
        ("cell: none (best score 0.21)", []),
        ("debris: none (best score 0.10)", []),
    ]
    assert "0 cell (best score 0.21)" in repr(found)
    picture = torch.from_numpy(GREY).permute(2, 0, 1)
    said, other = (draw_detections(picture, detections(0, {"cell": best})) for best in (0.21, 0.22))
    assert said.tobytes() != other.tobytes()
    many = detections(1, {}, [f"thing {number}" for number in range(60)] + ["cell"]).legend(instance_colors(1))
    assert len(many) == LEGEND_LABELS + 1 and many[0][0].startswith("cell: 1") and many[-1][0] == "and 37 more prompts"


def test_side_by_side_says_the_best_score_of_what_is_not_found():
    truth = one_instance()
    said, other, unknown = (
        side_by_side(GREY, {"best": best}, truth) for best in ({"red circle": 0.21}, {"red circle": 0.12}, {})
    )
    assert said.tobytes() != other.tobytes() != unknown.tobytes()


def test_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": step, "loss": 9 / step, "lr_vision": 1e-4} for step in range(1, 80)]
    lines += [{"kind": "valid", "step": 40, "loss": 1.5, "segm_AP": 0.2, "segm_per_class": {"a": {"AP": 0.1}}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = Image.open(plot_curves(path, tmp_path / "curves.png"))
    three_panels = picture.width
    first = (tmp_path / "curves.png").read_bytes()
    plot_curves(path, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    assert Image.open(plot_curves(path, tmp_path / "one.png")).width == pytest.approx(three_panels / 3, abs=2)
    path.write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match="no loss"):
        plot_curves(path, tmp_path / "none.png")
