"""Checkpoints of a run: folders that are either whole or absent."""

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ..errors import one_line
from ..files import link, partial_of, put_in_place, start_folder, sync, write_file
from ..sources_sam3_lite import ADAPTER, AVERAGE
from ..sources_sam3_lite import FROZEN_TEXT as FROZEN
from ..sources_sam3_lite import TRAINER_STATE as STATE
from .adapters import adapter_state, load_adapter_state
from .checksums import FileSums, first_difference, text_checksum
from .optim import MovingAverage
from .sharded import joined, load_moments
from .stopping import any_process

OBJECTIVE = "objective.pt"
BASE = "frozen_base.safetensors"  # of a run that trains adapters: the weights beside which they stand
FILES, CHECKSUM = "files", "checksum"  # in the state file: checksums of the other files, and of the state itself
file_sums = FileSums()


def save_checkpoint(
    accelerator: Accelerator,
    target: Path,
    model,
    optimizer,
    ema: MovingAverage | None,
    state: dict,
    objective: dict | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Writes a checkpoint to resume from; called by every process. An older `target` stays until the new one is whole.

    Args:
        model, optimizer: as returned by `accelerator.prepare`.
        state: what goes to trainer_state.json: step, scores, settings.
        objective: the state of what is minimised, if it has any.
        tokenizer: that the words of the run are read with.

    Raises:
        RuntimeError: weights or moments are not finite, or the checkpoint cannot be written; `target` is as it was.
    """
    bad = not_finite(accelerator.unwrap_model(model), optimizer, ema)
    if any_process(accelerator, bool(bad)):
        raise RuntimeError(
            f"{target} is not written, as not all numbers in it are finite{_listed(bad)}: the one before stays as it "
            "was. Go on from it with --resume auto and a lower --learning_rate"
        )
    partial = partial_of(target)
    try:
        if accelerator.is_main_process:
            start_folder(target)
        accelerator.wait_for_everyone()
        _write(accelerator, partial, target.parent, model, optimizer, ema, objective, tokenizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sums = file_sums.of_folder(partial, leave_out=STATE)
            (partial / STATE).write_text(_state_text(state, sums), encoding="utf-8")
            put_in_place(partial, target)
    except Exception as error:
        free = shutil.disk_usage(target.parent if target.parent.is_dir() else Path.cwd()).free
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(
            f"{target} could not be written, the one before stays as it was: {one_line(error)} ({free / 1e9:.1f} GB "
            "are free on its disk). Mend that, then go on with --resume auto"
        ) from error
    accelerator.wait_for_everyone()


def _write(
    accelerator: Accelerator, folder: Path, checkpoints: Path, model, optimizer, ema, objective, tokenizer
) -> None:
    whole = accelerator.unwrap_model(model)
    adapter = adapter_state(whole)
    if _in_parts(accelerator, adapter):
        accelerator.save_state(folder)  # each process holds a part of the weights, and writes it
    else:
        weights, moments = joined(adapter or whole.state_dict()), joined(optimizer.state_dict())
    if not accelerator.is_main_process:
        return
    if not _in_parts(accelerator, adapter):
        save_file(weights, folder / (ADAPTER if adapter else "model.safetensors"))
        torch.save(moments, folder / "optimizer.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
    if ema is not None:
        save_file(ema.state_dict(), folder / AVERAGE)
    if objective:
        torch.save(objective, folder / OBJECTIVE)
    whole.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in (FROZEN, BASE):
        if (checkpoints / name).is_file():
            link(checkpoints / name, folder / name)


def _in_parts(accelerator: Accelerator, adapter: dict) -> bool:
    """Whether weights are so many that no process puts them together."""
    return accelerator.distributed_type == DistributedType.FSDP and not adapter


def not_finite(model, optimizer, ema: MovingAverage | None) -> list[str]:
    """Names of the parameters of which this process holds a weight, moment or average that is not finite."""
    named = dict(model.named_parameters())
    moments = ((parameter, optimizer.state.get(parameter, {}).values()) for parameter in named.values())
    tensors = {name: [parameter, *own] for name, (parameter, own) in zip(named, moments, strict=True)}
    for name, average in ({} if ema is None else ema.state_dict()).items():
        tensors[name].append(average)
    if _all_finite(tensor for own in tensors.values() for tensor in own):
        return []
    return [name for name, own in tensors.items() if not _all_finite(own)]


def _all_finite(tensors: Iterable) -> bool:
    tensors = (tensor.detach() for tensor in tensors if isinstance(tensor, torch.Tensor))
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    local = [tensor for tensor in local if tensor.is_floating_point() and tensor.numel()]
    # One fused pass over the memory, where a norm is finite. That of large finite numbers may overflow.
    return bool(torch.nn.utils.get_total_norm(local).isfinite()) or all(bool(t.isfinite().all()) for t in local)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""


def load_checkpoint(accelerator: Accelerator, source: Path, model, optimizer, ema: MovingAverage | None) -> dict:
    """
    Restores what `save_checkpoint` wrote, except the state file; called by every process.

    Returns:
        The state of the objective, empty if there is none.
    """
    whole = accelerator.unwrap_model(model)
    adapter = adapter_state(whole)
    if _in_parts(accelerator, adapter):
        accelerator.load_state(source)
    else:
        if adapter:
            load_adapter_state(whole, load_file(source / ADAPTER))
        else:
            whole.load_state_dict(load_file(source / "model.safetensors"))
        load_moments(optimizer, torch.load(source / "optimizer.pt", map_location="cpu", weights_only=True))
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
        ValueError: the file is damaged.
    """
    return _read(checkpoint)[0]


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with the files of a checkpoint, `None` if they are as they were written. Those of older versions,
    which have no checksums, are opened only, which shows whether they were cut off.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
    """
    try:
        _, sums = _read(checkpoint)
    except ValueError as error:
        return str(error)
    return _cut_off(checkpoint) if sums is None else first_difference(checkpoint, sums)


def _read(checkpoint: Path) -> tuple[dict, dict[str, str] | None]:
    """The state, and the checksums of the other files if there are any."""
    if not (checkpoint / STATE).is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: it has no {STATE}")
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        expected = state.pop(CHECKSUM, None)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{STATE} is damaged: {error}") from None
    if expected not in (None, text_checksum(json.dumps(state))):
        raise ValueError(f"{STATE} does not match its checksum")
    return state, state.pop(FILES, None)


def _cut_off(checkpoint: Path) -> str | None:
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is damaged: {error}"
        elif path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{path.name} is damaged"
    return None


def replace_state(checkpoint: Path, state: dict) -> None:
    """Puts another state file into a checkpoint, at once and without a change to those that link to the old one."""
    write_file(checkpoint / STATE, _state_text(state, _read(checkpoint)[1]))
    sync(checkpoint)


def write_frozen(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stores the frozen weights once per run; each checkpoint links to the file, so that it is complete by itself."""
    write_file(checkpoints / FROZEN, lambda partial: save_file(tensors, partial))


def write_base(checkpoints: Path, weights: dict[str, torch.Tensor]) -> None:
    """As `write_frozen`: the weights that adapters stand beside, by the names of a model without them."""
    write_file(checkpoints / BASE, lambda partial: save_file({n: w.cpu() for n, w in weights.items()}, partial))


def shares_base(checkpoints: Path, checkpoint: Path | None) -> bool:
    """Whether a checkpoint's weights beside the adapters are those that new checkpoints in the folder link to."""
    if checkpoint is None or not (checkpoint / BASE).is_file() or not (checkpoints / BASE).is_file():
        return False
    return (checkpoint / BASE).samefile(checkpoints / BASE)


def _state_text(state: dict, sums: dict[str, str] | None) -> str:
    whole = state if sums is None else {**state, FILES: sums}
    return json.dumps({**whole, CHECKSUM: text_checksum(json.dumps(whole))}, indent=1) + "\n"
