"""What the mapping benchmark measures of a model: scores, agreement with the teacher, spectrum of the stream."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional

from sam3_hf import Sam3LiteProcessor
from sam3_hf.data import EvalDataset, eval_batches, make_loader
from sam3_hf.evaluation.loop import evaluate
from sam3_hf.training.phrases import TokenizedText

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of the directions, for the captured-energy curve
SCORES = ("segm_AP", "segm_cgF1", "presence_AUC")  # those that are compared with the teacher's


def scores_of(accelerator, model, dataset: EvalDataset, batch_size: int) -> dict[str, float]:
    """
    "segm_AP" in [0, 1], "segm_cgF1" and "IL_MCC" in [-1, 1], and "presence_AUC" in [0, 1], over all pairs of an image
    and a concept.

    Args:
        model: may be one that `accelerator.prepare` returned.
        dataset: has masks, and both present and absent concepts.
        batch_size: images per forward pass.
    """
    processor = Sam3LiteProcessor.from_config(accelerator.unwrap_model(model).config)
    presence, truth = [], []

    def note(module, args, kwargs, outputs):
        presence.extend(outputs.presence_logits.flatten().tolist())
        truth.extend(len(label["boxes"]) > 0 for label in kwargs["labels"])

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        figures = evaluate(accelerator, model, processor, TokenizedText(processor), dataset, batch_size=batch_size)
    finally:
        hook.remove()
    names = ("segm_AP", "segm_cgF1", "IL_MCC")
    return {name: figures[name] for name in names} | {"presence_AUC": presence_auc(presence, truth)}


def presence_auc(scores: list[float], truth: list[bool]) -> float:
    """
    Chance in [0, 1] that a pair whose concept is present has a higher score than one whose concept is absent; equal
    scores count half (area under the ROC curve, by the Mann-Whitney statistic).

    Raises:
        ValueError: the concept is present in all pairs or in none.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if truth.all() or not truth.any():
        raise ValueError("presence AUC needs pairs with and without the concept: use more held-out images")
    statistic = mannwhitneyu(scores[truth], scores[~truth]).statistic
    return float(statistic / (truth.sum() * (~truth).sum()))


@torch.no_grad()
def fpn_cosines(teacher, model, dataset: EvalDataset, batch_size: int) -> list[float]:
    """
    Cosine similarity in [-1, 1] of the FPN features of two models on the same device, per level from fine to coarse,
    mean over positions and images.
    """
    teacher.eval()
    model.eval()
    totals = []
    for pixels in pixels_of(dataset, batch_size):
        ours, theirs = (m.get_vision_features(pixels.to(model.device)).fpn_hidden_states for m in (model, teacher))
        cosines = [
            functional.cosine_similarity(a.float(), b.float(), dim=1).mean((1, 2)).sum().item()  # over the batch
            for a, b in zip(ours, theirs, strict=True)
        ]
        totals.append(cosines)
    return (np.sum(totals, axis=0) / len(dataset)).tolist()


def pixels_of(dataset: EvalDataset, batch_size: int) -> Iterator[Tensor]:
    """The images of a dataset as model inputs, `(images, 3, size, size)`."""
    for batch in make_loader(dataset, eval_batches(len(dataset), batch_size), num_workers=0):
        yield batch["pixel_values"]


@contextmanager
def residual_streams(model) -> Iterator[list[Tensor]]:
    """
    Collects, for the time of the `with` block, the residual stream behind each ViT layer, as a LayerNorm shows it:
    each entry is `(tokens, width)`, every token centred and of variance 1.
    """
    streams: list[Tensor] = []

    def note(module, args, outputs):
        streams.append(functional.layer_norm(outputs.float(), outputs.shape[-1:]).flatten(0, -2))

    hooks = [layer.register_forward_hook(note) for layer in model.vision_encoder.backbone.layers]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def captured_energy(model, dataset: EvalDataset, batch_size: int) -> dict[str, float]:
    """
    Share of the variance of the residual stream in its strongest directions, one basis for all ViT layers as in the
    mapping: {share of the directions: share of the variance}, both in (0, 1).
    """
    model.eval()
    depth = model.config.vision_config.backbone_config.num_hidden_layers
    pooled, count = 0, 0
    with residual_streams(model) as streams:
        for pixels in pixels_of(dataset, batch_size):
            model.get_vision_features(pixels.to(model.device))
            tokens = torch.stack(streams).double()  # (layers, tokens, width)
            streams.clear()
            sums, squares = tokens.sum(1), tokens.mT @ tokens
            pooled = [sums, squares] if count == 0 else [pooled[0] + sums, pooled[1] + squares]
            count += tokens.shape[1]
    means, moments = pooled[0] / count, pooled[1] / count
    covariances = moments - means[:, :, None] * means[:, None]  # (layers, width, width)
    return energy_curve(covariances.sum(0) / depth)


def energy_curve(covariance: Tensor) -> dict[str, float]:
    """{share of the directions: share of the trace of `(width, width)` in the strongest of them}."""
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    return {str(share): (values[: round(share * len(values))].sum() / values.sum()).item() for share in SHARES}
