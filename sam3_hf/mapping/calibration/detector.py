"""The detector of a smaller model, fitted to the larger one on images and prompts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...detr_sam3_lite import DecoderMemory
from ...modeling_sam3_lite import Sam3LiteModel, additive_mask
from ..least_squares import LeastSquares
from ..refit import DETR_ENCODER_SITES, Stack, inputs_of, refit_stack

GROUND = 0.1  # what a place counts for where nothing is found, beside the score in [0, 1] of what is


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

    def encode(self) -> list[Tensor]:
        """Per batch, what the DETR encoder gives: `(prompts, height * width, hidden)`."""
        stack = self.encoder_stack()
        stack.pass_layers(0, len(stack.layers))
        return stack.streams

    def decode_all(self, encoded: list[Tensor]) -> list["Decoded"]:
        """Per batch, what the DETR decoder gives."""
        return [self.decode(stream, index) for index, stream in enumerate(encoded)]

    def decoding(self, encoded: Tensor, index: int) -> "Decoding":
        """The DETR decoder in front of its first layer; `encoded` is what the DETR encoder gives for batch `index`."""
        batch, coarse = self.asked[index], self.coarse[index]
        decoder = self.model.detr_decoder
        memory = decoder.memory(
            encoded,
            batch.text,
            self.model._position_encoding(coarse),
            additive_mask(batch.text_mask, encoded.dtype),
            tuple(coarse.shape[-2:]),
        )
        return Decoding(decoder, memory, *decoder.start(len(encoded)))

    def decode(self, encoded: Tensor, index: int) -> "Decoded":
        """What the DETR decoder gives for batch `index`; `encoded` as for `decoding`."""
        decoding, batch, decoder = self.decoding(encoded, index), self.asked[index], self.model.detr_decoder
        for layer in decoder.layers:
            decoding.advance(decoding.run(layer))
        logits = self.model.dot_product_scoring(decoding.normed[None], batch.text, batch.text_mask).squeeze(-1)[0]
        presence = decoding.presence.sigmoid()
        return Decoded(decoding.normed, decoding.hidden[:, 0], logits.sigmoid() * presence[:, None], decoding.boxes)


class Decoded(NamedTuple):
    """What a DETR decoder gives."""

    queries: Tensor  # (prompts, queries, hidden), as the heads read them
    presence_token: Tensor  # (prompts, hidden)
    scores: Tensor  # (prompts, queries) in [0, 1]
    boxes: Tensor  # (prompts, queries, 4) cxcywh in [0, 1]


@dataclass
class Decoding:
    """
    How far the queries of a batch have come in a DETR decoder.

    Args:
        hidden: the stream, `(prompts, 1 + queries, hidden)`, the presence token first.
        boxes: `(prompts or 1, queries, 4)` cxcywh.
    """

    decoder: nn.Module
    memory: DecoderMemory
    hidden: Tensor
    boxes: Tensor

    def run(self, layer: nn.Module) -> Tensor:
        """The stream behind a layer."""
        return self.decoder.run_layer(layer, self.hidden, self.boxes, self.memory)

    def advance(self, hidden: Tensor, boxes: Tensor | None = None):
        """Goes on behind a layer, with the boxes that follow from its stream if no others are given."""
        self.hidden = hidden
        self.boxes = self.decoder.refine(self.normed, self.boxes) if boxes is None else boxes

    @property
    def normed(self) -> Tensor:
        """What the heads read, `(prompts, queries, hidden)`."""
        return self.decoder.output_layer_norm(self.hidden[:, 1:])

    @property
    def presence(self) -> Tensor:
        """Logits `(prompts,)`."""
        limit = self.decoder.clamp_presence_logit_max_val
        return self.decoder.presence_logits(self.hidden).clamp(min=-limit, max=limit)


def refit_detr_encoder(
    student: Side, teacher: Side, decoded: list[Decoded], kept: list[int], ridge: float
) -> tuple[list[Tensor], list[Tensor]]:
    """
    Refits the DETR encoder, in place; see [`refit_stack`]. Places count by what the teacher finds there: most of an
    image is ground, and a mean over all places would fit that.

    Args:
        decoded: what the teacher's decoder gives.
        kept: the teacher layer that each layer comes from.

    Returns:
        Per batch, what either encoder gives: `(prompts, height * width, hidden)`.
    """
    stacks = student.encoder_stack(), teacher.encoder_stack()
    sizes = [coarse.shape[-2:] for coarse in teacher.coarse]
    weights = [GROUND + what_is_found(each, *size) for each, size in zip(decoded, sizes, strict=True)]
    refit_stack(*stacks, kept, DETR_ENCODER_SITES, lambda stream: stream, ridge, weights)
    return stacks[0].streams, stacks[1].streams


def what_is_found(decoded: Decoded, height: int, width: int) -> Tensor:
    """For each place of a grid the highest score of a box over it: `(prompts, height * width)` in [0, 1]."""
    inside = _covered(decoded.boxes, 1, height)[..., :, None] & _covered(decoded.boxes, 0, width)[..., None, :]
    return (inside * decoded.scores[..., None, None]).amax(1).flatten(1)


def _covered(boxes: Tensor, axis: int, count: int) -> Tensor:
    """`(prompts, queries, count)` bool: the rows (axis 1) or columns (0) of a grid that boxes reach into."""
    centres = (torch.arange(count, device=boxes.device) + 0.5) / count
    return (centres - boxes[..., axis, None]).abs() < boxes[..., axis + 2, None] / 2 + 0.5 / count


def refit_mask_embedder(
    student: Sam3LiteModel, teacher: Sam3LiteModel, own: list[Decoded], wanted: list[Decoded], ridge: float
):
    """
    Refits the layers between the queries and their masks, in place. The mask head has seen the last decoder layer
    alone: behind another layer, its masks are void. Queries count by the square of the teacher's score: few queries
    show anything, and only their masks matter.

    Args:
        own, wanted: per batch, what either decoder gives.
    """
    embedder, teacher_embedder = (model.mask_decoder.mask_embedder for model in (student, teacher))
    for linear, teacher_linear in zip(embedder.layers, teacher_embedder.layers, strict=True):
        fit = LeastSquares(linear.in_features, linear.out_features, linear.weight.device)
        for decoded, target in zip(own, wanted, strict=True):
            (x,), _ = inputs_of([linear], lambda h=decoded.queries: embedder(h))
            (y,), _ = inputs_of([teacher_linear], lambda h=target.queries: teacher_embedder(h))
            fit.add(x, teacher_linear(y), target.scores.square())
        fit.refit(linear, ridge)
