"""From phrases to the model's text inputs: tokens for a text encoder that trains, stored features for a frozen one."""

from collections.abc import Callable, Iterable

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from sam3_hf.processing_sam3_lite import tokenize

TEXT_PARTS = ("text_encoder", "text_projection")
CHUNK = 64  # phrases encoded at once


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


class FrozenText:
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
        phrases = sorted(set(phrases))
        tokens = tokenize(processor.tokenizer, phrases)
        tokens = {key: value[:, : tokens["attention_mask"].sum(1).max()] for key, value in tokens.items()}
        parts = {name: getattr(model, name).to(device).eval() for name in TEXT_PARTS}
        with torch.no_grad():
            chunks = zip(tokens["input_ids"].split(CHUNK), tokens["attention_mask"].split(CHUNK), strict=True)
            features = [model.get_text_features(ids.to(device), mask.to(device)).pooler_output for ids, mask in chunks]
        self.features = torch.cat(features).float().cpu()  # (phrases, tokens, hidden)
        self.attention_mask = tokens["attention_mask"]  # (phrases, tokens)
        self.row = {phrase: row for row, phrase in enumerate(phrases)}
        self._weights = {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.cpu().state_dict().items()
        }
        for name in TEXT_PARTS:
            setattr(model, name, None)

    def __call__(self, phrases: list[str]) -> dict[str, Tensor]:
        """
        {"text_embeds" (phrases, tokens, hidden) float32, "attention_mask" (phrases, tokens) int64}, on the CPU.

        Raises:
            KeyError: a phrase that was not encoded at the start.
        """
        rows = torch.tensor([self.row[phrase] for phrase in phrases])
        return {"text_embeds": self.features[rows], "attention_mask": self.attention_mask[rows]}

    def weights(self) -> dict[str, Tensor]:
        """The encoder's weights by the names that the whole model has for them, on the CPU."""
        return self._weights


def model_inputs(batch: dict, text: Callable[[list[str]], dict], device: torch.device) -> dict:
    """What the model's forward takes of a collated batch, on its device."""
    taken = ("pixel_values", "image_index", "input_boxes", "input_boxes_labels", "labels")
    inputs = {key: batch[key] for key in taken if key in batch} | text(batch["phrases"])
    return send_to_device(inputs, device, non_blocking=True)
