"""A text encoder that learns from a larger one what phrases mean: no pictures, no labels."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..checkpoints import open_checkpoint, refuse_training_checkpoint
from ..checkpoints.text_encoder import read_text
from ..data import EvalDataset
from ..errors import missing_source, named_source
from ..evaluation.loop import evaluate
from ..evaluation.text import PhraseFeatures
from ..modeling_sam3_lite import Sam3LiteModel
from ..phrases import hold_out
from ..processing_sam3_lite import Sam3LiteProcessor, tokenize
from .arguments import OptimizationArguments
from .optim import Schedule

# Weights of the three terms of the loss.
TOKEN_WEIGHT, COSINE_WEIGHT, ORDER_WEIGHT = 1.0, 1.0, 0.1
PHRASES_AT_ONCE = 256  # where nothing is learnt
IMAGES_AT_ONCE = 4
SCORES = ("segm_AP", "segm_cgF1", "bbox_AP", "bbox_cgF1")
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TextSettings:
    """
    Args:
        steps: of the optimizer.
        batch_size: phrases of a step.
        learning_rate: the highest; it rises in the first steps, then falls.
        seed: of the order of phrases and words.
    """

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}.")


class TextSide(NamedTuple):
    """A text encoder with its projection, and the tokenizer of its words."""

    encoder: nn.Module
    projection: nn.Module
    tokenizer: Callable

    def features(self, tokens: dict[str, Tensor]) -> Tensor:
        """`(phrases, tokens, hidden)` of [`tokenize`]d phrases."""
        device = self.projection.weight.device
        return self.projection(self.encoder(**{name: t.to(device) for name, t in tokens.items()}).last_hidden_state)


class Lesson(NamedTuple):
    """What a teacher says of some phrases."""

    phrases: list[str]
    tokens: dict[str, Tensor]  # of the student, each (phrases, tokens)
    features: Tensor  # (phrases, tokens, hidden)
    valid: Tensor  # (phrases, tokens) bool: real tokens, of which both sides read the same

    def rows(self, rows: Sequence[int]) -> Lesson:
        index = torch.as_tensor(rows)
        tokens = {name: tensor[index] for name, tensor in self.tokens.items()}
        return Lesson([self.phrases[row] for row in rows], tokens, self.features[index], self.valid[index])


def read_teacher(source: str | os.PathLike) -> TextSide:
    """
    The text side of any checkpoint, on the CPU, in float32.

    Args:
        source: what [`~Sam3LiteModel.from_pretrained`] takes.

    Raises:
        OSError: there is none.
        ValueError: it has a fixed vocabulary, or lacks tensors.
    """
    refuse_training_checkpoint(source)
    with named_source(source):
        checkpoint = open_checkpoint(source)
    if checkpoint is None:
        raise missing_source(source)
    if checkpoint.config.vocabulary is not None:
        raise ValueError(f"{source} has a fixed vocabulary and no text encoder: name another teacher.")
    parts = read_text(checkpoint)
    tokenizer = Sam3LiteProcessor.of_source(source, checkpoint.config).tokenizer
    return TextSide(parts["text_encoder"], parts["text_projection"], tokenizer)


def detector_scores(model: Sam3LiteModel, processor: Sam3LiteProcessor, dataset: EvalDataset) -> dict[str, float]:
    """Those of `SCORES` that a dataset defines: what the detector makes of the words."""
    accelerator = Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no")
    model.to(accelerator.device).eval()
    text = PhraseFeatures(model, processor, dataset.concepts, accelerator.device)
    set_seed(0)
    figures = evaluate(accelerator, model, processor, text, dataset, batch_size=IMAGES_AT_ONCE)
    return {name: figures[name] for name in SCORES if figures.get(name) is not None}


def distill_text(
    student: TextSide,
    teacher: TextSide,
    phrases: Sequence[str],
    settings: TextSettings,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> dict:
    """
    Trains a text encoder and its projection, in place, to say of phrases what a teacher says.

    The loss has three terms: the squared error of the features of each token, in units of their variance; their
    cosine; and the cosine between the pooled features of a phrase with its words in another order and those that the
    teacher has of it as it is written.

    Args:
        student: in float32; left in evaluation mode.
        teacher: in evaluation mode, on any device. What it says of all phrases is kept: a kilobyte for each token.
        phrases: all different. An eighth of them is held out, to measure.
        on_step: called with the number of each step, from 1 on, and its loss.

    Returns:
        What was done, and "cosine_before" and "cosine_after": between the features of both for the phrases held out,
        mean over their tokens; "reordered_before" and "reordered_after": between the pooled features of student and
        teacher where the words of the student's phrase are in another order, if there are phrases of several words.

    Raises:
        ValueError: less than two phrases, sides with other words or widths, or a loss that is not finite.
    """
    _check_sides(student, teacher)
    fitted, held_out = hold_out(list(dict.fromkeys(phrases)))
    lesson, exam = (make_lesson(student, teacher, part) for part in (fitted, held_out))
    before = measure(student, exam)
    parameters = [*student.encoder.parameters(), *student.projection.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    student.encoder.train()
    # Without decay, which would wear off the words that no phrase has.
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = Schedule(optimizer, OptimizationArguments())
    variance = lesson.features[lesson.valid].var(0).mean().clamp_min(1e-12)
    shuffle = random.Random(settings.seed)
    for step, rows in enumerate(_batches(len(fitted), settings), start=1):
        loss = _loss(student, lesson.rows(rows), variance, shuffle)
        if not loss.isfinite():
            raise ValueError(f"The loss is {loss.item()} in step {step}: use a smaller learning rate.")
        schedule.apply(optimizer, step, settings.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    student.encoder.eval()
    after = measure(student, exam)
    return {
        "phrases_fitted": len(fitted),
        "phrases_held_out": len(held_out),
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
    }


@torch.no_grad()
def make_lesson(student: TextSide, teacher: TextSide, phrases: list[str]) -> Lesson:
    """What a teacher says of phrases, for a student that may read fewer tokens of each."""
    own, theirs = tokenize(student.tokenizer, phrases), tokenize(teacher.tokenizer, phrases)
    length = int(own["attention_mask"].nonzero()[:, 1].max()) + 1
    features = [
        teacher.features({name: tensor[start : start + PHRASES_AT_ONCE] for name, tensor in theirs.items()})
        for start in range(0, len(phrases), PHRASES_AT_ONCE)
    ]
    own, theirs = ({name: tensor[:, :length] for name, tensor in side.items()} for side in (own, theirs))
    # A student of few tokens reads the end of a long phrase where the teacher reads a word.
    valid = (own["input_ids"] == theirs["input_ids"]) & (own["attention_mask"] * theirs["attention_mask"]).bool()
    features = torch.cat([part[:, :length].float() for part in features])
    return Lesson(phrases, own, features, valid.to(features.device))


@torch.no_grad()
def measure(student: TextSide, exam: Lesson) -> dict[str, float]:
    """{"cosine", and "reordered" if there are phrases of several words}; see [`distill_text`]."""
    cosines, agreements = [], []
    shuffle = random.Random(0)
    for start in range(0, len(exam.phrases), PHRASES_AT_ONCE):
        part = exam.rows(range(start, min(start + PHRASES_AT_ONCE, len(exam.phrases))))
        features = student.features(part.tokens)
        cosines.append(F.cosine_similarity(features, part.features, dim=-1)[part.valid])
        agreements.append(_agreement(student, part, shuffle))
    result = {"cosine": torch.cat(cosines).mean().item()}
    agreements = torch.cat(agreements)
    return result | ({"reordered": agreements.mean().item()} if len(agreements) else {})


def _loss(student: TextSide, lesson: Lesson, variance: Tensor, shuffle: random.Random) -> Tensor:
    own, wanted = student.features(lesson.tokens)[lesson.valid], lesson.features[lesson.valid]
    token = (own - wanted).square().mean() / variance
    cosine = 1 - F.cosine_similarity(own, wanted, dim=-1).mean()
    loss = TOKEN_WEIGHT * token + COSINE_WEIGHT * cosine
    agreement = _agreement(student, lesson, shuffle)
    return loss + ORDER_WEIGHT * (1 - agreement.mean()) if len(agreement) else loss


def _agreement(student: TextSide, lesson: Lesson, shuffle: random.Random) -> Tensor:
    """`(phrases of several words,)`: cosine of pooled features, the student's of the phrase in another order."""
    rows = [row for row, phrase in enumerate(lesson.phrases) if len(set(phrase.split())) > 1]
    if not rows:
        return lesson.features.new_zeros(0)
    tokens = tokenize(student.tokenizer, [reordered(lesson.phrases[row], shuffle) for row in rows])
    length = int(tokens["attention_mask"].nonzero()[:, 1].max()) + 1
    tokens = {name: tensor[:, :length] for name, tensor in tokens.items()}
    own = _pooled(student.features(tokens), tokens["attention_mask"])
    part = lesson.rows(rows)
    return F.cosine_similarity(own, _pooled(part.features, part.valid), dim=-1)


def reordered(phrase: str, shuffle: random.Random) -> str:
    """The phrase with its words in another order; there must be two that differ."""
    words = phrase.split()
    other = list(words)
    while other == words:
        shuffle.shuffle(other)
    return " ".join(other)


def _pooled(features: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens, as the detector pools what it scores by."""
    weights = mask.to(features)[..., None]
    return (features * weights).sum(1) / weights.sum(1)


def _batches(count: int, settings: TextSettings) -> Iterator[list[int]]:
    """For each step the rows of its phrases: all of them, in random order, then all again."""
    generator = torch.Generator().manual_seed(settings.seed)
    size, left = min(settings.batch_size, count), []
    for _ in range(settings.steps):
        while len(left) < size:
            left += torch.randperm(count, generator=generator).tolist()
        rows, left = left[:size], left[size:]
        yield rows


def _check_sides(student: TextSide, teacher: TextSide) -> None:
    widths = [side.projection.out_features for side in (teacher, student)]
    if widths[0] != widths[1]:
        raise ValueError(f"The teacher projects its text to {widths[0]} channels, the model to {widths[1]}.")
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError("The tokenizers of teacher and model differ: they give the same phrase other tokens.")
