"""The model of a command that finds things in pictures."""

from __future__ import annotations

import torch
import typer

from ..checkpoints import refuse_training_checkpoint
from ..errors import model_errors
from ..prediction.pipeline import Sam3LitePipeline
from ..prediction.processes import Processes


def open_pipeline(
    model: str,
    words: list[str],
    processes: Processes,
    *,
    masks: bool,
    device: str | None,
    dtype,
    revision: str,
    preset: str = "same",
) -> tuple[Sam3LitePipeline, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """
    A pipeline, and the features of the words that it is asked for. Says where there will be no masks.

    Args:
        masks: they are asked for.
        preset: sizes that the weights are mapped to, or "same" for those of the model.

    Raises:
        ValueError: the model cannot be loaded, has no masks where they are asked for, or does not know a word.
    """
    with model_errors(model):
        refuse_training_checkpoint(model)
        pipe = Sam3LitePipeline.from_pretrained(
            model, device=device or processes.device, dtype=dtype, revision=revision, preset=preset
        )
        if not pipe.model.config.mask_supervision:
            if masks:
                raise ValueError(f"{model} was trained on boxes alone and has no masks to write: leave --masks out.")
            if processes.is_main:
                typer.echo(f"{model} was trained on boxes alone: it gives boxes, and no masks.", err=True)
        return pipe, pipe.text_features(words)
