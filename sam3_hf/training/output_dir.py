"""The output folder before the first step: what it holds already, and where the run goes on from."""

import shutil
from pathlib import Path

from accelerate import Accelerator

from ..files import recover
from ..mapping import REPORT_FILE
from .arguments import Arguments
from .checkpoints import STATE, read_state

# What a run leaves in its folder, but for the log; --overwrite_output_dir deletes these and nothing else.
WRITTEN = ("checkpoints", "final", "metrics.jsonl", "predictions", "tensorboard", "curves.png", REPORT_FILE)


def open_output_dir(accelerator: Accelerator, arguments: Arguments) -> Path | None:
    """
    Prepares the output folder; returns the checkpoint to resume from, or None for a fresh start.

    Raises:
        FileExistsError: the folder holds a run, and it was not said what to do with it.
        FileNotFoundError: the checkpoint to resume from does not exist.
    """
    output_dir, resume = Path(arguments.output.output_dir), arguments.output.resume
    last = output_dir / "checkpoints" / "last"
    if accelerator.is_main_process:
        recover(output_dir, "final")
        recover(last.parent)
    accelerator.wait_for_everyone()
    holds_run = (last / STATE).is_file() or (output_dir / "final" / "config.json").is_file()
    if resume == "none" and holds_run and not arguments.output.overwrite_output_dir:
        raise FileExistsError(
            f"{output_dir} already holds a run: add --resume auto to go on with it, --overwrite_output_dir to delete "
            "it, or choose another --output_dir"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and holds_run and resume == "none":
        for name in WRITTEN:
            _delete(output_dir / name)
    accelerator.wait_for_everyone()
    if resume == "none":
        return None
    if resume == "auto":
        return last if last.is_dir() else None
    read_state(Path(resume))
    return Path(resume)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
