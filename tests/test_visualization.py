import json

import numpy as np
import pytest
import torch
from PIL import Image

from sam3_hf.visualization import concept_colours, draw_instances, plot_curves, side_by_side

GREY = np.full((64, 96, 3), 128, dtype=np.uint8)


def one_instance():
    mask = np.zeros((1, 64, 96), dtype=bool)
    mask[0, 20:44, 30:60] = True
    return {"boxes": np.array([[30.0, 20, 60, 44]]), "masks": mask, "labels": ["red circle"]}


def test_small_pictures_grow_and_large_ones_shrink():
    assert draw_instances(GREY).size == (512, 341)
    assert draw_instances(np.zeros((700, 600, 3), dtype=np.uint8)).size == (600, 700)
    assert draw_instances(Image.new("L", (4000, 2000))).size == (1280, 640)


def test_a_mask_tints_its_pixels_and_no_others():
    instance = one_instance()
    canvas = np.asarray(draw_instances(GREY, masks=instance["masks"], labels=["x"], colours={"x": (255, 0, 0)}))
    scale = 512 / 96
    inside = canvas[round(32 * scale), round(50 * scale)].astype(int)
    assert inside[0] > 150 and inside[1] < 100  # tinted, but the picture shows through
    assert inside[1] > 20
    assert (canvas[round(55 * scale), round(80 * scale)] == 128).all()


def test_a_box_is_drawn_where_it_is():
    colours = {"red circle": (0, 255, 0)}
    canvas = np.asarray(draw_instances(GREY, boxes=[[30, 20, 60, 44]], labels=["red circle"], colours=colours))
    found = (canvas == (0, 255, 0)).all(axis=2)
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    scale = 512 / 96
    assert abs(columns[0] - 30 * scale) <= 1.5 and abs(columns[-1] + 1 - 60 * scale) <= 1.5
    assert abs(rows[-1] + 1 - 44 * scale) <= 1.5
    assert rows[0] < 20 * scale - 5  # the tag sits on top of it


def test_tags_stay_in_the_picture_and_avoid_each_other():
    colours = {"a": (250, 10, 10), "b": (10, 250, 10)}
    boxes = [[0, 0, 30, 20], [0, 0, 30, 21]]
    canvas = np.asarray(draw_instances(GREY, boxes=boxes, labels=["a", "b"], scores=[0.9, 0.8], colours=colours))
    for colour in colours.values():
        assert (canvas == colour).all(axis=2).sum() > 600  # each tag's ground is seen


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


def test_concept_colours_are_distinct_and_stable():
    concepts = [f"concept {index}" for index in range(40)]
    colours = concept_colours(concepts)
    assert len(set(colours.values())) == 40
    assert concept_colours(concepts[:5]) == {concept: colours[concept] for concept in concepts[:5]}


def test_side_by_side_holds_both_and_is_deterministic():
    prediction, truth = {**one_instance(), "scores": [0.8]}, one_instance()
    panel = side_by_side(GREY, prediction, truth, title="a/very/long/path/" * 20 + "image.png")
    again = side_by_side(GREY, prediction, truth, title="a/very/long/path/" * 20 + "image.png")
    assert panel.tobytes() == again.tobytes()
    assert panel.width > 2 * 512 and panel.height > 341
    nothing = side_by_side(GREY, {}, truth)
    colour = np.array(concept_colours(["red circle"])["red circle"])
    left = np.asarray(nothing)[80:380, : nothing.width // 2]
    right = np.asarray(nothing)[80:380, nothing.width // 2 :]
    assert not (left == colour).all(axis=2).any() and (right == colour).all(axis=2).any()
    assert side_by_side(GREY, {}, {}).width == panel.width


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
