"""The end of a run by an error: one line for the user, the traceback for the log."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from ..errors import one_line
from ..launcher import under_launcher
from .lock import FolderInUse

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # what torchrun, and with it accelerate launch, shows as the cause of a failure


def report(error: Exception, folder: Path | None) -> None:
    """
    Writes the line to stderr, and the traceback to logs/train.log.

    Args:
        folder: of the run, if that is known already.
    """
    ours = folder is not None and not isinstance(error, FolderInUse)
    log = _keep_traceback(error, folder / "logs" / "train.log") if ours else None
    if _follows_another(error):
        line = f"another process of this run has ended, its own line says why ({one_line(error)})"
    else:
        line = one_line(error)
        _tell_launcher(f"Error: {line}")
    where = "" if log is None else f" (traceback: {log})"
    around = "\n" if under_launcher() else ""  # stands out from what the launcher writes
    sys.stderr.write(f"{around}Error: {line}{where}\n{around}")
    sys.stderr.flush()


def _keep_traceback(error: Exception, log: Path) -> Path | None:
    text = "".join(traceback.format_exception(error))
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"process {os.environ.get('RANK', 0)} failed:\n{text}")
    except OSError:  # no run yet, or no space
        return None
    return log


def _follows_another(error: Exception) -> bool:
    """Whether it says only that a process at the other end of an exchange is gone."""
    if isinstance(error, torch.distributed.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _tell_launcher(line: str) -> None:
    path = os.environ.get(ERROR_FILE)
    if path:
        about = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        try:
            Path(path).write_text(json.dumps({"message": about}), encoding="utf-8")
        except OSError:
            pass  # the line is on stderr anyway
