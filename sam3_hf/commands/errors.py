"""What went wrong in a command, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from ..errors import one_line


@contextmanager
def one_line_errors(memory_option: str = "--batch-size") -> Iterator[None]:
    """
    Ends the command with status 1 and a line on stderr for the errors that a user can mend.

    Args:
        memory_option: what to pass a smaller number to when the memory of the GPU does not suffice.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        typer.echo(f"Error: {one_line(error, memory_option)}", err=True)
        raise typer.Exit(1) from error
