"""Text features of a list of phrases, computed once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..vocabulary_sam3_lite import phrase_features


class PhraseFeatures:
    """What the text encoder of a model says of each phrase."""

    def __init__(self, model, processor, phrases: Iterable[str], device: torch.device):
        """
        Args:
            model: its text encoder must be on `device`, in evaluation mode.
            phrases: all that will be asked for; encoded here, once.

        Raises:
            ValueError: a phrase is not in the fixed vocabulary of the model.
        """
        phrases = sorted(set(phrases))
        features, mask = phrase_features(model, processor, phrases, device, padded=False)
        self.features = features.float().cpu()  # (phrases, tokens, hidden)
        self.attention_mask = mask.cpu()  # (phrases, tokens)
        self.row = {phrase: row for row, phrase in enumerate(phrases)}

    def __call__(self, phrases: list[str]) -> dict[str, Tensor]:
        """
        {"text_embeds" (phrases, tokens, hidden) float32, "attention_mask" (phrases, tokens) int64}, on the CPU.

        Raises:
            KeyError: a phrase that was not encoded at the start.
        """
        rows = torch.tensor([self.row[phrase] for phrase in phrases])
        return {"text_embeds": self.features[rows], "attention_mask": self.attention_mask[rows]}
