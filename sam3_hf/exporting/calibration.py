"""What the graphs of a model are fed with when they look at pictures, to fit the ranges of int8 to."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..configuration_sam3_lite import VISUAL_PHRASE, Sam3LiteConfig
from ..files import asset_lines
from ..mapping.calibration.images import load_pixels
from ..vocabulary_sam3_lite import phrase_features
from .folder import Export
from .model import ExportedModel

PROMPTS_AT_ONCE = 4  # that are asked of a picture
DETECTIONS = 10  # of a picture, whose masks are made, and whose boxes are the next prompts
_DEFAULT_PHRASES = 8  # of everyday nouns, for a model that takes any


@dataclass
class Calibration:
    """
    Pictures and phrases.

    Args:
        images: folder, searched to any depth, or a list of what [`~sam3_hf.reading.read_image`] takes.
        prompts: phrases to ask. Default: the fixed vocabulary of the model, or everyday nouns.
        count: how many pictures to take at most.
        seed: of the choice.
    """

    images: str | os.PathLike | list
    prompts: list[str] = field(default_factory=list)
    count: int = 16
    seed: int = 0

    @torch.no_grad()
    def samples(
        self, folder: Path, names: list[str], config: Sam3LiteConfig, processor
    ) -> dict[str, list[dict[str, np.ndarray]]]:
        """
        Args:
            folder: of the graphs in float32.
            names: of the graphs.
            config, processor: of the model that they were made of.

        Returns:
            {graph: its inputs, once per call}.

        Raises:
            ValueError: there are no pictures, or a phrase is not in the vocabulary.
            OSError: a picture cannot be read.
        """
        pixels = load_pixels(self.images, self.count, processor, self.seed)
        recorder = _Recorder(Export(folder, {"format": "onnx"}, config))
        phrases = self.prompts or config.vocabulary or asset_lines("everyday_nouns.txt")[:_DEFAULT_PHRASES]
        features, masks = phrase_features(recorder, processor, list(phrases))
        visual, visual_mask = phrase_features(recorder, processor, [VISUAL_PHRASE])
        for number, picture in enumerate(pixels):
            vision = recorder.get_vision_features(picture[None])
            rows = [(number * PROMPTS_AT_ONCE + i) % len(phrases) for i in range(min(PROMPTS_AT_ONCE, len(phrases)))]
            found = _ask(recorder, vision, features[rows], masks[rows])
            examples = _as_prompt(found.boxes[:2])
            _ask(recorder, vision, visual, visual_mask, input_boxes=examples)
        return {name: recorder.inputs[name] for name in names}


class _Recorder(ExportedModel):
    """Keeps what its graphs are called with."""

    def __init__(self, export: Export):
        super().__init__(export)
        self.inputs: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)

    def run(self, name: str, **inputs: Tensor) -> list[Tensor]:
        self.inputs[name].append({key: tensor.numpy() for key, tensor in inputs.items()})
        return super().run(name, **inputs)


def _ask(recorder: _Recorder, vision, text: Tensor, mask: Tensor, **boxes: Tensor):
    index = torch.zeros(len(text), dtype=torch.long)
    return recorder.find(vision, text, mask, index, threshold=0.0, max_detections=DETECTIONS, **boxes)


def _as_prompt(boxes: Tensor) -> Tensor:
    """`(n, 4)` xyxy to `(1, n, 4)` cxcywh, within the image."""
    low, high = boxes.clamp(0, 1).unflatten(-1, (2, 2)).unbind(1)
    return torch.cat([(low + high) / 2, (high - low).clamp(min=1e-3)], dim=-1)[None]
