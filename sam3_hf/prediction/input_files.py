"""Which pictures files, folders and glob patterns stand for."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS


class InputFile(NamedTuple):
    """A picture, and its name in the outputs: relative to the folder that was given, with `/`."""

    path: Path
    name: str


def find_pictures(inputs: list[str], exclude: Path) -> list[InputFile]:
    """
    Args:
        inputs: files, folders (searched to any depth for pictures, by their extension) and glob patterns.
        exclude: a folder whose files are left out, because they are written by ourselves.

    Returns:
        Each picture once, by name.

    Raises:
        ValueError: an input is or matches nothing, or two pictures have the same name.
    """
    exclude = exclude.resolve()
    pictures: dict[str, Path] = {}
    for given in inputs:
        matches = [given] if Path(given).exists() else sorted(glob.glob(given, recursive=True))
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
    if not source.is_dir():
        return [InputFile(source.resolve(), source.name)]
    paths = (path for path in source.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    pictures = [InputFile(path.resolve(), path.relative_to(source).as_posix()) for path in paths]
    return [picture for picture in pictures if not picture.path.is_relative_to(exclude)]


def _known() -> str:
    return ", ".join(IMG_EXTENSIONS)
