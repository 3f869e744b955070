"""What `from_pretrained` does with a source that is no lite model of the wanted sizes: decided once, then done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedConfig

from ..checkpoints import Checkpoint, open_checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig
from ..errors import missing_source
from ..precision_sam3_lite import as_dtype
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sources_sam3_lite import HUB_ARGUMENTS, listed
from .mapper import map_checkpoint
from .report import MappingReport
from .text import fits_text, map_with_phrases

# Keyword arguments of `from_pretrained` that are also fields of a config, but not sizes.
_LOADING_KEYWORDS = {"attn_implementation", "dtype", "torch_dtype", "quantization_config", "name_or_path"}


@dataclass(frozen=True)
class MappingPlan:
    """
    Args:
        checkpoint: where the weights come from.
        config: sizes of the model.
        dtype: of the model.
        ignore_mismatched_sizes: see [`map_checkpoint`].
        rest: arguments of `from_pretrained` that are left to Transformers.
        tokenizer: makes that of the source.
        text_phrases: what a smaller text encoder is fitted to; everyday ones by default.
    """

    checkpoint: Checkpoint
    config: Sam3LiteConfig
    dtype: torch.dtype
    ignore_mismatched_sizes: bool
    rest: dict
    tokenizer: Callable[[], CLIPTokenizer]
    text_phrases: Sequence[str] | None = None

    @property
    def model_config(self) -> PreTrainedConfig:
        """That of the model."""
        return self.config

    def map(
        self, shapes_of: Callable[[Sam3LiteConfig], dict[str, tuple[int, ...]]], strategy: str
    ) -> tuple[dict[str, Tensor], MappingReport]:
        """
        The parameters of the model; see [`map_checkpoint`], and [`map_with_phrases`], which `auto` is for a smaller
        text encoder.

        Args:
            shapes_of: the name and shape of each parameter of a model with some configuration.
            strategy: of the mapping.

        Raises:
            ValueError: the source is incomplete, or cannot be mapped to these sizes.
        """
        expected = shapes_of(self.checkpoint.config)
        missing = self.checkpoint.check(expected)
        if missing and not (self.ignore_mismatched_sizes or self.rest.get("output_loading_info")):
            raise ValueError(
                f"{self.checkpoint.label} is no whole model: it lacks {len(missing)} of {len(expected)} tensors: "
                f"{listed(missing)}. {self.checkpoint.unknown_names()}. Get it again, or pass "
                "`ignore_mismatched_sizes=True` to initialise them at random."
            )
        sides = self.checkpoint, self.config, shapes_of(self.config)
        options = {"dtype": self.dtype, "ignore_mismatched_sizes": self.ignore_mismatched_sizes}
        fits = fits_text(self.checkpoint.config, self.config)
        if strategy == "auto" and fits:
            return map_with_phrases(*sides, self.tokenizer(), self.text_phrases, **options)
        if self.text_phrases is not None:
            why = f"the mapping is {strategy!r}" if fits else "it does not become smaller, or is not SAM 3's"
            raise ValueError(
                f"`text_phrases` are what a smaller text encoder is fitted to, and here {why}: omit them."
            )
        return map_checkpoint(*sides, strategy, **options)


def plan_mapping(
    source: str | os.PathLike,
    fields: dict | None,
    preset: str | None,
    config: Sam3LiteConfig | None,
    keywords: dict,
    text_encoder: str | os.PathLike | None = None,
    text_phrases: Sequence[str] | None = None,
    tracker: bool = False,
) -> MappingPlan | None:
    """
    Args:
        source: what [`~Sam3LiteModel.from_pretrained`] takes.
        fields: content of its `config.json`, if it has one.
        preset, config: sizes of the model, as there.
        keywords: the other arguments of `from_pretrained`.
        text_encoder, text_phrases: as there.
        tracker: see [`open_checkpoint`].

    Returns:
        The plan, or `None` if the source has neither a `config.json` nor a native file, and there is `config`.

    Raises:
        ValueError, OSError: as `from_pretrained`.
    """
    rest = dict(keywords)
    where = {key: rest.pop(key) for key in HUB_ARGUMENTS if key in rest}
    checkpoint = open_checkpoint(
        source, rest.pop("variant", None), rest.pop("use_safetensors"), fields, text_encoder, tracker, **where
    )
    if checkpoint is None:
        if config is not None and text_encoder is None:
            return None
        if where.get("local_files_only"):
            raise FileNotFoundError(f"{source} is not on this machine, where `local_files_only` looks alone")
        raise missing_source(source, where.get("token"))
    sizes = {key: rest.pop(key) for key in Sam3LiteConfig.keywords() & set(rest) - _LOADING_KEYWORDS}
    preset = preset or ("same" if checkpoint.is_lite else "lite")
    if config is None and preset != "same":
        config = checkpoint.config_at(preset, **sizes)
    else:
        config = config or checkpoint.config
        config = config.changed(**sizes) if sizes else config
    dtype = resolve_dtype(rest.pop("dtype", None), rest.pop("torch_dtype", None), checkpoint.dtype)

    def tokenizer() -> CLIPTokenizer:
        if text_encoder is not None:
            shared = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
            return Sam3LiteProcessor.of_source(text_encoder, checkpoint.config, **shared).tokenizer
        return Sam3LiteProcessor.of_source(source, checkpoint.config, **where).tokenizer

    lenient = rest.pop("ignore_mismatched_sizes", False)
    return MappingPlan(checkpoint, config, dtype, lenient, rest, tokenizer, text_phrases)


def resolve_dtype(dtype, torch_dtype, stored: torch.dtype) -> torch.dtype:
    """`dtype` of `from_pretrained`: a dtype or its name; by default, or for "auto", that of the checkpoint."""
    dtype = torch_dtype if dtype is None else dtype
    if dtype in (None, "auto"):
        return stored
    return as_dtype(dtype)
