"""What sets a student apart from its teacher, term by term: values computed by hand, and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from sam3_hf.training.correspondence import SILENT, Target, in_order, layer_map, match_queries, partners_of
from sam3_hf.training.distillation_terms import (
    box_errors,
    disagreeing_points,
    divergence,
    feature_errors,
    mask_errors,
    presence_errors,
    query_errors,
    relative_errors,
    score_errors,
    semantic_errors,
    soft_dice,
)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def kl(student: float, teacher: float) -> float:
    """Of two probabilities."""
    return teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))


def test_features():
    """Channels (3, 4) against (4, 3): squared error 1, variance 1/4, cosine 24/25. The second image is equal."""
    teacher = torch.tensor([[4.0, 3.0], [4.0, 3.0]])[..., None, None]
    student = torch.tensor([[3.0, 4.0], [4.0, 3.0]])[..., None, None]
    assert feature_errors(student, teacher).tolist() == pytest.approx([1 / 0.25 + 1 - 24 / 25, 0], abs=1e-6)
    assert feature_errors(student.half(), teacher.half()).dtype == torch.float32


def test_encoder():
    teacher, student = torch.tensor([[[0.0, 2.0]], [[1.0, 5.0]]]), torch.tensor([[[0.0, 4.0]], [[0.0, 5.0]]])
    assert relative_errors(student, teacher).tolist() == pytest.approx([2 / 1, 0.5 / 4])
    assert relative_errors(torch.ones(1, 4), torch.zeros(1, 4)).isfinite().all()  # a teacher without variance


def test_scores():
    """Over two layers and two queries; with temperature 2, probabilities are those of half the logits."""
    student = torch.tensor([[[logit(0.5), logit(0.2)]], [[logit(0.9), logit(0.2)]]])
    teacher = torch.tensor([[[logit(0.9), logit(0.2)]], [[logit(0.9), logit(0.1)]]])
    expected = (kl(0.5, 0.9) + kl(0.2, 0.1)) / 2
    assert score_errors(student, teacher, 1.0).tolist() == pytest.approx([expected], rel=1e-5)
    assert score_errors(2 * student, 2 * teacher, 2.0).tolist() == pytest.approx([4 * expected], rel=1e-5)


def test_presence():
    student = torch.tensor([[logit(0.5), 0.0], [logit(0.3), 0.0]])
    teacher = torch.tensor([[logit(0.9), 0.0], [logit(0.9), 0.0]])
    expected = (kl(0.5, 0.9) + kl(0.3, 0.9)) / 2
    assert presence_errors(student, teacher).tolist() == pytest.approx([expected, 0], rel=1e-5, abs=1e-7)


def test_boxes():
    """A box shifted by half its width: L1 0.1, IoU 1/3, no more in the hull. No trust counts nothing."""
    teacher = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]])
    student = torch.tensor([[[[0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]])
    distance, giou = box_errors(student, teacher, torch.tensor([[0.5, 0.0]]))
    assert distance.tolist() == pytest.approx([0.05]) and giou.tolist() == pytest.approx([(1 - 1 / 3) / 2])
    both = box_errors(teacher, teacher, torch.ones(1, 2))
    assert [values.tolist() for values in both] == [pytest.approx([0], abs=1e-6)] * 2


def test_queries():
    """Of variance 1 and 4, off by 1 in one channel of two, in the first layer of two; what is not trusted is free."""
    teacher = torch.tensor([[[[0.0, 2.0], [1.0, 5.0], [0.0, 2.0]]]] * 2)
    student = teacher.clone()
    student[0, 0, :, 0] += 1
    errors = query_errors(student, teacher, torch.tensor([[0.5, 1.0, 0.0]]))
    assert errors.tolist() == pytest.approx([(0.5 * 0.5 / 1 + 1.0 * 0.5 / 4) / 2])


def test_masks():
    """Constant maps, so every point has the same two probabilities, 0.8 and 0.5."""
    student, teacher = torch.full((1, 4, 4), logit(0.8)), torch.full((1, 4, 4), 0.0)
    points = torch.full((1, 3, 2), 0.5)
    dice = 1 - (2 * 3 * 0.4 + 1) / (3 * 0.64 + 3 * 0.25 + 1)
    assert mask_errors(student, teacher, points).tolist() == pytest.approx([kl(0.8, 0.5) + dice], rel=1e-5)
    assert soft_dice(teacher.flatten(1), teacher.flatten(1)).tolist() == pytest.approx([0], abs=1e-6)


def test_semantic_map():
    student = torch.tensor([logit(0.8), 0.0]).reshape(1, 1, 1, 2)
    assert semantic_errors(student, torch.zeros(1, 1, 1, 2)).tolist() == pytest.approx([kl(0.8, 0.5) / 2], rel=1e-5)


def test_points_are_where_masks_differ():
    config = SimpleNamespace(mask_num_points=8, mask_oversample_ratio=16, mask_importance_sample_ratio=0.75)
    student, teacher = torch.full((2, 8, 8), -9.0), torch.full((2, 8, 8), -9.0)
    student[:, :, 4:] = 9.0  # the right half is apart
    torch.manual_seed(0)
    points = disagreeing_points(student, teacher, config)
    assert points.shape == (2, 8, 2) and points.min() >= 0 and points.max() <= 1
    assert (points[:, :6, 0] > 0.5).all()


TERMS = {
    "features": (feature_errors, [(2, 3, 2, 2)] * 2),
    "relative": (relative_errors, [(2, 3, 4)] * 2),
    "divergence": (lambda s, t: divergence(s, t, 1.7), [(2, 3)] * 2),
    "scores": (lambda s, t: score_errors(s, t, 2.0), [(2, 2, 3)] * 2),
    "presence": (presence_errors, [(2, 3)] * 2),
    "semantic": (semantic_errors, [(2, 1, 3, 3)] * 2),
    "dice": (soft_dice, [(2, 5)] * 2),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients(name):
    term, shapes = TERMS[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    assert gradcheck(lambda own: term(own, teacher), student.requires_grad_())
    at_teacher = teacher.clone().requires_grad_()
    error = term(at_teacher, teacher).sum()
    error.backward()
    assert error.item() == pytest.approx(0, abs=1e-9)
    assert at_teacher.grad.abs().max() < 1e-9


@pytest.mark.parametrize("term", [query_errors, box_errors])
def test_gradients_of_trusted_queries(term):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(2, 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    trust = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    assert gradcheck(lambda own: term(own, teacher, trust), student.requires_grad_())
    at_teacher = teacher.clone().requires_grad_()
    sum(errors.sum() for errors in term(at_teacher, teacher, trust)).backward()
    assert at_teacher.grad.abs().max() < 1e-9


def test_gradients_of_masks():
    generator = torch.Generator().manual_seed(0)
    own, goal = (torch.randn(2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    points = torch.rand(2, 5, 2, generator=generator, dtype=torch.float64)
    assert gradcheck(lambda logits: mask_errors(logits, goal, points), own.requires_grad_())


@pytest.mark.parametrize(
    ("student", "teacher", "chosen", "expected"),
    [
        (4, 6, None, [0, 2, 3, 5]),
        (6, 6, None, [0, 1, 2, 3, 4, 5]),
        (4, 6, [0, 1, 2, 3], [0, 1, 2, 5]),
        (1, 6, None, [5]),
        (6, 4, None, [0, 1, 1, 2, 2, 3]),
        (2, 3, [0, 4], [0, 2]),  # of another teacher
    ],
)
def test_the_last_layer_follows_the_last(student, teacher, chosen, expected):
    assert layer_map(student, teacher, chosen) == expected


def boxes_at(*centres: float) -> torch.Tensor:
    """One layer, one prompt."""
    return torch.tensor([[[[centre, 0.5, 0.1, 0.1] for centre in centres]]])


def test_queries_are_matched_where_their_numbers_differ():
    """Four queries of the teacher, of which the second is of no interest, for three of the student."""
    target = Target(
        logits=torch.tensor([[[2.0, -5.0, 2.0, 1.0]]]),
        boxes=boxes_at(0.1, 0.5, 0.9, 0.4),
        trust=torch.tensor([[0.9, 0.0, 0.9, 0.7]]),
        presence_logits=torch.zeros(1, 1),
    )
    partners = match_queries(torch.zeros(1, 1, 3), boxes_at(0.8, 0.3, 0.2), target)
    assert partners.tolist() == [[2, 3, 0]]
    ordered = in_order(target, partners)
    assert ordered.boxes[0, 0, :, 0].tolist() == pytest.approx([0.9, 0.4, 0.1])
    assert ordered.trust.tolist() == [pytest.approx([0.9, 0.7, 0.9])]
    asked = torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 3])
    assert partners_of(partners, *asked).tolist() == [2, -1, 1]


def test_a_query_without_a_partner_shall_be_silent():
    target = Target(torch.ones(2, 1, 1), boxes_at(0.9).expand(2, -1, -1, -1), torch.ones(1, 1), torch.zeros(2, 1))
    partners = match_queries(torch.zeros(2, 1, 3), boxes_at(0.1, 0.85, 0.5).expand(2, -1, -1, -1), target)
    assert partners.tolist() == [[-1, 0, -1]]
    ordered = in_order(target, partners)
    assert ordered.logits.tolist() == [[[SILENT, 1, SILENT]]] * 2 and ordered.trust.tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match="not finite"):
        match_queries(torch.full((2, 1, 3), math.nan), boxes_at(0.1, 0.85, 0.5).expand(2, -1, -1, -1), target)
