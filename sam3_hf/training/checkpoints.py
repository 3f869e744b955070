"""Checkpoints of a run: folders that are either whole or absent."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file, save_file

from ..files import link, partial_of, put_in_place, start_folder, sync, write_file
from ..sources_sam3_lite import AVERAGE
from ..sources_sam3_lite import FROZEN_TEXT as FROZEN
from ..sources_sam3_lite import TRAINER_STATE as STATE
from .optim import MovingAverage

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
    partial = partial_of(target)
    if accelerator.is_main_process:
        start_folder(target)
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
            link(target.parent / FROZEN, partial / FROZEN)
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
    write_file(checkpoint / STATE, _state_text(state))
    sync(checkpoint)


def write_frozen(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stores the frozen weights once per run; each checkpoint links to the file, so that it is complete by itself."""
    write_file(checkpoints / FROZEN, lambda partial: save_file(tensors, partial))


def _state_text(state: dict) -> str:
    return json.dumps(state, indent=1) + "\n"
