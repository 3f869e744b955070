"""What two models are asked about the same images while one is fitted to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modeling_sam3_lite import Sam3LiteModel
from ...vocabulary_sam3_lite import phrase_features
from .detector import PromptBatch, Side

CANDIDATES = 24  # phrases per image that the larger model is asked to find those that it sees there
SEEN, OTHERS = 4, 2  # of them, how many of the best and how many of the others are asked in the fit


@dataclass
class Encoded:
    """
    What the encoders of a model make of images and phrases.

    Args:
        coarse: per batch of images, the coarsest map of the vision encoder, `(images, hidden, height, width)`.
        summary: per batch, the summary tokens `(images, 1, hidden)`, None for a model without.
        text: `(phrases, tokens, hidden)`.
        valid: `(phrases, tokens)` bool.
    """

    model: Sam3LiteModel
    coarse: list[Tensor]
    summary: list[Tensor | None]
    text: Tensor
    valid: Tensor

    @classmethod
    def of(cls, model: Sam3LiteModel, processor, images: list[Tensor], phrases: Sequence[str]) -> Encoded:
        text, valid = phrase_features(model, processor, list(phrases), padded=False)
        coarse, summary = [], []
        for batch in images:
            vision = model.get_vision_features(batch)
            coarse.append(vision.fpn_hidden_states[-1])  # the finer maps, which are wide, are not kept
            summary.append(vision.summary)
        return cls(model, coarse, summary, text, valid.bool())

    def side(self, choices: list[Tensor]) -> Side:
        """The detector with what it gets when each image of batch `i` is asked the phrases of its row `choices[i]`."""
        asked = [self._ask(index, rows) for index, rows in enumerate(choices)]
        return Side(self.model, self.coarse, asked)

    def best_scores(self, index: int, rows: Tensor) -> Tensor:
        """Of each image of a batch and each of its phrases, the highest score in [0, 1]; the shape of `rows`."""
        side = Side(self.model, [self.coarse[index]], [self._ask(index, rows)])
        return side.decode(side.encode()[0], 0).scores.amax(1).view(rows.shape)

    def _ask(self, index: int, rows: Tensor) -> PromptBatch:
        owners = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        text, valid = self.text[rows.flatten()], self.valid[rows.flatten()]
        summary = self.summary[index]
        if summary is not None:
            text = torch.cat([text, summary[owners]], dim=1)
            valid = F.pad(valid, (0, 1), value=True)
        return PromptBatch(owners, text, valid)


def choose_prompts(teacher: Encoded, seed: int) -> list[Tensor]:
    """
    A few phrases for each image. Of many phrases most are absent, and boxes and masks can be fitted only to what is
    there: so the larger model is asked some, and of those that it finds best and of the others a few are taken.

    Args:
        seed: of the phrases that it is asked.

    Returns:
        Per batch, `(images, phrases)` int64.
    """
    generator = torch.Generator().manual_seed(seed)
    count, device = len(teacher.text), teacher.text.device
    choices = []
    for index, coarse in enumerate(teacher.coarse):
        rows = torch.stack([torch.randperm(count, generator=generator)[:CANDIDATES] for _ in coarse]).to(device)
        if rows.shape[1] > SEEN + OTHERS:
            scores = [teacher.best_scores(index, part) for part in rows.split(SEEN + OTHERS, dim=1)]
            order = torch.cat(scores, dim=1).argsort(dim=1, descending=True)
            others = order[:, SEEN:].sort(dim=1).values  # in the random order in which they were drawn
            rows = rows.gather(1, torch.cat([order[:, :SEEN], others[:, :OTHERS]], dim=1))
        choices.append(rows)
    return choices
