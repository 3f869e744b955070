"""One command in several processes, on one machine or more, which share its pictures and write into one folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from ..files import write_file

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

T = TypeVar("T")

FOLDER = ".processes"  # in the folder that is written, while it is
LONGEST_START = timedelta(hours=2)  # in which the main process may have to download a model
PAUSE = 0.2  # seconds between two looks at what the others have done


@dataclass
class Outcome:
    """
    What became of pictures.

    Args:
        new, before: how many are done now, and were before.
        failures: what is wrong with the others, by their position among all.
    """

    new: int = 0
    before: int = 0
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        self.new, self.before = self.new + other.new, self.before + other.before
        self.failures |= other.failures


class Processes:
    """
    This process among those of a command. They agree on a start, and then never wait for each other but for the main
    one (index 0), which at its end looks for the files with the outcomes of the others, and for their locks: the
    kernel lets go of those when a process ends, however it does.

    Args:
        index, count: of this process, and of all.
        state: Accelerate's `PartialState` if there are more than one.
    """

    def __init__(self, index: int = 0, count: int = 1, state=None):
        self.index, self.count, self._state = index, count, state
        self._lock = None

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """
        Finds the others as `accelerate launch` and `torchrun` tell of them.

        Args:
            device: that the user wants, if any.

        Raises:
            ModuleNotFoundError: there are others, and `accelerate` is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return cls()
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        without_gpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=without_gpu or device == "cpu", timeout=LONGEST_START)
        return cls(state.process_index, state.num_processes, state)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @property
    def device(self) -> torch.device | None:
        """The one of this process; None if it is alone."""
        return None if self._state is None else self._state.device

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """
        A `with` block that the main process goes through first and the others after it, so that what it makes is there
        and its errors are the only ones. At the end all are there, and what connects them is closed.

        Raises:
            OSError: another process has ended.
        """
        if self._state is None:
            yield
            return
        try:
            if not self.is_main:
                self._meet()
            yield
            if self.is_main:
                self._meet()
            self._meet()
        finally:
            self._state.destroy_process_group()

    def _meet(self) -> None:
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:  # of the library that connects them
            raise OSError("another process of this command has ended: its own line says why") from error

    def enter(self, folder: Path) -> None:
        """
        Holds a lock in the folder until this process ends, which the others look at; removes what an earlier command
        left there of its own. To be called within `in_turn`.

        Args:
            folder: that all write into.

        Raises:
            OSError: another command writes into it.
        """
        lock = _lock_of(folder, self.index)
        lock.parent.mkdir(exist_ok=True)
        self._lock = lock.open("a")
        if not _take(self._lock, without_locks=True):
            raise OSError(f"another command writes into {folder}: wait for its end, or choose another --output")
        if self.is_main:
            for path in lock.parent.iterdir():
                if path != lock:
                    path.unlink()

    def share(self, items: Sequence[T]) -> list[T]:
        """Those of this process; each item is in the share of one."""
        return list(items[self.index :: self.count])

    def gather(self, folder: Path, outcome: Outcome) -> Outcome | None:
        """
        Waits in the main process until the shares of all are done.

        Args:
            folder: as in `enter`.
            outcome: of the share of this process.

        Returns:
            That of all shares in the main process, None in the others.

        Raises:
            OSError: a process has ended before its share was done.
        """
        if not self.is_main:
            write_file(_result_of(folder, self.index), json.dumps(vars(outcome)))
            return None
        for index in range(1, self.count):
            _wait_for(folder, index, self.count)
            found = json.loads(_result_of(folder, index).read_text(encoding="utf-8"))
            failures = {int(position): message for position, message in found.pop("failures").items()}
            outcome.add(Outcome(**found, failures=failures))
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        outcome.failures = dict(sorted(outcome.failures.items()))
        return outcome


def _wait_for(folder: Path, index: int, count: int) -> None:
    while not _result_of(folder, index).exists():
        if _is_gone(folder, index) and not _result_of(folder, index).exists():
            raise OSError(
                f"process {index} of {count} (from 0) has ended before its share was done: run the same command "
                "again, which goes on from here"
            )
        time.sleep(PAUSE)


def _is_gone(folder: Path, index: int) -> bool:
    with _lock_of(folder, index).open("a") as file:
        return _take(file, without_locks=False)


def _take(file, without_locks: bool) -> bool:
    """
    Takes the lock of a file, for as long as it is open; whether it was free.

    Args:
        without_locks: what to say where there are no locks.
    """
    if fcntl is None:
        return without_locks
    try:
        # Unlike that of flock, this lock is not handed down to forked processes, and network file systems have it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return without_locks
    return True


def _lock_of(folder: Path, index: int) -> Path:
    return folder / FOLDER / f"{index}.lock"


def _result_of(folder: Path, index: int) -> Path:
    return folder / FOLDER / f"{index}.json"
