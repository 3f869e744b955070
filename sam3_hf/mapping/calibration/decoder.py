"""The DETR decoder of a smaller model, fitted to the larger one on images and prompts."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from ...modeling_sam3_lite import Sam3LiteModel
from ..least_squares import LeastSquares
from ..refit import DETR_DECODER_SITES, fit_site, inputs_of, observe
from .detector import Decoded, Decoding, Side

IDLE = 0.02  # what a query counts for that finds nothing, beside its score in [0, 1]
PROMPTS_PER_FEATURE = 4  # that the presence head is fitted to at least
PRESENCE = 0.2  # what the presence token counts for, as a share of all queries together


def refit_detr_decoder(
    student: Side,
    teacher: Side,
    encoded: list[Tensor],
    teacher_encoded: list[Tensor],
    decoded: list[Decoded],
    kept: list[int],
    ridge: float,
):
    """
    Refits the DETR decoder, in place, as [`refit_stack`] does a tower: inside a layer its stream follows that of the
    layer it comes from, behind it that in front of the next layer that was kept, so that what the removed layers did
    is absorbed. These are post-LayerNorm layers: the last norm is that of the teacher's layer whose output is
    followed. Boxes, which every layer refines with the same head, are given to the next layer as the teacher has them
    there; then the last layer of the box head is fitted to make up for all that lies between.

    Queries count by the teacher's score: most find nothing, and what they hold matters little.

    Args:
        encoded, teacher_encoded: per batch, what either DETR encoder gives.
        decoded: per batch, what the teacher's decoder gives.
        kept: the teacher layer that each layer comes from, in order. The last one takes on what follows it.
        ridge: see [`LeastSquares.solve`].
    """
    own, wanted = (
        [side.decoding(stream, index) for index, stream in enumerate(streams)]
        for side, streams in ((student, encoded), (teacher, teacher_encoded))
    )
    weights = [_weights(each.scores) for each in decoded]
    decoder, teacher_layers = student.model.detr_decoder, teacher.model.detr_decoder.layers
    box_fit = _HeadFit(decoder.box_head, 4)
    for decoding in wanted:
        _pass_layers(decoding, teacher_layers[: kept[0]])
    for layer, source, following in zip(decoder.layers, kept, [*kept[1:], len(teacher_layers)], strict=True):
        targets = [_pass_layers(decoding, teacher_layers[source:following]) for decoding in wanted]
        final_norm = teacher_layers[following - 1].mlp_layer_norm
        layer.mlp_layer_norm.load_state_dict(final_norm.state_dict())
        calls = [partial(decoding.run, layer) for decoding in own]
        for position, site in enumerate(DETR_DECODER_SITES):
            fit_site(layer, site, calls, [target[position] for target in targets], ridge, weights)
        for decoding, goal, weight in zip(own, wanted, weights, strict=True):
            before = decoding.boxes
            decoding.advance(decoding.run(layer), goal.boxes)
            missing = inverse_sigmoid(goal.boxes) - inverse_sigmoid(before)
            box_fit.add(decoding.normed, missing, weight[:, 1:])
    box_fit.refit(ridge)


def refit_presence(
    student: Sam3LiteModel, teacher: Sam3LiteModel, own: list[Decoded], wanted: list[Decoded], ridge: float
) -> bool:
    """
    Refits the last layer of the presence head, in place, where there are enough prompts: each gives one token.

    Args:
        own, wanted: per batch, what either decoder gives.

    Returns:
        Whether it was done.
    """
    decoder, teacher_decoder = student.detr_decoder, teacher.detr_decoder
    tokens = sum(len(each.presence_token) for each in own)
    if tokens < PROMPTS_PER_FEATURE * decoder.presence_head.layer3.in_features:
        return False
    fit, limit = _HeadFit(decoder.presence_head, 1), decoder.clamp_presence_logit_max_val
    for each, goal in zip(own, wanted, strict=True):
        logits = teacher_decoder.presence_head(teacher_decoder.presence_layer_norm(goal.presence_token))
        fit.add(decoder.presence_layer_norm(each.presence_token), logits.clamp(min=-limit, max=limit))
    fit.refit(ridge)
    return True


def _weights(scores: Tensor) -> Tensor:
    """What each token counts for, `(prompts, 1 + queries)`, from the scores `(prompts, queries)` of the teacher."""
    queries = IDLE + scores
    return torch.cat([PRESENCE * queries.sum(1, keepdim=True), queries], dim=1)


def _pass_layers(decoding: Decoding, layers: nn.ModuleList) -> list[Tensor]:
    """Takes the teacher through some layers: the streams in front of the norms of the first, but the last's last."""
    norms = [site.norm for site in DETR_DECODER_SITES]
    targets = []
    for layer in layers:
        inside, hidden = observe(layer, norms, partial(decoding.run, layer))
        targets = [*(targets or inside)[:-1], inside[-1]]
        decoding.advance(hidden)
    return targets


class _HeadFit:
    """A least-squares fit of the last linear layer of a head."""

    def __init__(self, head: nn.Module, outputs: int):
        self.head, self.linear = head, head.layer3
        self.fit = LeastSquares(self.linear.in_features, outputs, self.linear.weight.device)

    def add(self, inputs: Tensor, outputs: Tensor, weight: Tensor | None = None):
        (hidden,), _ = inputs_of([self.linear], lambda: self.head(inputs))
        self.fit.add(hidden, outputs, weight)

    def refit(self, ridge: float):
        self.fit.refit(self.linear, ridge)
