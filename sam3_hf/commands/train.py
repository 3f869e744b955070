"""`sam3-lite train`: the trainer, where the package is installed without its repository."""

from __future__ import annotations

import typer

from .errors import one_line_errors


def train(context: typer.Context):
    """Trains on a COCO dataset, in one process: `[CONFIG.yaml] [--flag value ...]`; `--help` lists all settings."""
    try:
        from ..training.main import main
    except ModuleNotFoundError as error:
        typer.echo(f'Error: {error.name} is not installed; training needs pip install "sam3-hf[train]".', err=True)
        raise typer.Exit(1) from error
    with one_line_errors(memory_option="--batch_size"):
        status = main(context.args, command="sam3-lite train")
    raise typer.Exit(status)
