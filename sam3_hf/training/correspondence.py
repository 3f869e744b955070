"""Which layer and which query of its teacher each layer and query of a student follows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..loss_sam3_lite import box_overlaps

COPIED = 0.9  # share of the queries that are nearest to the teacher's of the same number, if they come from it
COSTS = {"score": 2.0, "box": 5.0, "giou": 2.0}  # as the loss on labels matches queries to objects
LEAST_TRUST = 1e-3  # of a query in the matching: those that nothing is said of come last, but come
SILENT = -20.0  # logit that a query follows which has no partner


class Target(NamedTuple):
    """What the queries of the student follow, in their order."""

    logits: Tensor  # (layers, prompts, queries)
    boxes: Tensor  # (layers, prompts, queries, 4)
    trust: Tensor  # (prompts, queries)
    presence_logits: Tensor  # (layers, prompts)


def layer_map(student: int, teacher: int, chosen: list[int] | None = None) -> list[int]:
    """
    The teacher's decoder layer for each of the student's; the last one follows the last.

    Args:
        student, teacher: numbers of layers.
        chosen: the layers that the student's come from, if that is known. Otherwise they are spread evenly.
    """
    if chosen is not None and len(chosen) == student and max(chosen) < teacher:
        return [*chosen[:-1], teacher - 1]
    between = max(student - 1, 1)
    return [*(round(i * (teacher - 1) / between) for i in range(student - 1)), teacher - 1]


@torch.no_grad()
def same_queries(student, teacher) -> bool:
    """
    Whether the queries of one decoder are those of the other, number by number, as after a mapping: equally many, and
    nearly each more alike to its namesake than to any other.
    """
    own, other = (
        F.normalize(torch.cat([model.query_embed.weight, model.reference_points.weight], 1).float().cpu(), dim=1)
        for model in (student, teacher)
    )
    if own.shape != other.shape:
        return False
    nearest = (own @ other.T).argmax(1)
    return (nearest == torch.arange(len(own))).float().mean().item() >= COPIED


@torch.no_grad()
def match_queries(logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
    """
    One-to-one partners by the Hungarian method on the last layer, for all layers: what a query follows does not change
    on its way. A teacher with more queries than the student is followed in its most trusted ones.

    Args:
        logits, boxes: the student's, `(layers, prompts, queries)` and `(layers, prompts, queries, 4)` cxcywh.
        target: the teacher's, in the teacher's order.

    Returns:
        `(prompts, queries of the student)` int64 on the device of the logits: the teacher's query, or -1.

    Raises:
        ValueError: a prediction is not finite.
    """
    own, goal, trust = boxes[-1].float()[:, :, None], target.boxes[-1].float()[:, None], target.trust[:, None]
    _, giou = box_overlaps(own, goal)  # (prompts, queries, teacher's queries)
    apart = (logits[-1].float().sigmoid()[:, :, None] - target.logits[-1].float().sigmoid()[:, None]).abs()
    cost = COSTS["score"] * apart + COSTS["box"] * (own - goal).abs().sum(-1) - COSTS["giou"] * giou
    cost = (cost * (trust + LEAST_TRUST)).cpu().numpy()
    if not np.isfinite(cost).all():
        raise ValueError("predicted scores or boxes are not finite, so queries cannot be matched to the teacher's")
    partners = np.full(cost.shape[:2], -1)
    best = target.trust.argsort(dim=1, descending=True, stable=True)[:, : cost.shape[1]].cpu().numpy()
    for prompt, candidates in enumerate(best):
        rows, columns = linear_sum_assignment(cost[prompt][:, candidates])
        partners[prompt, rows] = candidates[columns]
    return torch.from_numpy(partners).to(logits.device)


def in_order(target: Target, partners: Tensor) -> Target:
    """The target for each query of the student; what has no partner shall be silent, and its box is free."""
    alone, index = partners < 0, partners.clamp(min=0)
    layers = len(target.logits)
    logits = target.logits.gather(2, index.expand(layers, -1, -1)).masked_fill(alone, SILENT)
    boxes = target.boxes.gather(2, index[..., None].expand(layers, -1, -1, 4))
    trust = target.trust.gather(1, index).masked_fill(alone, 0.0)
    return Target(logits, boxes, trust, target.presence_logits)


def partners_of(partners: Tensor, prompts: Tensor, queries: Tensor) -> Tensor:
    """
    The student's queries, -1 where there is none, of the teacher's.

    Args:
        partners: of `match_queries`.
        prompts, queries: `(matches,)` int64 on the CPU, of the teacher.
    """
    same = partners.cpu()[prompts] == queries[:, None]  # (matches, queries of the student)
    return torch.where(same.any(1), same.int().argmax(1), -1)
