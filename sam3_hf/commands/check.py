"""`sam3-lite check`: what a dataset is, and whether training takes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..files import write_file
from .errors import one_line_errors


def check(
    data: Annotated[str, typer.Argument(help="Dataset as in training: folder, data.yaml, COCO file, Hub repository.")],
    image_folder: Annotated[Path | None, typer.Option(help="Where the file names of a COCO file start.")] = None,
    category_map: Annotated[Path | None, typer.Option(help="YAML file that renames categories into phrases.")] = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="PNG to write: pictures with their objects.")] = None,
):
    """
    Shows format, splits, objects per class and picture, and sizes of a dataset, and its faults. The exit code is 1
    where training would refuse it. Nothing is written into the dataset.
    """
    with one_line_errors(task="checking a dataset"):
        from ..data.survey import as_text, draw_survey, survey

        found = survey(data, image_folder, category_map)
    typer.echo(as_text(found))
    if contact_sheet is not None:
        with one_line_errors():
            sheet = draw_survey(found)
            write_file(contact_sheet, partial(sheet.save, format="PNG"))
    if found.fault is not None:
        raise typer.Exit(1)
