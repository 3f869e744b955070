"""From phrases to the model's text inputs: tokens for a text encoder that trains, stored features for a frozen one."""

import logging
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import EvalDataset, TrainDataset
from ..data.sampling import VISUAL_PHRASE
from ..evaluation.text import PhraseFeatures
from ..processing_sam3_lite import tokenize
from ..vocabulary_sam3_lite import warn_of_alike
from .arguments import Arguments

logger = logging.getLogger(__name__)

TEXT_PARTS = ("text_encoder", "text_projection")


class TokenizedText:
    """Text inputs for a model that keeps its text encoder."""

    def __init__(self, processor):
        self.tokenizer = processor.tokenizer

    def __call__(self, phrases: list[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, each (phrases, tokens) int64, of one length for all batches."""
        return tokenize(self.tokenizer, phrases)

    def weights(self) -> dict[str, Tensor]:
        """Weights that the model does not hold itself: none."""
        return {}


class FrozenText(PhraseFeatures):
    """
    The text encoder taken out of a model, and its output for every phrase of the run.

    The model is left without the encoder: it takes no memory on the GPU, and neither the optimizer, checkpoints nor
    other processes hear of it.
    """

    def __init__(self, model, processor, phrases: Iterable[str], device: torch.device):
        """
        Args:
            model: loses its `text_encoder` and `text_projection`.
            phrases: all that will be asked for; encoded here, once.
            device: where to encode them.
        """
        parts = {name: getattr(model, name).to(device).eval() for name in TEXT_PARTS}
        super().__init__(model, processor, phrases, device)
        self._weights = {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.cpu().state_dict().items()
        }
        for name in TEXT_PARTS:
            setattr(model, name, None)

    def weights(self) -> dict[str, Tensor]:
        """The encoder's weights by the names that the whole model has for them, on the CPU."""
        return self._weights


def phrases_of(train_data: TrainDataset, valid_data: EvalDataset | None) -> list[str]:
    """All phrases that a run asks for."""
    evaluated = [] if valid_data is None else valid_data.concepts
    return [*train_data.concepts, *train_data.sampling.negative_words, *evaluated, VISUAL_PHRASE]


def build_text(
    accelerator: Accelerator, arguments: Arguments, model, processor, phrases: list[str]
) -> tuple[TokenizedText | FrozenText, dict[str, Tensor] | None]:
    """
    The text side: trained within the model, or frozen and taken out of it, or the fixed vocabulary of the model; and
    the weights that do not train, which checkpoints need as well.

    Args:
        phrases: all that will be asked for.

    Raises:
        ValueError: the model has a fixed vocabulary, and its text encoder should train, or a phrase is not in it.
    """
    if model.vocabulary is not None:
        if arguments.model.train_text_encoder:
            raise ValueError("train_text_encoder: the model has a fixed vocabulary and no text encoder to train")
        model.vocabulary.check(phrases, processor)
        logger.info("the model has a fixed vocabulary: %s", model.vocabulary.listed())
        return TokenizedText(processor), model.vocabulary.state_dict(prefix="vocabulary.")
    if arguments.model.train_text_encoder:
        text = TokenizedText(processor)
        warn_of_alike(phrases, **text(phrases))
        return text, None
    text = FrozenText(model, processor, phrases, accelerator.device)
    logger.info("the text encoder is frozen: %d phrases encoded, encoder put aside", len(text.row))
    return text, text.weights()
