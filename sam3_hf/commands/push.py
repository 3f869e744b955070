"""`sam3-lite push`: a saved or exported model to the Hub, in one commit."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import model_errors
from ..exporting.folder import is_export
from ..exporting.push import push_export
from ..sharing.hub import push_folder
from .errors import one_line_errors


class Approval(str, Enum):
    """How requests for a gated repository are answered."""

    auto = "auto"
    manual = "manual"


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the model: final/ of a training run, or of `export`.")],
    repo: Annotated[str, typer.Argument(help="owner/name of the repository; created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    gated: Annotated[Approval | None, typer.Option(help="Who wants the weights has to ask for them.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, created if there is none. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
):
    """
    Pushes weights, or the graphs of `export`, with processor, configuration, reports, metrics and model card to the
    Hub in one commit.
    """
    approval = None if gated is None else gated.value
    with one_line_errors(), model_errors(str(folder)):
        send = push_export if folder.is_dir() and is_export(folder) else push_folder
        commit = send(folder, repo, private=private, gated=approval, revision=revision, commit_message=message)
    typer.echo(commit.commit_url)
