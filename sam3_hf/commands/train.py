"""`sam3-lite train`: the trainer, where the package is installed without its repository."""

from __future__ import annotations

import typer


def train(context: typer.Context):
    """Trains on a COCO dataset, in one process: `[CONFIG.yaml] [--flag value ...]`; `--help` lists all settings."""
    from ..training.main import main

    raise typer.Exit(main(context.args, command="sam3-lite train"))
