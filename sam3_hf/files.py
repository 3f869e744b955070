"""Files and folders that appear whole or not at all: they are written beside their name, then renamed to it."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

logger = logging.getLogger(__name__)


def write_file(path: Path, content: str | bytes | Callable[[Path], object], mark: str | None = None) -> None:
    """
    Writes a file, instead of an older one of that name; its folder is made where missing.

    Args:
        content: text (written as UTF-8), bytes, or what writes the file that it is called with, whose name has another
            ending than `path`. If it raises, the older file stays.
        mark: of this process, if others may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path) if mark is None else _beside(path, f"{mark}.partial")
    partial.unlink(missing_ok=True)  # it may have a second name, as the files of a checkpoint do
    try:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """
    Calls `write` with an empty folder to fill, then renames that to `target`, instead of an older one. If it raises,
    the older one stays.

    Raises:
        NotADirectoryError: `target` is a file.
    """
    target = target.resolve()  # a link stays one
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder")
    partial = start_folder(target)
    try:
        write(partial)
        put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_folder(source: Path, target: Path) -> None:
    """A second name for a folder. Files are hard links where the file system has them: no time, no space."""
    write_folder(target, lambda partial: shutil.copytree(source, partial, copy_function=link, dirs_exist_ok=True))


def start_folder(target: Path) -> Path:
    """Makes the empty folder that `put_in_place` renames to `target` when it is filled; `partial_of(target)`."""
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, target: Path) -> None:
    """Renames a complete folder to its name. A kill in between leaves the old one, which `recover` gives its name."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    previous = _beside(target, "previous")
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    try:
        os.rename(partial, target)
    except OSError:
        if previous.exists():
            os.rename(previous, target)
        raise
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> None:
    """Undoes replacements that a kill interrupted, and deletes what was half written: all in a folder, or `name`."""
    pattern = "*" if name is None else glob.escape(name)
    for previous in folder.glob(f".{pattern}.previous"):
        target = folder / previous.name[1 : -len(".previous")]
        if target.exists():
            shutil.rmtree(previous)
        else:
            logger.warning("%s was being replaced when the last run ended; going back to the one before", target)
            os.rename(previous, target)
    for partial in folder.glob(f".{pattern}.partial"):
        logger.warning("removing %s, which the last run did not finish writing", partial)
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def partial_of(path: Path) -> Path:
    """The name under which a file or folder is written."""
    return _beside(path, "partial")


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:  # or across two file systems
        shutil.copy2(source, target)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}"


def asset_lines(name: str) -> tuple[str, ...]:
    """The lines of a text file in the package's `assets`."""
    text = resources.files("sam3_hf").joinpath("assets", name).read_text(encoding="utf-8")
    return tuple(text.splitlines())
