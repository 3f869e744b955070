"""The detector of a smaller model, fitted to the larger one on images and prompts."""

from typing import NamedTuple

from torch import Tensor, nn

from ...modeling_sam3_lite import Sam3LiteModel, additive_mask
from ..least_squares import LeastSquares
from ..refit import DETR_ENCODER_SITES, Stack, inputs_of, refit_stack


class PromptBatch(NamedTuple):
    """Prompts for one batch of images."""

    image_index: Tensor  # (prompts,)
    text: Tensor  # (prompts, tokens, hidden)
    text_mask: Tensor  # (prompts, tokens) bool


class Side(NamedTuple):
    """One of the two models, and per batch what its detector gets."""

    model: Sam3LiteModel
    coarse: list[Tensor]  # the coarsest map of its vision encoder, (images, hidden, height, width)
    asked: list[PromptBatch]  # with the features of its text encoder

    def encoder_stack(self) -> Stack:
        """The DETR encoder, with its streams `(prompts, height * width, hidden)` in front of the first layer."""

        def run(layer: nn.Module, stream: Tensor, index: int) -> Tensor:
            batch = self.asked[index]
            position = self.model._position_encoding(self.coarse[index])
            return layer(stream, batch.text, position, additive_mask(batch.text_mask, stream.dtype))

        streams = [
            coarse.flatten(2).transpose(1, 2)[batch.image_index]
            for coarse, batch in zip(self.coarse, self.asked, strict=True)
        ]
        return Stack(self.model.detr_encoder.layers, run, streams)

    def decode(self, encoded: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            encoded: `(prompts, height * width, hidden)`, what the DETR encoder gives for batch `index`.

        Returns:
            Last hidden states `(prompts, queries, hidden)` and scores `(prompts, queries)` in [0, 1].
        """
        model, batch, coarse = self.model, self.asked[index], self.coarse[index]
        position = model._position_encoding(coarse)
        bias = additive_mask(batch.text_mask, encoded.dtype)
        size = tuple(coarse.shape[-2:])
        hidden, _, presence = model.detr_decoder(encoded, batch.text, position, bias, size, False)
        logits = model.dot_product_scoring(hidden[-1:], batch.text, batch.text_mask).squeeze(-1)[0]
        return hidden[-1], logits.sigmoid() * presence[-1].sigmoid()[:, None]


def refit_detr_encoder(
    student: Side, teacher: Side, kept: list[int], ridge: float
) -> tuple[list[Tensor], list[Tensor]]:
    """
    Refits the DETR encoder, in place; see [`refit_stack`].

    Args:
        kept: the teacher layer that each layer comes from.

    Returns:
        Per batch, what either encoder gives: `(prompts, height * width, hidden)`.
    """
    stacks = student.encoder_stack(), teacher.encoder_stack()
    refit_stack(*stacks, kept, DETR_ENCODER_SITES, lambda stream: stream, ridge)
    return stacks[0].streams, stacks[1].streams


def refit_mask_embedder(
    student: Side, teacher: Side, encoded: list[Tensor], teacher_encoded: list[Tensor], ridge: float
):
    """
    Refits the layers between the queries and their masks, in place. The mask head has seen the last decoder layer
    alone: behind another layer, its masks are void. Queries count by the square of the teacher's score: few queries
    show anything, and only their masks matter.

    Args:
        encoded, teacher_encoded: what [`refit_detr_encoder`] returned.
    """
    pairs = []
    for index, (own, wanted) in enumerate(zip(encoded, teacher_encoded, strict=True)):
        hidden, _ = student.decode(own, index)
        target, scores = teacher.decode(wanted, index)
        pairs.append((hidden, target, scores.square()))
    embedder, teacher_embedder = (side.model.mask_decoder.mask_embedder for side in (student, teacher))
    for linear, teacher_linear in zip(embedder.layers, teacher_embedder.layers, strict=True):
        fit = LeastSquares(linear.in_features, linear.out_features, linear.weight.device)
        for hidden, target, weight in pairs:
            (x,), _ = inputs_of([linear], lambda h=hidden: embedder(h))
            (y,), _ = inputs_of([teacher_linear], lambda h=target: teacher_embedder(h))
            fit.add(x, teacher_linear(y), weight)
        fit.refit(linear, ridge)
