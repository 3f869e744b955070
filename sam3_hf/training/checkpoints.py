"""Folders that are either whole or absent: checkpoints are written beside their place, then renamed into it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file, save_file

from ..sources_sam3_lite import AVERAGE
from ..sources_sam3_lite import FROZEN_TEXT as FROZEN
from ..sources_sam3_lite import TRAINER_STATE as STATE
from .optim import MovingAverage

logger = logging.getLogger(__name__)

OBJECTIVE = "objective.pt"


def save_checkpoint(
    accelerator: Accelerator,
    target: Path,
    model,
    optimizer,
    ema: MovingAverage | None,
    state: dict,
    objective: dict | None = None,
) -> None:
    """
    Writes a checkpoint to resume from; called by every process. An older `target` stays until the new one is whole.

    Args:
        model, optimizer: as returned by `accelerator.prepare`.
        state: what goes to trainer_state.json: step, scores, settings.
        objective: the state of what is minimised, if it has any.
    """
    partial = _beside(target, "partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.save_state(partial)  # each process holds a part of the weights, and writes it
    if accelerator.is_main_process:
        if accelerator.distributed_type != DistributedType.FSDP:
            save_file(accelerator.unwrap_model(model).state_dict(), partial / "model.safetensors")
            torch.save(optimizer.state_dict(), partial / "optimizer.pt")
            if accelerator.scaler is not None:
                torch.save(accelerator.scaler.state_dict(), partial / "scaler.pt")
        if ema is not None:
            save_file(ema.state_dict(), partial / AVERAGE)
        if objective:
            torch.save(objective, partial / OBJECTIVE)
        accelerator.unwrap_model(model).config.save_pretrained(partial)
        if (target.parent / FROZEN).is_file():
            _link(target.parent / FROZEN, partial / FROZEN)
        (partial / STATE).write_text(_state_text(state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_in_place(partial, target)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, source: Path, model, optimizer, ema: MovingAverage | None) -> dict:
    """
    Restores what `save_checkpoint` wrote, except the state file; called by every process.

    Returns:
        The state of the objective, empty if there is none.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.load_state(source)
    else:
        accelerator.unwrap_model(model).load_state_dict(load_file(source / "model.safetensors"))
        optimizer.load_state_dict(torch.load(source / "optimizer.pt", map_location="cpu", weights_only=True))
        if accelerator.scaler is not None and (source / "scaler.pt").is_file():
            accelerator.scaler.load_state_dict(torch.load(source / "scaler.pt", weights_only=True))
    if ema is not None:
        ema.load_state_dict(load_file(source / AVERAGE))
    path = source / OBJECTIVE
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}


def read_state(checkpoint: Path) -> dict:
    """
    The state file of a checkpoint.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
    """
    if not (checkpoint / STATE).is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: it has no {STATE}")
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def replace_state(checkpoint: Path, state: dict) -> None:
    """Puts another state file into a checkpoint, at once and without a change to those that link to the old one."""
    partial = _beside(checkpoint, "state.partial")
    partial.write_text(_state_text(state), encoding="utf-8")
    _sync(partial)
    os.replace(partial, checkpoint / STATE)
    _sync(checkpoint)


def copy_checkpoint(source: Path, target: Path) -> None:
    """A second name for a checkpoint. Files are hard links where the file system has them: no time, no space."""
    partial = _beside(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    put_in_place(partial, target)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a folder to fill, then puts that folder in the place of `target`."""
    partial = _beside(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    put_in_place(partial, target)


def put_in_place(partial: Path, target: Path) -> None:
    """Renames a complete folder to its name. A kill in between leaves the old one, which `recover` gives its name."""
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    previous = _beside(target, "previous")
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    os.rename(partial, target)
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path, name: str = "*") -> None:
    """Undoes replacements of `name` in a folder that a kill interrupted, and deletes what was half written."""
    for previous in folder.glob(f".{name}.previous"):
        target = folder / previous.name[1 : -len(".previous")]
        if target.exists():
            shutil.rmtree(previous)
        else:
            logger.warning(f"{target} was being replaced when the last run ended; going back to the one before")
            os.rename(previous, target)
    for partial in folder.glob(f".{name}.partial"):
        logger.warning(f"removing {partial}, which the last run did not finish writing")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_frozen(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stores the frozen weights once per run; each checkpoint links to the file, so that it is complete by itself."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = _beside(checkpoints / FROZEN, "partial")
    save_file(tensors, partial)
    _sync(partial)
    os.replace(partial, checkpoints / FROZEN)


def _state_text(state: dict) -> str:
    return json.dumps(state, indent=1) + "\n"


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}"


def _link(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system, or across two of them
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
