"""Which pictures files, folders and glob patterns stand for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

READ = (*IMG_EXTENSIONS, ".gif")
# Pictures that nobody expects to be left out without a word: they are found, and then listed as unreadable.
UNREAD = (".avif", ".eps", ".heic", ".heif", ".jp2", ".jxl")


class InputFile(NamedTuple):
    """A picture, and its name in the outputs: relative to the folder that was given, with `/`."""

    path: Path
    name: str


def find_pictures(inputs: list[str], exclude: Path) -> list[InputFile]:
    """
    Whatever is called a picture is found, also what cannot be read as one: broken links, pipes, other formats.

    Args:
        inputs: files, folders (searched to any depth for pictures, by their extension) and glob patterns.
        exclude: a folder whose files are left out, because they are written by ourselves.

    Returns:
        Each picture once, by name.

    Raises:
        ValueError: an input is or matches nothing, or two pictures have the same name.
    """
    exclude = _absolute(exclude)
    pictures: dict[str, Path] = {}
    for given in inputs:
        matches = [given] if os.path.lexists(given) else sorted(glob.glob(given, recursive=True))
        found = [picture for match in matches for picture in _pictures_in(Path(match), exclude)]
        if not found:
            raise ValueError(f"{given}: there is no such file and no picture; folders are searched for {_known()}.")
        for path, name in found:
            other = pictures.setdefault(name, path)
            if other != path:
                raise ValueError(
                    f"{other} and {path} would both be written as {name}: pass their common folder, or predict them "
                    "into separate outputs."
                )
    return [InputFile(path, name) for name, path in sorted(pictures.items())]


def _pictures_in(source: Path, exclude: Path) -> list[InputFile]:
    if not os.path.isdir(source):
        return [InputFile(_absolute(source), source.name)]
    pictures = [InputFile(_absolute(path), path.relative_to(source).as_posix()) for path in _files_in(source)]
    return [picture for picture in pictures if not picture.path.is_relative_to(exclude)]


def _files_in(folder: Path) -> Iterator[Path]:
    """Pictures at any depth by their extension, and folders that cannot be opened."""
    closed: list[Path] = []
    for parent, _, names in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        yield from (Path(parent, name) for name in names if os.path.splitext(name)[1].lower() in (*READ, *UNREAD))
    yield from closed


def _absolute(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises for links in a loop


def _known() -> str:
    return ", ".join(READ)
