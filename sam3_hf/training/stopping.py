"""Ctrl-C and SIGTERM end the run after the current step."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import torch

from ..launcher import signal_at_end_of_parent

if TYPE_CHECKING:
    from accelerate import Accelerator  # which may be missing when that is to be said


def leave_signals_to_the_parent(worker_id: int) -> None:
    """
    `worker_init_fn` of data loaders: what stops the run must not stop its workers before the step is finished. They
    end when the run closes its loaders, or is no more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal_at_end_of_parent("SIGKILL")


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
