"""A fixed vocabulary: the text features of some phrases, stored in the place of the text encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_sam3_lite import MAX_TOKENS, VISUAL_PHRASE, context_length

logger = logging.get_logger(__name__)

# Names of its buffers in the model that hold integers, whatever the precision of the model.
INTEGER_BUFFERS = ("vocabulary.input_ids", "vocabulary.attention_mask")
BUFFERS = ("vocabulary.features", *INTEGER_BUFFERS)
PHRASES_AT_ONCE = 64  # that the text encoder handles: bounds the memory of many phrases
_LISTED = 50  # an error lists so many phrases at most
_REMEMBERED = 4096  # phrases
_phrases: dict[tuple[int, ...], str] = {}  # by their tokens: what was tokenized lately, so that errors name it


def vocabulary_phrases(classes: list[str]) -> list[str]:
    """What a vocabulary stores: its classes and, after them, the phrase of prompts by boxes alone."""
    return list(dict.fromkeys([*classes, VISUAL_PHRASE]))


def check_tokenizer(tokenizer, config):
    """
    Raises:
        ValueError: the tokenizer is not that of a model with this configuration: it gives ids that mean other words
            there, or nothing.
    """
    rows, largest = config.text_config.vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    if len(tokenizer) != rows or largest >= rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with ids up to {largest}, the text embedding of the model has "
            f"{rows} rows: take the tokenizer that was saved with the model."
        )


def _token_ids(input_ids: Tensor, attention_mask: Tensor) -> list[tuple[int, ...]]:
    """Those of each phrase without the padding at its end, -1 for what is masked before."""
    rows = input_ids.masked_fill(attention_mask == 0, -1).tolist()
    lengths = [max((place for place, token in enumerate(row, 1) if token >= 0), default=0) for row in rows]
    return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def remember_phrases(phrases: list[str], input_ids: Tensor, attention_mask: Tensor):
    """
    Keeps the last thousands of phrases with their tokens, by which a model that lacks one names it.

    Args:
        input_ids, attention_mask: `(phrases, tokens)` int.
    """
    _phrases.update(zip(_token_ids(input_ids, attention_mask), phrases, strict=True))
    for oldest in list(_phrases)[:-_REMEMBERED]:
        del _phrases[oldest]


def warn_of_alike(phrases: list[str], input_ids: Tensor, attention_mask: Tensor):
    """
    Warns, once, of phrases that are one to the model: it reads small letters, and the first tokens only.

    Args:
        input_ids, attention_mask: `(phrases, tokens)` int.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for phrase, ids in zip(phrases, input_ids.masked_fill(attention_mask == 0, -1).tolist(), strict=True):
        groups.setdefault(tuple(ids), []).append(phrase)
    for alike in map(list, map(dict.fromkeys, groups.values())):
        if len(alike) > 1:
            logger.warning_once(
                f"{_listed(alike)}: one phrase to the model, which makes letters small and reads "
                f"{input_ids.shape[1]} tokens of a phrase. Its answers to them are the same: give it phrases that "
                "differ earlier."
            )


@torch.no_grad()
def encode_phrases(model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """
    Text features of any number of phrases.

    Args:
        model: a [`Sam3LiteModel`].
        input_ids, attention_mask: `(phrases, tokens)` int, on the device of its text encoder.

    Returns:
        `(phrases, tokens, hidden)`.

    Raises:
        ValueError: a phrase is not in the fixed vocabulary of the model.
    """
    chunks = zip(input_ids.split(PHRASES_AT_ONCE), attention_mask.split(PHRASES_AT_ONCE), strict=True)
    return torch.cat([model.get_text_features(*chunk).pooler_output for chunk in chunks])


def phrase_features(
    model, processor, phrases: list[str], device: torch.device | None = None, padded: bool = True
) -> tuple[Tensor, Tensor]:
    """
    Text features of phrases, each encoded once.

    Args:
        model: a [`Sam3LiteModel`] in evaluation mode.
        processor: turns the phrases into tokens.
        phrases: at least one.
        device: that of its text encoder. Default: that of the model.
        padded: to as many tokens as the text encoder reads, so that features of several calls go together; otherwise
            to the longest of the phrases.

    Returns:
        Features `(phrases, tokens, hidden)` and their validity `(phrases, tokens)` int64, 0 for padding, on `device`.

    Raises:
        ValueError: a phrase is not in the fixed vocabulary of the model; the message names it.
    """
    if model.vocabulary is not None:
        model.vocabulary.check(phrases, processor)
    tokens = processor(text=list(phrases))
    warn_of_alike(phrases, tokens["input_ids"], tokens["attention_mask"])
    length = None if padded else int(tokens["attention_mask"].nonzero()[:, 1].max()) + 1
    input_ids, mask = (tokens[name][:, :length].to(device or model.device) for name in ("input_ids", "attention_mask"))
    return encode_phrases(model, input_ids, mask), mask


class Sam3LiteVocabulary(nn.Module):
    """
    Text features by phrase, and the tokens of each, by which a prompt is recognised.

    Rows are those of [`vocabulary_phrases`], so class `i` is row `i`. Buffers: `features`
    `(phrases, tokens, hidden)` float, zero for padding; `input_ids` `(phrases, tokens)` int64; `attention_mask`
    `(phrases, tokens)` int64, 0 for padding.

    Args:
        classes: as in `config.vocabulary`.
        hidden_size: width of the features.
        num_tokens: of each phrase, see [`context_length`].
    """

    def __init__(self, classes: list[str], hidden_size: int, num_tokens: int = MAX_TOKENS):
        super().__init__()
        self.classes = list(classes)
        rows = len(vocabulary_phrases(classes))
        self.register_buffer("features", torch.zeros(rows, num_tokens, hidden_size))
        self.register_buffer("input_ids", torch.zeros(rows, num_tokens, dtype=torch.long))
        self.register_buffer("attention_mask", torch.zeros(rows, num_tokens, dtype=torch.long))

    @classmethod
    def encode(cls, classes: list[str], processor, model) -> Sam3LiteVocabulary:
        """
        Args:
            classes: the phrases.
            processor: turns them into tokens.
            model: gives their features.

        Returns:
            A vocabulary in the dtype and on the device of the features.

        Raises:
            ValueError: the tokenizer is not that of the model.
        """
        check_tokenizer(processor.tokenizer, model.config)
        tokens = processor(text=vocabulary_phrases(classes)).to(model.device)
        input_ids, mask = tokens["input_ids"], tokens["attention_mask"]
        num_tokens = context_length(model.config.text_config)
        warn_of_alike(classes, input_ids[: len(classes)], mask[: len(classes)])
        features = encode_phrases(model, input_ids, mask)
        features = features * mask.to(features).unsqueeze(-1)
        vocabulary = cls(classes, features.shape[-1], num_tokens)
        vocabulary.features = features[:, :num_tokens]
        vocabulary.input_ids = input_ids[:, :num_tokens].to(features.device)
        vocabulary.attention_mask = mask[:, :num_tokens].to(features.device)
        return vocabulary

    def find(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            input_ids: `(prompts, tokens)` int.
            attention_mask: `(prompts, tokens)`, 0 for padding, of which any amount may be at the end.

        Returns:
            The row of each prompt, `(prompts,)` int64; -1 where the vocabulary lacks it.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = max(input_ids.shape[1], self.input_ids.shape[1])
        asked, known = (
            F.pad(ids.masked_fill(mask == 0, -1), (0, length - ids.shape[1]), value=-1)
            for ids, mask in ((input_ids, attention_mask), (self.input_ids, self.attention_mask))
        )
        same = (asked[:, None] == known).all(dim=-1)  # (prompts, phrases)
        return torch.where(same.any(dim=-1), same.int().argmax(dim=-1), -1)

    def check(self, phrases: list[str], processor):
        """
        Raises:
            ValueError: phrases are not in the vocabulary; the message lists them, and what is.
        """
        rows = self.find(**processor(text=list(phrases)).to(self.input_ids.device)).tolist()
        unknown = [phrase for phrase, row in zip(phrases, rows, strict=True) if row < 0]
        if unknown:
            raise ValueError(
                f"{_listed(unknown)}: not in the fixed vocabulary of this model, which is: {self.listed()}. Ask for "
                "these (a category map renames what a dataset has), or take a model with a text encoder "
                "(`restore_text_encoder` gives it back)."
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Features of prompts, for the arguments of [`find`].

        Returns:
            `(prompts, tokens, hidden)`, as many tokens as `input_ids` has.

        Raises:
            ValueError: a prompt is not in the vocabulary; the message names it, as far as its words are known, and
                lists what is.
        """
        rows = self.find(input_ids, attention_mask)
        unknown = (rows < 0).nonzero().flatten()
        if len(unknown):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            asked = _token_ids(input_ids[unknown], mask[unknown])
            names = [
                repr(_phrases[tokens]) if tokens in _phrases else f"prompt {row}"
                for row, tokens in zip(unknown.tolist(), asked, strict=True)
            ]
            raise ValueError(
                f"{_joined(names)}: not in the vocabulary of this model, which is: {self.listed()}. For other words "
                "give it a text encoder with `restore_text_encoder`; padded `input_ids` need their `attention_mask`."
            )
        return F.pad(self.features[rows], (0, 0, 0, input_ids.shape[1] - self.features.shape[1]))

    def select(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            class_ids: `(prompts,)` int, from 0 to the number of classes - 1.

        Returns:
            Features `(prompts, tokens, hidden)` and their validity `(prompts, tokens)` int64.

        Raises:
            ValueError: no class has such an id; the message lists all.
        """
        class_ids = torch.as_tensor(class_ids, device=self.features.device)
        if class_ids.ndim != 1 or class_ids.is_floating_point() or class_ids.dtype == torch.bool:
            raise ValueError(
                f"`class_ids` must be (num_prompts,) int, got {tuple(class_ids.shape)} {class_ids.dtype}."
            )
        count = len(self.classes)
        if ((class_ids < 0) | (class_ids >= count)).any():
            raise ValueError(
                f"`class_ids` must be from 0 to {count - 1}, got {class_ids.tolist()}. Classes: {self.listed()}."
            )
        return self.features[class_ids], self.attention_mask[class_ids]

    def listed(self) -> str:
        """The classes as text, e.g. `'cat', 'dog'`; the end of a long list is left out."""
        return _listed(self.classes)


def _listed(phrases: list[str]) -> str:
    return _joined(list(map(repr, phrases)))


def _joined(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


__all__ = [
    "Sam3LiteVocabulary",
    "check_tokenizer",
    "encode_phrases",
    "phrase_features",
    "remember_phrases",
    "vocabulary_phrases",
    "warn_of_alike",
]
