"""
What sets a student apart from its teacher, one function per term.

All compute in float32 (or float64, if that is what they are given) and are least where both are equal: 0. A
distribution's own entropy is subtracted, which changes no gradient. They return one value per image, prompt or mask,
for the caller to add up and divide, so that a batch may be spread over processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss_sam3_lite import box_overlaps, sample_logits
from ..recomputation_sam3_lite import recomputed

SMALLEST_VARIANCE = 1e-6  # by which a squared error is divided


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def feature_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """
    Squared error over the teacher's variance in the image, plus one minus the cosine over channels.

    Args:
        student, teacher: a level of the pyramid, `(images, channels, height, width)`.

    Returns:
        `(images,)`.
    """

    def errors(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _full(student), _full(teacher)
        cosine = F.cosine_similarity(student, teacher, dim=1).flatten(1).mean(1)
        return relative_errors(student, teacher) + 1 - cosine

    return recomputed(errors, student, teacher)  # float32 copies of the finest level are large


def relative_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's variance, one value for each entry of the first dimension."""
    student, teacher = _full(student).flatten(1), _full(teacher).flatten(1)
    variance = teacher.var(1, correction=0).clamp(min=SMALLEST_VARIANCE)
    return (student - teacher).square().mean(1) / variance


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """
    Binary cross-entropy of logits to the teacher's probabilities, less the entropy of these; element by element. Both
    logits are divided by the temperature, and the result multiplied by its square, which keeps the gradient's scale.
    """
    student, teacher = _full(student) / temperature, _full(teacher) / temperature
    goal = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, goal, reduction="none")
    cross = F.binary_cross_entropy_with_logits(student, goal, reduction="none")
    return (cross - entropy) * temperature**2


def score_errors(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """
    Args:
        student, teacher: logits `(layers, prompts, queries)`.

    Returns:
        `(prompts,)`: divergences summed over queries, mean over layers.
    """
    return divergence(student, teacher, temperature).sum(2).mean(0)


def presence_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergences of logits `(layers, prompts)`, mean over layers: `(prompts,)`."""
    return divergence(student, teacher).mean(0)


def box_errors(student: Tensor, teacher: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        student, teacher: boxes `(layers, prompts, queries, 4)` cxcywh in [0, 1].
        trust: `(prompts, queries)`, the weight of each query's box.

    Returns:
        L1 distances and one minus the generalised IoUs, each weighted, summed over queries, mean over layers:
        `(prompts,)`.
    """
    student, teacher, trust = _full(student), _full(teacher), _full(trust)
    _, giou = box_overlaps(student, teacher)
    distances = (student - teacher).abs().sum(-1)
    return (distances * trust).sum(2).mean(0), ((1 - giou) * trust).sum(2).mean(0)


def query_errors(student: Tensor, teacher: Tensor, trust: Tensor) -> Tensor:
    """
    Args:
        student, teacher: queries behind decoder layers, `(layers, prompts, queries, hidden)`.
        trust: `(prompts, queries)`, the weight of each query.

    Returns:
        Squared errors over the variance of the teacher's query, weighted, summed over queries, mean over layers:
        `(prompts,)`.
    """
    shape = student.shape[:-1]
    errors = relative_errors(student.flatten(0, 2), teacher.flatten(0, 2)).reshape(shape)
    return (errors * _full(trust)).sum(2).mean(0)


def mask_errors(student: Tensor, teacher: Tensor, points: Tensor) -> Tensor:
    """
    Divergence, and a Dice loss between soft masks, at sampled points.

    Args:
        student, teacher: mask logits `(masks, height, width)`.
        points: `(masks, points, 2)` xy in [0, 1].

    Returns:
        `(masks,)`.
    """
    student, teacher = (sample_logits(_full(logits), points) for logits in (student, teacher))
    return divergence(student, teacher).mean(1) + soft_dice(student, teacher)


def soft_dice(student: Tensor, teacher: Tensor) -> Tensor:
    """
    One minus the Dice coefficient of probabilities over the last dimension, with squares below, by which it is least
    where both are equal also between 0 and 1.
    """
    own, goal = student.sigmoid(), teacher.sigmoid()
    return 1 - (2 * (own * goal).sum(-1) + 1) / (own.square().sum(-1) + goal.square().sum(-1) + 1)


@torch.no_grad()
def disagreeing_points(student: Tensor, teacher: Tensor, config) -> Tensor:
    """
    Points at which masks are compared: of `mask_num_points * mask_oversample_ratio` uniform ones, those
    `mask_num_points * mask_importance_sample_ratio` at which the probabilities differ most; uniform ones make up the
    rest.

    Args:
        student, teacher: mask logits `(masks, height, width)`.
        config: loss configuration of the model.

    Returns:
        `(masks, mask_num_points, 2)` xy in [0, 1].
    """
    student, teacher = _full(student), _full(teacher)
    kept = int(config.mask_num_points * config.mask_importance_sample_ratio)
    drawn = int(config.mask_num_points * config.mask_oversample_ratio)
    points = student.new_empty(len(student), drawn + config.mask_num_points - kept, 2).uniform_()
    candidates, rest = points.split([drawn, config.mask_num_points - kept], dim=1)
    apart = (sample_logits(student, candidates).sigmoid() - sample_logits(teacher, candidates).sigmoid()).abs()
    chosen = apart.topk(kept, dim=1, sorted=False).indices
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), rest], dim=1)


def semantic_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergences of logits `(prompts, 1, height, width)`, mean over pixels: `(prompts,)`."""
    return divergence(student, teacher).flatten(1).mean(1)
