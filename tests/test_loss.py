"""Losses: hand-computed values, agreement with a reference implementation, matching, sharding."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from torchvision.ops import sigmoid_focal_loss

from sam3_hf import loss_sam3_lite as loss_module
from sam3_hf.configuration_sam3_lite import Sam3LiteLossConfig
from sam3_hf.loss_sam3_lite import (
    DetectionOutputs,
    box_overlaps,
    dice_loss,
    focal_loss,
    match_queries,
    one_to_many_matches,
    pack_labels,
    sam3_lite_loss,
    sample_logits,
    sample_masks,
    uncertain_points,
)

ORACLE = json.loads((Path(__file__).parent / "fixtures" / "loss_oracle.json").read_text())


def make_config(**overrides):
    """The defaults, with fewer points per mask and with masks on the one-to-many queries too."""
    return Sam3LiteLossConfig(**{"mask_num_points": 64, "one_to_many_masks": True, **overrides})


def fixed_points(num_masks, num_points, device):
    """The same points for every mask, whatever their order: a stand-in for the random ones."""
    points = np.random.default_rng(num_points).random((1, num_points, 2), dtype=np.float32)
    return torch.from_numpy(points).to(device).expand(num_masks, -1, -1)


def make_case(seed, counts, layers=2, queries=12, mask_size=None, logit_size=(9, 7), one_to_many=True, degenerate=()):
    """Predictions and labels by seed. Most queries lie near an object of their prompt, so that matches are close.

    `degenerate` lists objects (numbered through the batch) whose boxes have no width. Random numbers are uniform
    ones of numpy's PCG64, which are the same everywhere.
    """
    rng = np.random.default_rng(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return torch.from_numpy(rng.random(shape, dtype=np.float32)) * (high - low) + low

    num_prompts, labels, number = len(counts), [], 0
    for count in counts:
        boxes = torch.cat([uniform(count, 2, low=0.25, high=0.75), uniform(count, 2, low=0.05, high=0.4)], dim=1)
        for i in range(count):
            if number + i in degenerate:
                boxes[i, 2] = 0
        number += count
        label = {"boxes": boxes}
        if mask_size is not None:
            label["masks"] = uniform(count, *mask_size) < uniform(count, 1, 1, low=0.1, high=0.6)
        labels.append(label)

    def predict():
        logits = uniform(layers, num_prompts, queries, low=-4, high=4)
        boxes = torch.cat(
            [
                uniform(layers, num_prompts, queries, 2, low=0.2, high=0.8),
                uniform(layers, num_prompts, queries, 2, low=0.05, high=0.5),
            ],
            dim=-1,
        )
        for i, label in enumerate(labels):
            near = min(queries - 2, 3 * len(label["boxes"]))
            if near > 0:
                target = label["boxes"].clamp(min=0.05).repeat(3, 1)[:near]
                boxes[:, i, :near] = target * uniform(layers, near, 4, low=0.8, high=1.2)
        return logits, boxes

    logits, boxes = predict()
    extra_logits, extra_boxes = predict() if one_to_many else (None, None)
    outputs = DetectionOutputs(logits, boxes, uniform(layers, num_prompts, low=-3, high=3), extra_logits, extra_boxes)
    mask_logits = None
    if mask_size is not None:
        outputs.semantic_logits = uniform(num_prompts, 1, *logit_size, low=-5, high=5)
        mask_logits = uniform(2, num_prompts, queries, *logit_size, low=-5, high=5)
    return outputs, labels, mask_logits


def mask_head(mask_logits):
    """`mask_logits_fn` over (2, prompts, queries, h, w): row 1 is the one-to-many copy."""
    return lambda prompt, query, one_to_many: mask_logits[int(one_to_many)][prompt, query]


def case_loss(case, config=None):
    outputs, labels, mask_logits = case
    mask_logits_fn = None if mask_logits is None else mask_head(mask_logits)
    return sam3_lite_loss(outputs, labels, config or make_config(), mask_logits_fn)


def single(logits, boxes, target, presence=0.0, **kwargs):
    """One layer, one prompt: queries' logits and boxes against the prompt's boxes."""
    outputs = DetectionOutputs(
        torch.tensor([[logits]]), torch.tensor([[boxes]]), torch.tensor([[float(presence)]]), **kwargs
    )
    return outputs, [{"boxes": torch.tensor(target).reshape(-1, 4)}]


def require_grad(outputs):
    """Every tensor of the outputs as a leaf with gradient."""
    leaves = {name: value.requires_grad_() for name, value in vars(outputs).items() if value is not None}
    return list(leaves.values())


@pytest.mark.parametrize("entry", ORACLE, ids=lambda entry: f"seed{entry['case']['seed']}")
def test_every_term_agrees_with_the_reference_whose_best_object_is_written_last(entry, monkeypatch):
    """Numbers of facebookresearch/sam3's own loss and matchers on the same tensors, its weights applied.

    Its total carries a factor sqrt(prompts) that this loss leaves to the learning rate. Where a one-to-many query
    serves several objects, it keeps the classification target that it writes last: for these numbers its matches were
    sorted by that target, so that the best one stays, as here. In the order that its matcher gives them,
    `loss_class_o2m` is another (see the next test).
    """
    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    loss, losses = case_loss(make_case(**entry["case"]))
    assert set(losses) == set(entry["terms"])
    for name, value in entry["terms"].items():
        assert losses[name].item() == pytest.approx(value, rel=5e-6, abs=1e-7), name
    total = loss.item() * math.sqrt(len(entry["case"]["counts"]))
    assert total == pytest.approx(entry["total_times_sqrt_prompts"], rel=5e-6)


def last_target_wins(self, dim, index, source, reduce):
    """A stand-in for `scatter_reduce` that writes in order, as the reference implementation's indexed write does."""
    for position, value in zip(index.tolist(), source, strict=True):
        self[position] = value
    return self


@pytest.mark.parametrize(
    ("seed", "more"), [(1, 1.059), (2, 1), (3, 1.040), (4, 1), (5, 1.176), (6, 1), (7, 1.015), (8, 1.168)]
)
def test_the_reference_in_its_own_order_differs_where_a_query_serves_several_objects(seed, more, monkeypatch):
    """`loss_class_o2m` with the target of the last object, relative to that with the best one; no other term moves."""
    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    (case,) = (entry["case"] for entry in ORACLE if entry["case"]["seed"] == seed)
    _, best = case_loss(make_case(**case))
    monkeypatch.setattr(torch.Tensor, "scatter_reduce", last_target_wins)
    _, last = case_loss(make_case(**case))
    for name in best:
        ratio = more if name == "loss_class_o2m" else 1
        assert last[name].item() == pytest.approx(ratio * best[name].item(), rel=1e-3), name


def test_terms_of_one_object_by_hand():
    box, shifted, far = [0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]
    _, losses = sam3_lite_loss(*single([0.0, 0.0], [far, shifted], box), make_config())
    # shifted by half its width: intersection .02, union and hull .06; a target of any size at logit 0 costs log 2
    assert losses["loss_bbox"].item() == pytest.approx(5 * 0.1)
    assert losses["loss_giou"].item() == pytest.approx(2 * (1 - 1 / 3))
    assert losses["loss_class"].item() == pytest.approx(20 * (10 + 0.25) * math.log(2) / 200)
    assert losses["loss_presence"].item() == pytest.approx(20 * 0.5 * math.log(2))
    assert set(losses) == {"loss_bbox", "loss_giou", "loss_class", "loss_presence"}


def test_classification_target_is_iou_aware():
    box, shifted = [0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2]
    _, losses = sam3_lite_loss(*single([2.0], [shifted], box), make_config())
    prob = 1 / (1 + math.exp(-2))
    goal = prob**0.25 * (1 / 3) ** 0.75
    expected = -goal * math.log(prob) - (1 - goal) * math.log(1 - prob)
    assert losses["loss_class"].item() == pytest.approx(20 * 10 * expected / 200, rel=1e-5)


@pytest.mark.parametrize("best_first", [True, False])
def test_query_of_several_objects_takes_its_best_target(best_first, monkeypatch):
    box, shifted = [0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2]
    extra = {"one_to_many_logits": torch.tensor([[[2.0]]]), "one_to_many_boxes": torch.tensor([[[box]]])}
    objects = [box, shifted] if best_first else [shifted, box]
    prob = 1 / (1 + math.exp(-2))

    def class_loss(iou):
        goal = prob**0.25 * iou**0.75
        return 2 * 20 * 10 * (-goal * math.log(prob) - (1 - goal) * math.log(1 - prob)) / 200

    _, losses = sam3_lite_loss(*single([0.0], [box], objects, **extra), make_config())
    assert losses["loss_class_o2m"].item() == pytest.approx(class_loss(1), rel=1e-5)
    assert losses["loss_bbox_o2m"].item() == pytest.approx(2 * 5 * (0 + 0.02) / 2, rel=1e-4)

    monkeypatch.setattr(torch.Tensor, "scatter_reduce", last_target_wins)  # the target then hangs on the order
    _, losses = sam3_lite_loss(*single([0.0], [box], objects, **extra), make_config())
    expected = class_loss(9 / 11 if best_first else 1)  # moved by a tenth of its width
    assert losses["loss_class_o2m"].item() == pytest.approx(expected, rel=1e-5)


def test_perfect_predictions_cost_nothing():
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 2:6, 2:6], masks[1, 8:14, 8:14] = True, True
    target = [[0.25, 0.25, 0.25, 0.25], [0.6875, 0.6875, 0.375, 0.375]]
    boxes = torch.tensor([target[1], [0.5, 0.5, 0.9, 0.9], target[0]])
    logits = torch.tensor([30.0, -30.0, 30.0])
    outputs = DetectionOutputs(
        logits.expand(2, 1, 3),
        boxes.expand(2, 1, 3, 4),
        torch.full((2, 1), 30.0),
        logits.expand(2, 1, 3),
        boxes.expand(2, 1, 3, 4),
        semantic_logits=masks.any(0)[None, None] * 60.0 - 30,
    )
    mask_logits = (masks[[1, 0, 0]].float() * 60 - 30)[None, None].expand(2, 1, -1, -1, -1).clone()
    labels = [{"boxes": torch.tensor(target), "masks": masks}]
    # at points between pixels the bilinear logit and the bilinear target differ: compare at pixel centres
    centers = (torch.arange(16) + 0.5) / 16
    grid = torch.cartesian_prod(centers, centers)
    config = make_config(mask_num_points=256, mask_oversample_ratio=1.0, mask_importance_sample_ratio=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_random_points", lambda n, points, device: grid[:points].expand(n, -1, -1))
        loss, losses = sam3_lite_loss(outputs, labels, config, mask_head(mask_logits))
    assert len(losses) == 4 * 2 + 3 * 2 + 2 + 4
    for name, value in losses.items():
        assert value.item() == pytest.approx(0, abs=1e-4), name
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_absent_concept_trains_presence_alone():
    outputs, labels = single([3.0, -1.0], [[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], [], presence=1.0)
    leaves = require_grad(outputs)
    loss, losses = sam3_lite_loss(outputs, labels, make_config())
    assert loss.item() == pytest.approx(20 * 0.5 * math.log(1 + math.e))
    assert losses["loss_class"] == losses["loss_bbox"] == losses["loss_giou"] == 0
    loss.backward()
    assert [bool(leaf.grad.any()) for leaf in leaves] == [False, False, True]


@pytest.mark.parametrize("with_masks", [True, False])
def test_batch_without_objects_reaches_every_output_with_zero_gradient(with_masks):
    outputs, labels, mask_logits = make_case(seed=1, counts=[0, 0], mask_size=[8, 8])
    if not with_masks:
        labels = [{"boxes": label["boxes"]} for label in labels]
    leaves = [*require_grad(outputs), mask_logits.requires_grad_()]
    loss, _ = case_loss((outputs, labels, mask_logits))
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        moved = leaf is outputs.presence_logits
        assert leaf.grad is not None and leaf.grad.isfinite().all() and bool(leaf.grad.any()) == moved


def test_dataset_without_masks_leaves_the_mask_heads_in_the_graph():
    outputs, labels, mask_logits = make_case(seed=2, counts=[2, 1], mask_size=[8, 8])
    labels = [{"boxes": label["boxes"]} for label in labels]
    leaves = [*require_grad(outputs), mask_logits.requires_grad_()]
    loss, losses = case_loss((outputs, labels, mask_logits))
    loss.backward()
    assert losses["loss_mask_focal"] == losses["loss_mask_dice_o2m"] == losses["loss_semantic_focal"] == 0
    for leaf in leaves:
        moved = leaf is not mask_logits and leaf is not outputs.semantic_logits
        assert leaf.grad is not None and bool(leaf.grad.any()) == moved


def test_no_prompts_at_all():
    loss, _ = case_loss(make_case(seed=1, counts=[], mask_size=[8, 8]))
    assert loss.item() == 0


def test_degenerate_boxes_stay_finite_and_count_as_absent():
    point = [0.5, 0.5, 0.0, 0.0]
    outputs, labels = single([0.0, 0.0], [point, [0.2, 0.2, 0.0, 0.4]], [point, [0.2, 0.2, 0.0, 0.4]], presence=-9.0)
    outputs.one_to_many_logits, outputs.one_to_many_boxes = outputs.logits.clone(), outputs.boxes.clone()
    leaves = require_grad(outputs)
    loss, losses = sam3_lite_loss(outputs, labels, make_config())
    loss.backward()
    assert loss.isfinite() and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert losses["loss_class"] == 0 and losses["loss_presence"] < 0.01
    assert losses["loss_bbox"].item() == pytest.approx(0, abs=1e-6)


def test_more_objects_than_queries_matches_every_query_once():
    outputs, labels, _ = make_case(seed=5, counts=[9, 1], queries=4)
    targets = pack_labels(labels, 2, torch.device("cpu"))
    matches = match_queries(outputs.logits, outputs.boxes, targets, make_config(), one_to_many=False)
    for match in matches:
        assert sorted(match.query[match.prompt == 0]) == [0, 1, 2, 3]
        assert len(set(match.object[match.prompt == 0])) == 4
        assert match.object[match.prompt == 1].tolist() == [9]
    assert sam3_lite_loss(outputs, labels, make_config())[0].isfinite()


def test_matching_is_the_best_of_all_permutations():
    config = make_config()
    for seed in range(6):
        outputs, labels, _ = make_case(seed=seed, counts=[3, 2], layers=2, queries=5, one_to_many=False)
        targets = pack_labels(labels, 2, torch.device("cpu"))
        matches = match_queries(outputs.logits, outputs.boxes, targets, config, one_to_many=False)
        for layer, match in enumerate(matches):
            for prompt, label in enumerate(labels):
                prob = outputs.logits[layer, prompt].double().sigmoid()
                focal = -0.25 * (1 - prob) ** 2 * prob.log() + 0.75 * prob**2 * (1 - prob).log()
                predicted, wanted = outputs.boxes[layer, prompt][:, None], label["boxes"][None]
                cost = 2 * focal[:, None] + 5 * (predicted - wanted).abs().sum(-1)
                cost -= 2 * box_overlaps(predicted, wanted)[1]
                best = min(
                    itertools.permutations(range(5), len(label["boxes"])),
                    key=lambda order: sum(cost[q, t] for t, q in enumerate(order)),
                )
                assert tuple(match.query[match.prompt == prompt]) == best


def test_one_to_many_matches_by_hand():
    prob = torch.tensor([[0.9, 0.1, 0.8, 0.0, 0.5, 1.0]])
    iou = torch.tensor([[0.6, 0.9, 0.2, 0.6, 0.5, 0.0]])
    # quality .3 prob + .7 IoU: .69, .66, .38, .42, .50, .30
    both = [prob.expand(2, -1), torch.cat([iou, torch.zeros(1, 6)])]
    assert one_to_many_matches(*both, make_config()).nonzero()[:, 1].tolist() == [0, 1, 3, 4]
    assert one_to_many_matches(prob, iou, make_config(one_to_many_topk=2)).nonzero()[:, 1].tolist() == [0, 1]
    assert one_to_many_matches(prob, iou, make_config(one_to_many_topk=9)).nonzero()[:, 1].tolist() == [0, 1, 3, 4]
    low = make_config(one_to_many_threshold=0.35, one_to_many_topk=9)
    assert one_to_many_matches(prob, iou, low).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]


def test_overlaps_by_hand():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]])
    other = torch.tensor([[0.5, 0.6, 0.2, 0.4], [0.9, 0.9, 0.2, 0.2]])
    iou, giou = box_overlaps(boxes, other)
    assert iou.tolist() == pytest.approx([0.5, 0.0])  # the first lies within the second of twice its area
    assert giou.tolist() == pytest.approx([0.5, -(1 - 0.08)])


def test_focal_and_dice_by_hand():
    logits, goal = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])
    expected = (0.25 * 0.25 * math.log(2) + 0.75 * 0.5625 * math.log(4)) / 2
    assert focal_loss(logits, goal, 0.25, 2.0).item() == pytest.approx(expected)
    assert dice_loss(logits, goal).item() == pytest.approx(1 - (2 * 0.5 + 1) / (1.25 + 1 + 1))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 2.0), (0.25, 0.0)])
def test_focal_loss_is_that_of_torchvision(alpha, gamma):
    logits = 5 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    goal = torch.rand(4, 500, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    expected = sigmoid_focal_loss(logits, goal, alpha, gamma).mean(-1)
    torch.testing.assert_close(focal_loss(logits, goal, alpha, gamma), expected, rtol=1e-6, atol=0)


def test_semantic_target_is_the_union_of_masks():
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[0, 0], masks[1, :2] = 1, 255
    outputs, labels = single([0.0], [[0.5, 0.5, 0.2, 0.2]], [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]])
    labels[0]["masks"] = masks
    outputs.semantic_logits = torch.zeros(1, 1, 2, 2)
    _, losses = sam3_lite_loss(outputs, labels, make_config())
    # half the pixels are object, every probability is one half
    assert losses["loss_semantic_focal"].item() == pytest.approx(20 * 0.5 * (0.6 + 0.4) * 0.25 * math.log(2))
    assert losses["loss_semantic_dice"].item() == pytest.approx(30 * (1 - (2 * 4 + 1) / (8 + 8 + 1)))


def test_prompt_whose_masks_are_empty_counts_nothing_in_the_semantic_terms():
    case = make_case(seed=3, counts=[2, 1], mask_size=[8, 8])
    case[1][1]["masks"].zero_()
    _, losses = case_loss(case)
    _, alone = case_loss(select_prompts(case, slice(0, 1)))
    torch.testing.assert_close(losses["loss_semantic_focal"], alone["loss_semantic_focal"])
    torch.testing.assert_close(losses["loss_semantic_dice"], alone["loss_semantic_dice"])


def test_mask_terms_by_hand():
    outputs, labels = single([0.0], [[0.5, 0.5, 0.2, 0.2]], [0.5, 0.5, 0.2, 0.2])
    labels[0]["masks"] = torch.ones(1, 5, 6, dtype=torch.bool)
    inner = 0.2 + 0.6 * fixed_points(1, 32, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_random_points", lambda n, points, device: inner[:, :points].expand(n, -1, -1))
        config = make_config(mask_num_points=10)
        _, losses = sam3_lite_loss(outputs, labels, config, mask_head(torch.zeros(1, 1, 1, 8, 8)))
    assert losses["loss_mask_focal"].item() == pytest.approx(200 * 0.25 * 0.25 * math.log(2), rel=1e-5)
    assert losses["loss_mask_dice"].item() == pytest.approx(10 * (1 - (2 * 5 + 1) / (5 + 10 + 1)), rel=1e-5)


def test_masks_are_sampled_as_grid_sample_would():
    torch.manual_seed(0)
    masks = torch.rand(3, 7, 11) < 0.5
    index = torch.tensor([2, 0, 0, 1])
    points = torch.rand(4, 50, 2)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.02, 0.98]])
    sampled = sample_masks([masks], [index], points)
    torch.testing.assert_close(sampled, sample_logits(masks[index].float(), points))
    assert sample_masks([masks.byte() * 255], [index], points).equal(sampled)


def test_masks_of_prompts_may_differ_in_size_and_are_read_at_once():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, *size, generator=generator) > 0.5 for size in ((5, 9), (8, 8), (16, 3))]
    index = [torch.tensor(rows) for rows in ([1], [0, 1, 1], [0])]
    points = torch.rand(5, 40, 2, generator=generator)
    alone = [sample_masks([masks[i]], [index[i]], points[rows]) for i, rows in enumerate([[0], [1, 2, 3], [4]])]
    assert sample_masks(masks, index, points).equal(torch.cat(alone))


def test_points_gather_where_the_mask_is_uncertain():
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 32).expand(2, 32, 32).contiguous()  # zero at x = 0.5
    points = uncertain_points(ramp, make_config(mask_num_points=100))
    assert points.shape == (2, 100, 2) and points.min() >= 0 and points.max() <= 1
    distance = (points[..., 0] - 0.5).abs()
    assert distance[:, :75].max() < 0.17  # the nearest quarter of 300 uniform points lies within about 1/8
    assert distance[:, 75:].max() > 0.3


def test_masks_are_asked_only_for_matched_queries_of_prompts_with_masks():
    outputs, labels, mask_logits = make_case(seed=3, counts=[2, 3, 0, 1], mask_size=[8, 8])
    del labels[1]["masks"]
    calls = []

    def record(prompt, query, one_to_many):
        calls.append((prompt.tolist(), one_to_many))
        return mask_head(mask_logits)(prompt, query, one_to_many)

    sam3_lite_loss(outputs, labels, make_config(), record)
    assert calls[0] == ([0, 0, 3], False)
    assert calls[1][1] is True and set(calls[1][0]) <= {0, 3} and calls[1][0] == sorted(calls[1][0])
    calls.clear()
    _, losses = sam3_lite_loss(outputs, labels, make_config(one_to_many_masks=False), record)
    assert len(calls) == 1 and "loss_mask_focal_o2m" not in losses


def test_prompts_without_masks_do_not_dilute_the_mask_terms(monkeypatch):
    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    outputs, labels, mask_logits = make_case(seed=3, counts=[2, 3], mask_size=[8, 8])
    del labels[1]["masks"]
    _, mixed = case_loss((outputs, labels, mask_logits))
    alone = select_prompts((outputs, labels, mask_logits), slice(0, 1))
    _, expected = case_loss(alone)
    for name in ("loss_mask_focal", "loss_mask_dice", "loss_mask_focal_o2m", "loss_semantic_focal"):
        torch.testing.assert_close(mixed[name], expected[name])


def test_masks_in_chunks_give_the_same_loss_and_gradient(monkeypatch):
    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    results = []
    for chunk in (64, 2):
        monkeypatch.setattr(loss_module, "MASK_CHUNK", chunk)
        outputs, labels, mask_logits = make_case(seed=4, counts=[3, 0, 5], mask_size=[12, 10])
        mask_logits.requires_grad_()
        loss, _ = case_loss((outputs, labels, mask_logits))
        loss.backward()
        results.append((loss.detach(), mask_logits.grad))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1].any()


def test_total_is_the_sum_of_the_terms_and_layers_add_up():
    case = make_case(seed=8, counts=[3, 0, 2], layers=3)
    outputs, labels, _ = case
    loss, losses = case_loss(case)
    torch.testing.assert_close(loss, sum(losses.values()))
    assert not any(value.requires_grad for value in losses.values())
    per_layer = []
    for i in range(3):
        layer = DetectionOutputs(
            outputs.logits[i : i + 1], outputs.boxes[i : i + 1], outputs.presence_logits[i : i + 1]
        )
        per_layer.append(sam3_lite_loss(layer, labels, make_config())[1])
    for name in ("loss_bbox", "loss_giou", "loss_class", "loss_presence"):
        torch.testing.assert_close(losses[name], per_layer[2][name])
        torch.testing.assert_close(losses[f"{name}_aux"], per_layer[0][name] + per_layer[1][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_and_autocast_are_computed_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    outputs, labels, mask_logits = make_case(seed=9, counts=[3, 0, 2], mask_size=[12, 10])
    half = DetectionOutputs(*(value.to(dtype) for value in vars(outputs).values()))
    rounded = DetectionOutputs(*(value.float() for value in vars(half).values()))
    leaves = require_grad(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = case_loss((half, labels, mask_logits.to(dtype)))
    expected, _ = case_loss((rounded, labels, mask_logits.to(dtype).float()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(leaf.grad.dtype == dtype and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["logits", "boxes", "one_to_many_logits", "one_to_many_boxes"])
def test_non_finite_predictions_are_named(field, value):
    outputs, labels, _ = make_case(seed=1, counts=[2, 0, 3])
    getattr(outputs, field)[-1, 2, 4] = value
    with pytest.raises(ValueError, match=rf"predicted {field.removeprefix('one_to_many_')} are not finite.*\[2\]"):
        sam3_lite_loss(outputs, labels, make_config())


def test_wrong_labels_are_named():
    outputs, labels, _ = make_case(seed=1, counts=[2, 0, 3], mask_size=[8, 8])
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        sam3_lite_loss(outputs, labels[:2], make_config())
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\] is missing"):
        sam3_lite_loss(outputs, [labels[0], {}, labels[2]], make_config())
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\] is of shape \(5,\)"):
        sam3_lite_loss(outputs, [labels[0], {"boxes": torch.zeros(5)}, labels[2]], make_config())
    with pytest.raises(ValueError, match=r"labels\[2\]\['masks'\] has shape \(2, 8, 8\); give \(3,"):
        sam3_lite_loss(outputs, [*labels[:2], {**labels[2], "masks": labels[2]["masks"][:2]}], make_config())
    labels[2]["boxes"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"labels\[i\]\['boxes'\] are not finite for i in \[2\]"):
        sam3_lite_loss(outputs, labels, make_config())


def select_prompts(case, rows):
    """The same case with some of its prompts only."""
    outputs, labels, mask_logits = case
    part = DetectionOutputs(
        *(value[rows] if name == "semantic_logits" else value[:, rows] for name, value in vars(outputs).items())
    )
    return part, labels[rows], mask_logits[:, rows]


def sharded_cases():
    """(prompts of the first of two processes, whole batch)."""
    for first, counts in ((3, [3, 0, 5, 2, 0]), (4, [3, 0, 5, 2, 0]), (1, [1, 0])):
        case = make_case(seed=11, counts=counts, mask_size=[12, 10])
        if len(counts) > 3:
            del case[1][3]["masks"]
        yield first, case


def loss_and_gradients(case):
    outputs, labels, mask_logits = case
    outputs = DetectionOutputs(*(value.detach().clone() for value in vars(outputs).values()))
    mask_logits = mask_logits.detach().clone().requires_grad_()
    require_grad(outputs)
    loss, losses = case_loss((outputs, labels, mask_logits))
    loss.backward()
    gradients = {name: leaf.grad.transpose(0, 1) for name, leaf in vars(outputs).items()}  # prompts first
    gradients |= {"semantic_logits": outputs.semantic_logits.grad, "mask_logits": mask_logits.grad.transpose(0, 1)}
    return {"loss": loss.item(), "losses": losses, "gradients": gradients}


def run_shards(folder, rank):
    """One of two processes: its share of the prompts, for each way to split them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss_module._random_points = fixed_points
    results = []
    for first, case in sharded_cases():
        rows = slice(0, first) if rank == 0 else slice(first, None)
        results.append(loss_and_gradients(select_prompts(case, rows)))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # who leaves while another still talks can take it down
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_the_whole_batch(tmp_path, monkeypatch):
    code = "import os, sys, test_loss; test_loss.run_shards(sys.argv[1], int(os.environ['RANK']))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = warm.run_two(["-c", code, tmp_path], Path(__file__).parent, environment)
    assert finished.returncode == 0, finished.stderr
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    monkeypatch.setattr(loss_module, "_random_points", fixed_points)
    for first, second, (_, case) in zip(*shards, sharded_cases(), strict=True):
        whole = loss_and_gradients(case)
        assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"], rel=1e-6)
        for name, value in whole["losses"].items():
            torch.testing.assert_close((first["losses"][name] + second["losses"][name]) / 2, value)
        for name, gradient in whole["gradients"].items():
            halves = torch.cat([first["gradients"][name], second["gradients"][name]]) / 2
            torch.testing.assert_close(halves, gradient)
