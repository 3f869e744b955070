"""From phrases to the model's text inputs: tokens for a text encoder that trains, stored features for a frozen one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..evaluation.text import PhraseFeatures
from ..processing_sam3_lite import tokenize

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
