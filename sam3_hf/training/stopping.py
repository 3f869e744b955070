"""Ctrl-C and SIGTERM end the run after the current step."""

import ctypes
import logging
import os
import signal
import sys
import time

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch and torchrun set them


def leave_signals_to_the_parent(worker_id: int) -> None:
    """`worker_init_fn` of data loaders: what stops the run must not stop its workers before the step is finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_with_launcher() -> None:
    """
    Asks the kernel for a SIGTERM when the launcher ends: one that is killed alone would leave the run to go on
    unnoticed. Without a launcher nothing is asked for, as the parent is then a shell, which may well end before.
    Only Linux has this; elsewhere, signal the whole process group.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return
    zero = ctypes.c_ulong(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), zero, zero, zero) != 0:
        reason = os.strerror(ctypes.get_errno())
        logger.warning("the run will not stop by itself when its launcher is killed: %s", reason)


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
