"""The output folder before the first step: what it holds already, and where the run goes on from."""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..files import recover
from ..mapping import REPORT_FILE
from ..sources_sam3_lite import ADAPTER_CONFIG
from .accelerator import decide
from .adapters import adapted_layers
from .arguments import Arguments
from .checkpoints import FROZEN, shares_base
from .parts import Parts
from .recovery import checkpoint_to_resume, checkpoints_in
from .trackers import TRACKERS_FILE

# What a run leaves in its folder, but for the log and teacher_answers/, which the next one knows by their content;
# --overwrite_output_dir deletes these and nothing else.
WRITTEN = (
    *("checkpoints", "final", "metrics.jsonl", "predictions", "tensorboard", "curves.png", REPORT_FILE),
    *(TRACKERS_FILE, "wandb"),
)
SERVICE_FOLDERS = ("tensorboard", "wandb")  # of them, those in which each run has files of its own


def open_output_dir(accelerator: Accelerator, arguments: Arguments) -> Path | None:
    """
    The checkpoint to resume from, or None for a fresh start; called by every process. Deletes nothing but what an
    older run had not finished writing.

    Raises:
        FileExistsError: the folder holds a run, and it was not said what to do with it.
        FileNotFoundError: the checkpoint to resume from does not exist.
        ValueError: it is damaged, or there are checkpoints and all of them are.
        OSError: the folder cannot be written.
    """
    return decide(accelerator, lambda: _open(arguments))


def _open(arguments: Arguments) -> Path | None:
    output_dir, resume = Path(arguments.output.output_dir), arguments.output.resume
    checkpoints = output_dir / "checkpoints"
    for folder in (output_dir, checkpoints):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written: change its rights, or choose another --output_dir")
    recover(output_dir, "final")
    recover(checkpoints)
    if resume == "none" and holds_run(output_dir) and not arguments.output.overwrite_output_dir:
        raise FileExistsError(
            f"{output_dir} already holds a run: add --resume auto to go on with it, --overwrite_output_dir to delete "
            "it, or choose another --output_dir"
        )
    if resume == "none":
        return None
    if resume == "auto" and _holds_final(output_dir) and not checkpoints_in(checkpoints):
        raise FileExistsError(
            f"{output_dir} holds the final model of a run and no checkpoint to go on from: choose another "
            "--output_dir, or leave out --resume and add --overwrite_output_dir to delete it"
        )
    return checkpoint_to_resume(checkpoints, resume)


def holds_run(output_dir: Path) -> bool:
    """Whether a run has left a checkpoint or its final model there."""
    return bool(checkpoints_in(output_dir / "checkpoints")) or _holds_final(output_dir)


def _holds_final(output_dir: Path) -> bool:
    return any((output_dir / "final" / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def run_to_overwrite(arguments: Arguments) -> dict[Path, tuple]:
    """What the folder holds of a run that shall be deleted, for `delete_run`; empty if there is none."""
    output_dir = Path(arguments.output.output_dir)
    if arguments.output.resume != "none" or not holds_run(output_dir):
        return {}
    paths = [output_dir / name for name in WRITTEN if name not in SERVICE_FOLDERS]
    paths += [path for name in SERVICE_FOLDERS for path in (output_dir / name).glob("*")]
    return {path: _identity(path) for path in paths if os.path.lexists(path)}


def delete_run(files: dict[Path, tuple]) -> None:
    """Deletes what `run_to_overwrite` found, but not what a service has put in its place since."""
    for path, identity in files.items():
        if os.path.lexists(path) and _identity(path) == identity:
            _delete(path)


def check_space(parts: Parts, checkpoint: Path | None) -> None:
    """
    Raises:
        OSError: the disk has no space for a checkpoint, after what `delete_run` will delete.
    """
    output_dir = Path(parts.arguments.output.output_dir)
    needed = checkpoint_bytes(parts)
    if parts.frozen is not None and not (output_dir / "checkpoints" / FROZEN).is_file():
        needed += sum(tensor.nbytes for tensor in parts.frozen.values())
    model = parts.accelerator.unwrap_model(parts.model)
    if adapted_layers(model) and not shares_base(output_dir / "checkpoints", checkpoint):
        needed += sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    free = shutil.disk_usage(output_dir).free
    if checkpoint is None and parts.arguments.output.resume == "none" and holds_run(output_dir):
        free += sum(_bytes_of(output_dir / name) for name in WRITTEN)
    cached = parts.objective.disk_bytes(output_dir)
    if free < needed + cached:
        beside = f", what teacher_cache lacks {cached / 1e9:.2f} GB" if cached else ""
        raise OSError(
            f"{output_dir}: a checkpoint takes {needed / 1e9:.2f} GB{beside}, and {free / 1e9:.2f} GB are free on "
            "this disk: make space, or choose another --output_dir"
        )


def checkpoint_bytes(parts: Parts) -> int:
    """Size of a checkpoint: weights (of adapters alone), two moments of those that train, and any average of them."""
    model = parts.accelerator.unwrap_model(parts.model)
    copies, adapted = 2 + bool(parts.arguments.optimization.ema_decay), bool(adapted_layers(model))
    return sum(
        parameter.nbytes * (1 + copies * parameter.requires_grad)
        for parameter in model.parameters()
        if parameter.requires_grad or not adapted
    )


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in map(os.stat, files)}.values())


def _identity(path: Path) -> tuple:
    about = path.lstat()
    return about.st_dev, about.st_ino, about.st_mtime_ns


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
