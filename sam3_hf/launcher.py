"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch and torchrun set them


def end_with_launcher() -> None:
    """
    Asks the kernel for a SIGTERM when the launcher ends: one that is killed alone would leave the command to go on
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
