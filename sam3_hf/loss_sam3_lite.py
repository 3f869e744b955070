"""Training losses of SAM 3 Lite: matching of queries to objects, and every term of the objective.

One prompt is one (image, noun phrase) pair; its objects are all instances of that phrase in that image. Formulas and
default weights are those of SAM 3's fine-tuning recipe (Carion et al., "SAM 3: Segment Anything with Concepts", 2025;
facebookresearch/sam3, `sam3/train/configs/roboflow_v100/roboflow_v100_full_ft_100_images.yaml`):

- every decoder layer is matched and supervised on its own with L1, generalised IoU, IoU-aware classification and
  presence; the one-to-many copy of the queries (DAC-DETR, Hu et al., 2023) with the first three of these;
- the last layer also gets mask losses at sampled points (PointRend, Kirillov et al., 2020) for matched queries, and a
  semantic loss on the union of the prompt's masks.

All sums are divided by counts of the whole batch: under `torch.distributed` the mean over processes of the loss (and
of its gradient) is that of the whole batch, however prompts and objects are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:
    linear_sum_assignment = None


# Smallest area by which an overlap is divided: a tenth of one pixel of a 1008 pixel image, so that only boxes without
# area ever meet it.
MIN_AREA = 1e-7
# Lowest classification target of a matched query (IABCE of SAM 3): a poor match is still a positive.
MIN_QUALITY = 0.01
# The classification loss is a mean over at least this many queries per prompt (`pad_n_queries` of the recipe), so that
# its scale does not grow as a model's queries become fewer.
CLASS_QUERIES = 200
# Masks whose points are drawn and scored together; bounds the memory of the mask losses.
MASK_CHUNK = 64
# Prompts whose semantic losses are computed together: each needs some 40 MB meanwhile at 1008 x 1008.
SEMANTIC_CHUNK = 4


@dataclass
class DetectionOutputs:
    """Predictions of all decoder layers, the last layer last. Any float dtype; the losses are computed in float32.

    Attributes:
        logits: (layers, prompts, queries) score logits, before the presence factor.
        boxes: (layers, prompts, queries, 4) cxcywh in [0, 1] of the model's square input.
        presence_logits: (layers, prompts).
        one_to_many_logits: (layers, prompts, queries) of the one-to-many copy of the queries, or None.
        one_to_many_boxes: (layers, prompts, queries, 4) of that copy, or None.
        semantic_logits: (prompts, 1, height, width) of the last layer, or None.
    """

    logits: Tensor
    boxes: Tensor
    presence_logits: Tensor
    one_to_many_logits: Tensor | None = None
    one_to_many_boxes: Tensor | None = None
    semantic_logits: Tensor | None = None


class Match(NamedTuple):
    """Matched triples of one set of queries, sorted by prompt; objects are numbered through the batch."""

    prompt: np.ndarray  # (matches,) int64
    query: np.ndarray  # (matches,) int64
    object: np.ndarray  # (matches,) int64


class PackedTargets(NamedTuple):
    """Objects of all prompts of a batch, end to end."""

    boxes: Tensor  # (objects, 4) float32 cxcywh
    prompt: Tensor  # (objects,) int64
    counts: np.ndarray  # (prompts,) objects of each prompt
    first: np.ndarray  # (prompts,) index of each prompt's first object
    masks: list[Tensor | None]  # per prompt (objects of the prompt, height, width)
    present: Tensor  # (prompts,) float32: 1 where the prompt has an object of positive width and height


class Normalizers(NamedTuple):
    """What sums are divided by: counts over all processes, at least 1, divided by the number of processes."""

    objects: Tensor
    prompts: Tensor
    masked_objects: Tensor
    semantic_prompts: Tensor


def sam3_lite_loss(
    outputs: DetectionOutputs,
    labels: list[dict[str, Tensor]],
    config: Any,
    mask_logits_fn: Callable[[Tensor, Tensor, bool], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch of prompts and its weighted terms.

    With `torch.distributed` initialised this is a collective call (one all-reduce of four counts): every process must
    make it, prompts or not.

    Args:
        outputs: predictions of every decoder layer.
        labels: one dict per prompt: `boxes` (n, 4) cxcywh in [0, 1], n >= 0, and optionally `masks` (n, H, W), bool or
            integer (nonzero is object), at any resolution. Prompts without `masks` take no part in the mask terms.
        config: loss configuration (`Sam3LiteLossConfig`).
        mask_logits_fn: `(prompt_index (m,), query_index (m,), one_to_many)` -> (m, h, w) last-layer mask logits of
            those queries; indices int64 on the CPU, sorted by prompt, m possibly 0. Called in the caller's autocast
            state, once for the matched queries and, with `config.one_to_many_masks`, once for those of the one-to-many
            copy. None leaves the mask terms out.

    Returns:
        The scalar float32 loss, connected to every output it was given (with zero gradient where nothing supervises
        it), and a dict of detached scalars that sum to it, each already multiplied by its weight: `loss_bbox`,
        `loss_giou`, `loss_class`, `loss_presence` of the last layer; the same names with `_aux` summed over the layers
        before it; with `_o2m` and `_o2m_aux` for the one-to-many queries; `loss_mask_focal`, `loss_mask_dice` (also
        `_o2m`); `loss_semantic_focal`, `loss_semantic_dice`.

    Raises:
        ValueError: labels that do not fit the outputs, or predictions or boxes that are not finite.
        ImportError: scipy is missing.
    """
    num_layers, num_prompts, num_queries = outputs.logits.shape
    device = outputs.logits.device
    targets = pack_labels(labels, num_prompts, device)
    with torch.autocast(device.type, enabled=False):
        logits, boxes = outputs.logits.float(), outputs.boxes.float()
        one_to_many = outputs.one_to_many_logits is not None
        if one_to_many:
            logits = torch.cat([logits, outputs.one_to_many_logits.float()])  # (sets, prompts, queries)
            boxes = torch.cat([boxes, outputs.one_to_many_boxes.float()])  # (sets, prompts, queries, 4)
        matches = match_queries(logits, boxes, targets, config, one_to_many)
        semantic_targets, semantic_valid = union_masks(targets, device)
        norms = global_normalizers(targets, semantic_valid)

        losses = _detection_terms(logits, boxes, targets, matches, norms, config, num_layers)
        presence = _presence_terms(outputs.presence_logits.float(), targets.present, norms)
        losses["loss_presence"] = config.presence_loss_weight * presence[-1]
        if num_layers > 1:
            losses["loss_presence_aux"] = config.presence_loss_weight * presence[:-1].sum()
        if outputs.semantic_logits is not None:
            losses |= _semantic_terms(outputs.semantic_logits, semantic_targets, semantic_valid, norms, config)

    if mask_logits_fn is not None:
        losses |= _mask_terms(matches[num_layers - 1], targets, norms, config, mask_logits_fn, one_to_many=False)
        if one_to_many and config.one_to_many_masks:
            losses |= _mask_terms(matches[-1], targets, norms, config, mask_logits_fn, one_to_many=True)
    loss = torch.stack(list(losses.values())).sum()
    return loss, {name: value.detach() for name, value in losses.items()}


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    # Blocking copies to a GPU wait for everything queued before them.
    return torch.from_numpy(array).to(device, non_blocking=True)


def pack_labels(labels: list[dict[str, Tensor]], num_prompts: int, device: torch.device) -> PackedTargets:
    """Checks the labels of a batch and lays their objects end to end on `device`.

    Raises:
        ValueError: wrong number of labels, or `boxes` / `masks` missing or of the wrong shape.
    """
    if len(labels) != num_prompts:
        raise ValueError(f"labels has {len(labels)} entries for {num_prompts} prompts; give one dict per prompt")
    masks: list[Tensor | None] = []
    for i, label in enumerate(labels):
        boxes = label.get("boxes")
        if boxes is None or boxes.ndim != 2 or boxes.shape[1] != 4:
            found = "missing" if boxes is None else f"of shape {tuple(boxes.shape)}"
            raise ValueError(f"labels[{i}]['boxes'] is {found}; give (objects, 4), (0, 4) for an absent concept")
        mask = label.get("masks")
        if mask is not None and (mask.ndim != 3 or len(mask) != len(boxes)):
            raise ValueError(
                f"labels[{i}]['masks'] has shape {tuple(mask.shape)}; give ({len(boxes)}, height, width), one per box"
            )
        masks.append(None if mask is None else mask.to(device))
    counts = np.array([len(label["boxes"]) for label in labels], dtype=np.int64)
    prompt = _on_device(np.repeat(np.arange(num_prompts), counts), device)
    boxes = torch.cat([torch.zeros(0, 4, device=device)] + [label["boxes"].to(device).float() for label in labels])
    visible = (boxes[:, 2:] > 0).all(-1).float()
    present = boxes.new_zeros(num_prompts).index_add(0, prompt, visible).clamp(max=1)
    return PackedTargets(boxes, prompt, counts, np.cumsum(counts) - counts, masks, present)


def global_normalizers(targets: PackedTargets, semantic_valid: Tensor) -> Normalizers:
    """Counts of objects, prompts, objects with masks and prompts with a semantic target, summed over all processes.

    Each is raised to at least 1 before it is divided by the number of processes, so that the mean over processes of
    `sum / count` is the whole batch's.
    """
    masked = sum(int(count) for count, mask in zip(targets.counts, targets.masks, strict=True) if mask is not None)
    known = np.array([len(targets.boxes), len(targets.counts), masked], dtype=np.float32)
    counts = torch.cat([_on_device(known, semantic_valid.device), semantic_valid.sum()[None]])
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
        processes = torch.distributed.get_world_size()
    return Normalizers(*(counts.clamp(min=1) / processes).unbind())


def box_overlaps(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., 2019) of paired boxes; finite for boxes without area.

    Args:
        boxes1, boxes2: (..., 4) cxcywh, broadcast against each other.

    Returns:
        Two tensors (...): IoU in [0, 1] and gIoU in [-1, 1].
    """
    size1, size2 = boxes1[..., 2:], boxes2[..., 2:]
    low1, low2 = boxes1[..., :2] - 0.5 * size1, boxes2[..., :2] - 0.5 * size2
    high1, high2 = boxes1[..., :2] + 0.5 * size1, boxes2[..., :2] + 0.5 * size2
    area1, area2 = (high1 - low1).prod(-1), (high2 - low2).prod(-1)
    shared = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high1, high2) - torch.minimum(low1, low2)).clamp(min=0).prod(-1)
    union = area1 + area2 - shared
    iou = shared / union.clamp(min=MIN_AREA)
    return iou, iou - (hull - union) / hull.clamp(min=MIN_AREA)


@torch.no_grad()
def match_queries(
    logits: Tensor, boxes: Tensor, targets: PackedTargets, config: Any, one_to_many: bool
) -> list[Match]:
    """Matches each set of queries to the objects of its prompt.

    A set is one layer's queries: first the layers of the queries proper, then, with `one_to_many`, those of the copy.
    All sets are matched one to one by the Hungarian method at the least sum of `cost_class * focal + cost_bbox * L1 -
    cost_giou * gIoU`, except the last set of the copy (`one_to_many_matches`). Where a prompt has more objects than
    queries, every query is matched and objects are left over. Costs reach the CPU in one transfer.

    Args:
        logits: (sets, prompts, queries) float32.
        boxes: (sets, prompts, queries, 4) float32 cxcywh.
        targets: the batch's objects.
        config: loss configuration.
        one_to_many: whether the second half of the sets is the one-to-many copy.

    Raises:
        ValueError: predictions or target boxes that are not finite.
        ImportError: scipy is missing.
    """
    num_sets = logits.shape[0]
    if not len(targets.boxes):
        return [Match(*np.zeros((3, 0), dtype=np.int64))] * num_sets
    if linear_sum_assignment is None:
        raise ImportError("The training loss matches queries to objects with scipy: pip install scipy")

    prob = logits.sigmoid()
    focal = config.cost_focal_alpha * (1 - prob) ** config.cost_focal_gamma * -F.logsigmoid(logits)
    focal += (1 - config.cost_focal_alpha) * prob**config.cost_focal_gamma * F.logsigmoid(-logits)
    candidates, wanted = (
        boxes[:, targets.prompt],
        targets.boxes[:, None],
    )  # (sets, objects, queries, 4), (objects, 1, 4)
    iou, giou = box_overlaps(candidates, wanted)  # (sets, objects, queries)
    cost = config.cost_bbox * (candidates - wanted).abs().sum(-1) - config.cost_giou * giou
    cost += config.cost_class * focal[:, targets.prompt]
    chosen = one_to_many_matches(prob[-1, targets.prompt], iou[-1], config) if one_to_many else cost.new_zeros(0)
    on_cpu = torch.cat([cost.flatten(), chosen.flatten().float()]).cpu().numpy()
    cost_on_cpu = on_cpu[: cost.numel()].reshape(cost.shape)
    if not np.isfinite(cost_on_cpu).all():
        _raise_non_finite(logits, boxes, targets)

    num_hungarian = num_sets - 1 if one_to_many else num_sets
    matches = [_hungarian(cost_on_cpu[i], targets) for i in range(num_hungarian)]
    if one_to_many:
        objects, queries = np.nonzero(on_cpu[cost.numel() :].reshape(chosen.shape))
        prompts = np.repeat(np.arange(len(targets.counts)), targets.counts)
        matches.append(Match(prompts[objects], queries, objects))
    return matches


def one_to_many_matches(prob: Tensor, iou: Tensor, config: Any) -> Tensor:
    """The several queries that each object takes in the one-to-many copy (DAC-DETR's greedy assignment).

    Quality is `one_to_many_alpha * prob + (1 - one_to_many_alpha) * IoU`; an object takes the queries of its
    `one_to_many_topk` highest qualities (queries tied with the first one left out are left out too) that also exceed
    `one_to_many_threshold`. A query may serve several objects, and an object may find none.

    Args:
        prob: (objects, queries) scores in [0, 1] of the queries of each object's prompt.
        iou: (objects, queries) in [0, 1].

    Returns:
        (objects, queries) bool.
    """
    quality = config.one_to_many_alpha * prob + (1 - config.one_to_many_alpha) * iou
    matched = quality > config.one_to_many_threshold
    if config.one_to_many_topk < quality.shape[1]:
        matched &= quality > quality.topk(config.one_to_many_topk + 1, dim=1).values[:, -1:]
    return matched


def _hungarian(cost: np.ndarray, targets: PackedTargets) -> Match:
    """One-to-one assignment within each prompt; cost (objects, queries)."""
    prompts, queries, objects = [], [], []
    for prompt in np.flatnonzero(targets.counts):
        first = targets.first[prompt]
        rows, columns = linear_sum_assignment(cost[first : first + targets.counts[prompt]])
        prompts.append(np.full(len(rows), prompt))
        queries.append(columns)
        objects.append(rows + first)
    return Match(np.concatenate(prompts), np.concatenate(queries), np.concatenate(objects))


def _raise_non_finite(logits: Tensor, boxes: Tensor, targets: PackedTargets) -> None:
    bad_objects = (~targets.boxes.isfinite()).any(-1)
    if bad_objects.any():
        prompts = targets.prompt[bad_objects].unique().tolist()
        raise ValueError(f"labels[i]['boxes'] are not finite for i in {prompts}; check the annotations")
    bad_logits = (~logits.isfinite()).any(-1)  # (sets, prompts)
    bad_boxes = (~boxes.isfinite()).flatten(2).any(-1)
    names = [name for name, bad in (("logits", bad_logits), ("boxes", bad_boxes)) if bad.any()]
    prompts = (bad_logits | bad_boxes).any(0).nonzero().flatten().tolist()
    raise ValueError(
        f"predicted {' and '.join(names) or 'values'} are not finite for prompts {prompts}, so queries cannot be "
        "matched; the model has diverged or overflowed: lower the learning rate, or train in bf16 or float32"
    )


def _detection_terms(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    matches: list[Match],
    norms: Normalizers,
    config: Any,
    num_layers: int,
) -> dict[str, Tensor]:
    """Weighted L1, gIoU and classification terms of all sets (sets, prompts, queries), under their names."""
    sizes = [len(match.query) for match in matches]
    set_index = np.repeat(np.arange(len(matches)), sizes)
    columns = [set_index] + [np.concatenate(column) for column in zip(*matches, strict=True)]
    index, prompt, query, target = _on_device(np.stack(columns), logits.device)  # (matches of all sets,) each
    predicted, wanted = boxes[index, prompt, query], targets.boxes[target]  # (matches of all sets, 4)
    iou, giou = box_overlaps(predicted, wanted)

    def per_set(values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values.split(sizes)]) / norms.objects

    flat = (index * logits.shape[1] + prompt) * logits.shape[2] + query
    terms = {
        "loss_bbox": config.bbox_loss_weight * per_set((predicted - wanted).abs().sum(-1)),
        "loss_giou": config.giou_loss_weight * per_set(1 - giou),
        "loss_class": config.class_loss_weight
        * _class_terms(logits, flat, iou.detach(), targets.present, norms, config),
    }
    losses = {}
    for name, values in terms.items():  # (sets,)
        losses[name] = values[num_layers - 1]
        if num_layers > 1:
            losses[f"{name}_aux"] = values[: num_layers - 1].sum()
        if len(values) > num_layers:
            losses[f"{name}_o2m"] = config.one_to_many_weight * values[-1]
            if num_layers > 1:
                losses[f"{name}_o2m_aux"] = config.one_to_many_weight * values[num_layers:-1].sum()
    return losses


def _class_terms(
    logits: Tensor, flat: Tensor, iou: Tensor, present: Tensor, norms: Normalizers, config: Any
) -> Tensor:
    """IoU-aware binary cross-entropy of each set, gated by presence (IABCE of SAM 3).

    A matched query is drawn towards `max(prob**alpha * IoU**(1 - alpha), MIN_QUALITY)` with weight `class_pos_weight`,
    any other towards 0 with weight `prob**gamma`. Prompts whose concept is absent count nothing: there the presence
    logit alone learns. The mean runs over all prompts and at least `CLASS_QUERIES` queries.

    A one-to-many query that serves several objects takes the best of their targets. SAM 3's code writes the targets by
    index, so that there the last object wins, and on a GPU any of them: its value depends on the order of the objects,
    and was up to 18% above this one on the cases of `tests/test_loss.py`.

    Args:
        logits: (sets, prompts, queries). flat: (matches,) positions of matched queries in the flattened logits.
        iou: (matches,) without gradient. present: (prompts,) 0 or 1.

    Returns:
        (sets,).
    """
    prob = logits.sigmoid()
    quality = prob.detach().flatten()[flat] ** config.class_alpha * iou ** (1 - config.class_alpha)
    quality = quality.clamp(min=MIN_QUALITY)
    goal = torch.zeros_like(prob).flatten().scatter_reduce(0, flat, quality, "amax").view_as(prob)
    weight = torch.where(goal > 0, config.class_pos_weight, prob**config.class_gamma)
    loss = weight * F.binary_cross_entropy_with_logits(logits, goal, reduction="none") * present[:, None]
    return loss.sum((1, 2)) / (norms.prompts * max(logits.shape[2], CLASS_QUERIES))


def _presence_terms(presence_logits: Tensor, present: Tensor, norms: Normalizers) -> Tensor:
    """Half the binary cross-entropy of (layers, prompts) logits, per layer: focal loss with alpha 0.5, gamma 0."""
    goal = present.expand_as(presence_logits)
    loss = F.binary_cross_entropy_with_logits(presence_logits, goal, reduction="none")
    return 0.5 * loss.sum(1) / norms.prompts  # (layers,)


def focal_loss(logits: Tensor, goal: Tensor, alpha: float, gamma: float) -> Tensor:
    """
    Mean over the last dimension of the sigmoid focal loss (Lin et al., 2017); `goal` is in [0, 1].

    It is that of `torchvision.ops.sigmoid_focal_loss` up to float32 rounding, but keeps one tensor of the size of the
    logits less for the backward pass.
    """
    prob = logits.sigmoid()
    miss = prob + goal - 2 * prob * goal
    balance = (1 - alpha) + (2 * alpha - 1) * goal
    return (balance * miss**gamma * F.binary_cross_entropy_with_logits(logits, goal, reduction="none")).mean(-1)


def dice_loss(logits: Tensor, goal: Tensor) -> Tensor:
    """One minus the Dice coefficient over the last dimension, with one added above and below; `goal` is in [0, 1]."""
    prob = logits.sigmoid()
    return 1 - (2 * (prob * goal).sum(-1) + 1) / (prob.sum(-1) + goal.sum(-1) + 1)


def union_masks(targets: PackedTargets, device: torch.device) -> tuple[dict[int, Tensor], Tensor]:
    """Semantic target of every prompt that has objects with masks: the union of these masks.

    Returns:
        {prompt: (height, width) bool}, and (prompts of the dict,) float32: 1 where the union has any pixel.
    """
    unions = {i: mask.ne(0).any(0) for i, mask in enumerate(targets.masks) if mask is not None and len(mask)}
    valid = [union.any().float() for union in unions.values()]
    return unions, torch.stack(valid) if valid else torch.zeros(0, device=device)


def _semantic_terms(
    semantic_logits: Tensor, unions: dict[int, Tensor], valid: Tensor, norms: Normalizers, config: Any
) -> dict[str, Tensor]:
    """Weighted focal and Dice over all pixels of the targets' resolution, mean over the prompts with a target.

    Absent concepts count nothing here, as in SAM 3: their presence is the decoder's presence logit to learn.
    """
    rows = semantic_logits[:, 0].unbind()
    totals = semantic_logits[:0].float().sum().expand(2)  # keeps the head in the graph when no prompt has masks
    chunks = [list(same) for _, same in groupby(unions.items(), key=lambda item: item[1].shape)]
    chunks = [same[i : i + SEMANTIC_CHUNK] for same in chunks for i in range(0, len(same), SEMANTIC_CHUNK)]
    for chunk, are_valid in zip(chunks, valid.split([len(chunk) for chunk in chunks]), strict=True):
        logits = torch.stack([rows[prompt] for prompt, _ in chunk])
        goals = torch.stack([union for _, union in chunk])
        # Recomputed in the backward pass: full-resolution intermediates of a few prompts at a time.
        pair = checkpoint(_semantic_pair, logits, goals, config, use_reentrant=False, preserve_rng_state=False)
        totals = totals + pair @ are_valid
    focal, dice = totals / norms.semantic_prompts
    return {
        "loss_semantic_focal": config.semantic_focal_loss_weight * focal,
        "loss_semantic_dice": config.semantic_dice_loss_weight * dice,
    }


def _semantic_pair(logits: Tensor, unions: Tensor, config: Any) -> Tensor:
    """(2, prompts): focal and Dice of (prompts, h, w) logits, brought to the (prompts, H, W) of their targets."""
    size = unions.shape[-2:]
    logits = F.interpolate(logits.float()[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    goal = unions.flatten(1).float()
    focal = focal_loss(logits, goal, config.semantic_focal_alpha, config.semantic_focal_gamma)
    return torch.stack([focal, dice_loss(logits, goal)])


def _mask_terms(
    match: Match,
    targets: PackedTargets,
    norms: Normalizers,
    config: Any,
    mask_logits_fn: Callable[[Tensor, Tensor, bool], Tensor],
    one_to_many: bool,
) -> dict[str, Tensor]:
    """Weighted mask focal and Dice of the matched queries of prompts with masks, per object with a mask."""
    has_masks = np.array([mask is not None for mask in targets.masks], dtype=bool)
    match = Match(*(column[has_masks[match.prompt]] for column in match))
    prompt, query = torch.from_numpy(np.stack([match.prompt, match.query]))
    logits = mask_logits_fn(prompt, query, one_to_many)  # (matches, height, width)
    with torch.autocast(logits.device.type, enabled=False):
        totals = logits[:0].float().sum().expand(2)  # keeps the head in the graph when nothing is matched
        for i, rows in enumerate(logits.split(MASK_CHUNK) if len(logits) else ()):
            part = Match(*(column[i * MASK_CHUNK : (i + 1) * MASK_CHUNK] for column in match))
            points = uncertain_points(rows.detach().float(), config)
            goal = _sample_targets(part, targets, points)
            # Recomputed in the backward pass: what the points need is larger than the logits themselves.
            totals = totals + checkpoint(
                _mask_pair, rows, points, goal, config, use_reentrant=False, preserve_rng_state=False
            )
        focal, dice = totals / norms.masked_objects
    weight, suffix = (config.one_to_many_weight, "_o2m") if one_to_many else (1.0, "")
    return {
        f"loss_mask_focal{suffix}": weight * config.mask_focal_loss_weight * focal,
        f"loss_mask_dice{suffix}": weight * config.mask_dice_loss_weight * dice,
    }


def _mask_pair(logits: Tensor, points: Tensor, goal: Tensor, config: Any) -> Tensor:
    """(focal, Dice) summed over masks, of (masks, h, w) logits at (masks, points, 2) against (masks, points)."""
    sampled = sample_logits(logits.float(), points)
    focal = focal_loss(sampled, goal, config.mask_focal_alpha, config.mask_focal_gamma)
    return torch.stack([focal.sum(), dice_loss(sampled, goal).sum()])


@torch.no_grad()
def uncertain_points(logits: Tensor, config: Any) -> Tensor:
    """Points at which masks are compared, mostly where the prediction is uncertain (PointRend).

    Of `mask_num_points * mask_oversample_ratio` uniform points, the `mask_num_points * mask_importance_sample_ratio`
    whose logit is nearest to 0 are kept; uniform points make up the rest.

    Args:
        logits: (masks, height, width) float32.

    Returns:
        (masks, mask_num_points, 2) xy in [0, 1].
    """
    num_kept = int(config.mask_num_points * config.mask_importance_sample_ratio)
    candidates = _random_points(len(logits), int(config.mask_num_points * config.mask_oversample_ratio), logits.device)
    order = sample_logits(logits, candidates).abs().topk(num_kept, dim=1, largest=False, sorted=False).indices
    kept = candidates.gather(1, order[..., None].expand(-1, -1, 2))
    return torch.cat([kept, _random_points(len(logits), config.mask_num_points - num_kept, logits.device)], dim=1)


def _random_points(num_masks: int, num_points: int, device: torch.device) -> Tensor:
    return torch.rand(num_masks, num_points, 2, device=device)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (masks, height, width) at (masks, points, 2) xy in [0, 1]; zero beyond the border pixels.

    Returns:
        (masks, points).
    """
    return F.grid_sample(logits[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def _sample_targets(match: Match, targets: PackedTargets, points: Tensor) -> Tensor:
    """Ground truth of each matched mask at its (masks, points, 2) points: (masks, points) float32 in [0, 1]."""
    prompts, counts = np.unique(match.prompt, return_counts=True)
    objects = _on_device(match.object - targets.first[match.prompt], points.device)
    return sample_masks([targets.masks[prompt] for prompt in prompts], objects.split(counts.tolist()), points)


def sample_masks(masks: list[Tensor], index: Sequence[Tensor], points: Tensor) -> Tensor:
    """`sample_logits` for binary masks: reads four pixels per point, without a float copy of the masks.

    Args:
        masks: of each prompt, (objects, height, width) bool or integer, nonzero is object.
        index: of each prompt, (its share of m,) int64 rows of its `masks`.
        points: (m, points, 2) xy in [0, 1], prompt after prompt.

    Returns:
        (m, points) float32 in [0, 1].
    """
    counts = [len(rows) for rows in index]
    sizes = np.repeat([mask.shape[-2:] for mask in masks], counts, axis=0)
    height, width = _on_device(sizes, points.device).T[:, :, None]  # (m, 1) each
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    part_x, part_y = x - left, y - top
    x, y = torch.stack([left, left + 1, left, left + 1]), torch.stack([top, top, top + 1, top + 1])
    share_x, share_y = torch.stack([1 - part_x, part_x]), torch.stack([1 - part_y, part_y])
    share = share_x.repeat(2, 1, 1) * share_y.repeat_interleave(2, 0)  # (4, m, points), as x and y
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.clamp(min=0).minimum(width - 1).long(), y.clamp(min=0).minimum(height - 1).long()
    corners = zip(masks, index, y.split(counts, dim=1), x.split(counts, dim=1), strict=True)
    pixels = torch.cat([mask[rows[:, None], y, x] for mask, rows, y, x in corners], dim=1)  # (4, m, points)
    return (share * (pixels.ne(0) & inside)).sum(0)
