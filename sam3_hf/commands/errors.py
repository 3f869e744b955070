"""What went wrong in a command, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from ..errors import joined, one_line


@contextmanager
def one_line_errors(memory_option: str = "--batch-size", task: str | None = None) -> Iterator[None]:
    """
    Ends the command with status 1 and a line on stderr for the errors that a user can mend.

    Args:
        memory_option: what to pass a smaller number to when the memory of the GPU does not suffice.
        task: what libraries of the extra `train` are needed for, where one may be missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if task is None:
            raise
        typer.echo(f"Error: {error.name} is not installed; {task} needs sam3-hf[train].", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        typer.echo(f"Error: {one_line(error, memory_option)}", err=True)
        raise typer.Exit(1) from error


def list_failures(title: str, messages: list[str]) -> None:
    """Writes messages to stderr, each on a line below their title; nothing if there are none."""
    for line in [title, *(f"  {joined(message)}" for message in messages)] if messages else []:
        typer.echo(line, err=True)
