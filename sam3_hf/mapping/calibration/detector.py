"""The detector of a smaller model, fitted to the larger one on images and prompts."""

from typing import NamedTuple

from torch import Tensor, nn

from ...modeling_sam3_lite import additive_mask
from .least_squares import LeastSquares
from .refit import DETR_ENCODER_SITES, inputs_of, refit_stack


class PromptBatch(NamedTuple):
    """Prompts for one batch of images."""

    image_index: Tensor  # (prompts,)
    text: Tensor  # (prompts, tokens, hidden)
    text_mask: Tensor  # (prompts, tokens) bool


def refit_detr_encoder(
    model, teacher, levels, teacher_levels, prompts, teacher_prompts, kept: list[int], ridge: float
):
    """
    Refits the DETR encoder, see [`refit_stack`].

    Args:
        levels, teacher_levels: per batch, the coarsest map `(images, hidden, height, width)` of either vision encoder.
        prompts, teacher_prompts: per batch, with the features of either text encoder.

    Returns:
        Per batch, what either encoder gives: `(prompts, height * width, hidden)`.
    """

    def begin(coarse: list[Tensor], asked: list[PromptBatch]) -> list[Tensor]:
        return [c.flatten(2).transpose(1, 2)[p.image_index] for c, p in zip(coarse, asked, strict=True)]

    def runner(owner, coarse, asked):
        def run(layer: nn.Module, stream: Tensor, index: int) -> Tensor:
            batch = asked[index]
            position = owner._position_encoding(coarse[index])
            return layer(stream, batch.text, position, additive_mask(batch.text_mask, stream.dtype))

        return run

    return refit_stack(
        model.detr_encoder.layers,
        teacher.detr_encoder.layers,
        kept,
        DETR_ENCODER_SITES,
        begin(levels, prompts),
        begin(teacher_levels, teacher_prompts),
        runner(model, levels, prompts),
        runner(teacher, teacher_levels, teacher_prompts),
        lambda stream: stream,
        ridge,
    )


def decode(model, encoded: Tensor, batch: PromptBatch, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns:
        Last hidden states `(prompts, queries, hidden)` and scores `(prompts, queries)` in [0, 1].
    """
    position = model._position_encoding(coarse)
    bias = additive_mask(batch.text_mask, encoded.dtype)
    hidden, _, presence = model.detr_decoder(encoded, batch.text, position, bias, tuple(coarse.shape[-2:]), False)
    logits = model.dot_product_scoring(hidden[-1:], batch.text, batch.text_mask).squeeze(-1)[0]
    return hidden[-1], logits.sigmoid() * presence[-1].sigmoid()[:, None]


def refit_mask_embedder(
    model, teacher, levels, teacher_levels, prompts, teacher_prompts, encoded, teacher_encoded, ridge: float
):
    """
    Refits the layers between the queries and their masks. The mask head has seen the last decoder layer alone: behind
    another layer, its masks are void. Queries count by the square of the teacher's score:
    few queries show anything, and only their masks matter.
    """
    pairs = []
    for i, batch in enumerate(prompts):
        hidden, _ = decode(model, encoded[i], batch, levels[i])
        wanted, scores = decode(teacher, teacher_encoded[i], teacher_prompts[i], teacher_levels[i])
        pairs.append((hidden, wanted, scores.square()))
    layers, teacher_layers = model.mask_decoder.mask_embedder.layers, teacher.mask_decoder.mask_embedder.layers
    for place, linear in enumerate(layers):
        fit = LeastSquares(linear.in_features, linear.out_features, linear.weight.device)
        for hidden, wanted, weight in pairs:
            (x,), _ = inputs_of([linear], lambda h=hidden: model.mask_decoder.mask_embedder(h))
            (y,), _ = inputs_of([teacher_layers[place]], lambda h=wanted: teacher.mask_decoder.mask_embedder(h))
            fit.add(x, teacher_layers[place](y), weight)
        fit.refit(linear, ridge)
