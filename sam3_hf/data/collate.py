"""Samples into a batch."""

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate

from ..boxes_sam3_lite import pack_boxes
from ..processing_sam3_lite import tokenize
from .torch_dataset import Sample


class PromptCollator:
    """Collates `Sample`s.

    The batch:
        pixel_values: (images, 3, size, size) float32, -1 to 1
        phrases: list of str, one per prompt
        image_index: (prompts,) int64, the row of `pixel_values` that a prompt belongs to
        labels: list of dicts, one per prompt: boxes (n, 4) float32 cxcywh in [0, 1]; masks (n, size, size) bool
        image_ids: list, one per image
        input_boxes: (prompts, boxes, 4) float32 cxcywh in [0, 1], and input_boxes_labels: (prompts, boxes) int64, 1 or
            -10 for padding: only if a prompt has a box
        input_ids, attention_mask: (prompts, 32) int64: only with a tokenizer
        keys: list of (epoch, index), one per image: only for samples of training
        original_sizes: list of (height, width), one per image; categories: (prompts,) int64; references: list, one per
            prompt: only for samples of `EvalDataset`

    Args:
        tokenizer: encodes the phrases.
        model_inputs_only: leaves out what a model's forward does not take, so that `transformers.Trainer` can be given
            this collator; needs the tokenizer.

    Raises:
        ValueError: `model_inputs_only` without a tokenizer.
    """

    def __init__(self, tokenizer=None, model_inputs_only: bool = False):
        if model_inputs_only and tokenizer is None:
            raise ValueError("model_inputs_only needs a tokenizer: the model takes input_ids, not phrases")
        self.tokenizer, self.model_inputs_only = tokenizer, model_inputs_only

    def __call__(self, samples: Sequence[Sample]) -> dict:
        phrases = [phrase for sample in samples for phrase in sample.phrases]
        counts = torch.tensor([len(sample.phrases) for sample in samples])
        batch = {
            # in a worker, this writes right into the memory it shares with the main process
            "pixel_values": default_collate([sample.pixel_values for sample in samples]),
            "image_index": torch.repeat_interleave(torch.arange(len(samples)), counts),
            "labels": [label for sample in samples for label in sample.labels],
        }
        boxes = [box for sample in samples for box in sample.boxes]
        if any(box is not None for box in boxes):
            batch |= pack_boxes([None if box is None else box[None] for box in boxes])
        if self.tokenizer is not None:
            batch |= tokenize(self.tokenizer, phrases)
        if self.model_inputs_only:
            return batch
        batch |= {"phrases": phrases, "image_ids": [sample.image_id for sample in samples]}
        if samples[0].key is not None:
            batch["keys"] = [sample.key for sample in samples]
        if samples[0].original_size is not None:
            batch["original_sizes"] = [sample.original_size for sample in samples]
            batch["categories"] = torch.tensor([category for sample in samples for category in sample.categories])
            batch["references"] = [reference for sample in samples for reference in sample.references]
        return batch
