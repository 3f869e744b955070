"""The detector of a smaller model, fitted to the larger one on images and prompts."""

import copy

import pytest
import torch
from conftest import micro_config, shake
from torch import nn

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.mapping.calibration import asking
from sam3_hf.mapping.calibration.asking import Encoded, choose_prompts
from sam3_hf.mapping.calibration.decoder import refit_detr_decoder, refit_presence
from sam3_hf.mapping.calibration.detector import Decoded, what_is_found
from sam3_hf.mapping.calibration.images import draw_images

PHRASES = ["cat", "red car", "a very small house", "tree"]
RIDGE = 1e-3


@pytest.fixture(autouse=True)
def any_number_of_prompts(monkeypatch):
    """The presence head is fitted to the few prompts of these tests."""
    monkeypatch.setattr("sam3_hf.mapping.calibration.decoder.PROMPTS_PER_FEATURE", 1)


@pytest.fixture
def teacher() -> Sam3LiteModel:
    torch.manual_seed(0)
    return shake(Sam3LiteModel(micro_config(detr_decoder_layers=4))).eval()


def with_layers(teacher: Sam3LiteModel, kept: list[int]) -> Sam3LiteModel:
    """The teacher with some of its decoder layers."""
    model = copy.deepcopy(teacher)
    model.detr_decoder.layers = nn.ModuleList([model.detr_decoder.layers[index] for index in kept])
    return model


def encoded(model: Sam3LiteModel, seed: int = 5, images: int = 24) -> Encoded:
    processor = Sam3LiteProcessor.from_config(model.config)
    pixels = processor(images=draw_images(images, 64, seed=seed))["pixel_values"]
    return Encoded.of(model, processor, list(pixels.split(8)), PHRASES)


@torch.no_grad()
def fitted(teacher: Sam3LiteModel, kept: list[int]) -> Sam3LiteModel:
    student = with_layers(teacher, kept)
    choices = choose_prompts(encoded(teacher), seed=0)
    sides = [encoded(model).side(choices) for model in (student, teacher)]
    streams = [side.encode() for side in sides]
    wanted = sides[1].decode_all(streams[1])
    refit_detr_decoder(*sides, *streams, wanted, kept, RIDGE)
    refit_presence(student, teacher, sides[0].decode_all(streams[0]), wanted, RIDGE)
    return student


@torch.no_grad()
def answers(model: Sam3LiteModel, seed: int) -> dict[str, torch.Tensor]:
    pictures = draw_images(8, 64, seed=seed)
    outputs = model(**Sam3LiteProcessor.from_config(model.config)(images=pictures, text=[PHRASES] * len(pictures)))
    return {name: outputs[name] for name in ("pred_boxes", "pred_logits", "presence_logits")}


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / (expected - expected.mean()).norm()).item()


def test_what_dropped_layers_did_is_done_by_those_that_stay(teacher):
    kept, expected = [0, 1, 3], answers(teacher, seed=99)
    before, after = (answers(model, seed=99) for model in (with_layers(teacher, kept), fitted(teacher, kept)))
    for name in expected:
        errors = error(before[name], expected[name]), error(after[name], expected[name])
        assert errors[1] < 0.6 * errors[0], (name, errors)


def test_a_single_layer_does_the_work_of_all(teacher):
    expected = answers(teacher, seed=99)
    before, after = (answers(model, seed=99) for model in (with_layers(teacher, [3]), fitted(teacher, [3])))
    for name in expected:
        errors = error(before[name], expected[name]), error(after[name], expected[name])
        assert errors[1] < 0.8 * errors[0], (name, errors)


def test_few_prompts_leave_the_presence_head_alone(teacher, monkeypatch):
    monkeypatch.setattr("sam3_hf.mapping.calibration.decoder.PROMPTS_PER_FEATURE", 4)
    student, kept = fitted(teacher, [0, 1, 3]), with_layers(teacher, [0, 1, 3]).state_dict()
    name = "detr_decoder.presence_head.layer3.weight"
    assert torch.equal(student.state_dict()[name], kept[name])


def test_a_fit_changes_nothing_but_what_it_names(teacher):
    student, kept = fitted(teacher, [0, 1, 3]), with_layers(teacher, [0, 1, 3]).state_dict()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, kept[name])}
    parts = ("self_attn.o_proj", "text_cross_attn.o_proj", "vision_cross_attn.o_proj", "mlp.fc2", "mlp_layer_norm")
    heads = ("detr_decoder.box_head.layer3", "detr_decoder.presence_head.layer3")
    assert changed and all(name.startswith(heads) or name.rpartition(".")[0].endswith(parts) for name in changed)
    for part in (*parts, *heads):
        assert any(part in name for name in changed), part


def test_places_count_by_the_best_box_over_them():
    """A grid of 8 x 8: a box counts where it reaches into a place, and of two the better one."""
    boxes = torch.tensor([[[0.5, 0.5, 0.24, 0.24], [0.54, 0.02, 0.02, 0.02], [0.5, 0.5, 0.1, 0.9]]])
    scores = torch.tensor([[0.9, 0.4, 0.3]])
    found = what_is_found(Decoded(None, None, scores, boxes), 8, 8)
    expected = torch.zeros(8, 8)
    expected[:, 3:5], expected[3:5, 3:5], expected[0, 4] = 0.3, 0.9, 0.4
    assert torch.equal(found.view(8, 8), expected)


# which phrases


def test_phrases_that_the_larger_model_sees_are_asked_most(teacher, monkeypatch):
    monkeypatch.setattr(asking, "SEEN", 1)
    monkeypatch.setattr(asking, "OTHERS", 1)
    sides = encoded(teacher)
    seen = {0: 3, 1: 0, 2: 2}  # the phrase that is there, by batch
    monkeypatch.setattr(Encoded, "best_scores", lambda self, index, rows: (rows == seen[index]).float())
    choices = choose_prompts(sides, seed=0)
    assert [rows.shape for rows in choices] == [(8, 2)] * 3
    for index, rows in enumerate(choices):
        assert (rows[:, 0] == seen[index]).all() and (rows[:, 1] != seen[index]).all()
    others = torch.cat([rows[:, 1] for rows in choices])
    assert len(others.unique()) == len(PHRASES)
    again, other = choose_prompts(sides, seed=0), choose_prompts(sides, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(choices, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(choices, other, strict=True))


def test_few_phrases_are_all_asked(teacher):
    for rows in choose_prompts(encoded(teacher), seed=0):
        assert rows.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * len(rows)


def test_the_best_score_is_that_of_the_model(teacher):
    """Of each image and phrase the highest of `sigmoid(pred_logits) * sigmoid(presence_logits)`."""
    sides, pictures = encoded(teacher, images=3), draw_images(3, 64, seed=5)
    rows = torch.tensor([[3, 1], [0, 2], [1, 0]])
    with torch.no_grad():
        scores = sides.best_scores(0, rows)
        asked = [[PHRASES[row] for row in each] for each in rows.tolist()]
        outputs = teacher(**Sam3LiteProcessor.from_config(teacher.config)(images=pictures, text=asked))
    expected = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid().view(-1, 1)).amax(1)
    assert torch.allclose(scores.flatten(), expected, atol=1e-5)
