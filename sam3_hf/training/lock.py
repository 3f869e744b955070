"""One run at a time in an output folder."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"


class FolderInUse(RuntimeError):
    """Another run writes to the output folder."""


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """
    Makes the output folder and holds its lock for the time of a `with` block. The kernel lets go of it when the
    process ends, however it does, and network file systems do so for processes of other machines. Data workers do not
    hold it. Where there are no locks, that is logged.

    Raises:
        FolderInUse: another run holds it; says which.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        _acquire(file, folder)
        file.seek(0)
        file.truncate()
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield


def _acquire(file, folder: Path) -> None:
    if fcntl is None:
        logger.warning("no file locks on this system: take care that no other run writes to %s", folder)
        return
    try:
        # Unlike that of flock, this lock is not handed down to forked processes, which may outlive the run a little.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise FolderInUse(
            f"{folder} is in use by another run ({_holder(file)}): wait for its end, stop it, or choose another "
            "--output_dir"
        ) from None
    except OSError as error:
        logger.warning(
            "the file system of %s has no locks (%s): take care that no other run writes there", folder, error.strerror
        )


def _holder(file) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "which is just starting"
