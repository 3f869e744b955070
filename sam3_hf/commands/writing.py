"""The folder of a model that a command writes: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..checkpoints import open_checkpoint
from ..files import recover, write_folder
from ..mapping import REPORT_FILE
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sharing.model_card import write_card


def check_target(target: Path, overwrite: bool):
    """
    Before the work is done, not after it.

    Raises:
        ValueError: the folder exists, and must not be replaced.
    """
    recover(target.parent, target.name)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass --overwrite.")


def write_model(
    model: Sam3LiteModel,
    processor: Sam3LiteProcessor,
    target: Path,
    provenance: dict,
    report: str | os.PathLike | None = None,
):
    """
    Writes the folder of a model, read back before it takes the place of `target`.

    Args:
        provenance: see [`write_card`].
        report: a mapping report to copy, where the model has none of its own.
    """

    def write(folder: Path):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if report is not None and model.mapping_report is None:
            shutil.copyfile(report, folder / REPORT_FILE)
        write_card(folder, provenance)
        _verify(model, folder)

    write_folder(target, write)


def _verify(model: Sam3LiteModel, folder: Path):
    """Compares the files with the model, tensor by tensor."""
    written = open_checkpoint(folder)
    for name, tensor in model.state_dict().items():
        if name not in written or not torch.equal(written.read(name), tensor):
            raise OSError(f"{folder}: `{name}` was not written as it is in memory; is the disk full?")
