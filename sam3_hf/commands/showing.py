"""Pictures in the viewer of the desktop."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import typer

MOST_SHOWN = 10  # windows
WITHOUT = "leave --show out, and look at what --overlays writes."


def check_viewer() -> None:
    """
    Raises:
        OSError: there is no display, or nothing that opens files on it.
    """
    if sys.platform in ("darwin", "win32", "cygwin"):
        return
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise OSError(f"--show needs a display, and DISPLAY and WAYLAND_DISPLAY are not set: {WITHOUT}")
    if shutil.which("xdg-open") is None:
        raise OSError(f"--show needs xdg-open, which is not installed: install xdg-utils, or {WITHOUT}")


def open_pictures(paths: list[Path]) -> None:
    """
    Opens the first of those files that exist, and says how many are left.

    Raises:
        OSError: the viewer cannot be started.
    """
    paths = [path.absolute() for path in paths if path.is_file()]
    for path in paths[:MOST_SHOWN]:
        if typer.launch(str(path)) != 0:
            raise OSError(f"{path} cannot be shown, no program opens it: {WITHOUT}")
    if len(paths) > MOST_SHOWN:
        typer.echo(f"Shown are the first {MOST_SHOWN} of {len(paths)} pictures, all are in {paths[0].parent}.")
