"""Ctrl-C and SIGTERM end the run after the current step."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator  # which may be missing when that is to be said

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch and torchrun set them


def leave_signals_to_the_parent(worker_id: int) -> None:
    """
    `worker_init_fn` of data loaders: what stops the run must not stop its workers before the step is finished. They
    end when the run closes its loaders, or is no more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal_at_end_of_parent("SIGKILL")


def end_with_launcher() -> None:
    """
    Asks the kernel for a SIGTERM when the launcher ends: one that is killed alone would leave the run to go on
    unnoticed. Without a launcher nothing is asked for, as the parent is then a shell, which may well end before.
    Only Linux has this; elsewhere, signal the whole process group.
    """
    if under_launcher():
        signal_at_end_of_parent("SIGTERM")


def under_launcher() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def signal_at_end_of_parent(name: str) -> None:
    """Asks the kernel, where it is Linux, to send this process a signal when the one that started it ends."""
    if sys.platform != "linux":
        return
    zero = ctypes.c_ulong(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.Signals[name]), zero, zero, zero) != 0:
        reason = os.strerror(ctypes.get_errno())
        logger.warning("this process will not end by itself when the one that started it does: %s", reason)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process; called by all of them."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


class StopSignal:
    """
    Remembers the first SIGINT or SIGTERM in `received`; a second SIGINT interrupts at once.

    A terminal sends Ctrl-C to all processes of a launch and launchers pass it on, so one key press can arrive twice:
    signals within two seconds of the first count as the same.
    """

    def __init__(self):
        self.received: int | None = None
        self._time = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self._time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._time > 2:
            raise KeyboardInterrupt
