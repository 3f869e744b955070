"""An exported folder as a model and its processor."""

from __future__ import annotations

import os

import torch

from ..precision_sam3_lite import as_dtype
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sources_sam3_lite import HUB_ARGUMENTS
from .folder import fetch_export, read_export
from .model import ExportedModel


def open_export(
    source: str | os.PathLike, device: str | torch.device | None = None, dtype=None, **kwargs
) -> tuple[ExportedModel, Sam3LiteProcessor]:
    """
    Args:
        source: a folder of `sam3-lite export`, or a repository of the Hub with its content.
        device: default: the CPU.
        dtype: see [`ExportedModel`].
        kwargs: of `from_pretrained`; what would change the model is refused.

    Raises:
        ValueError: the folder is damaged, or an argument asks for another model than it holds.
        OSError: files are missing or truncated, or cannot be downloaded.
        ImportError: its runtime is not installed.
    """
    refused = [key for key, value in kwargs.items() if key not in HUB_ARGUMENTS and value not in (None, "same")]
    if refused:
        raise ValueError(f"{source} is an exported model, `{refused[0]}` is for the one that it was exported from.")
    hub_arguments = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    export = read_export(fetch_export(source, **hub_arguments))
    model = ExportedModel(export, str(device or "cpu"), torch.float32 if dtype is None else as_dtype(dtype))
    return model.eval(), Sam3LiteProcessor.of_source(export.folder, export.config)
