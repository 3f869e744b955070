"""What went wrong in a command, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer


@contextmanager
def one_line_errors(memory_option: str = "--batch-size") -> Iterator[None]:
    """
    Ends the command with status 1 and a line on stderr for the errors that a user can mend.

    Args:
        memory_option: what to pass a smaller number to when the memory of the GPU does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        typer.echo(f"Error: the memory of the GPU does not suffice: pass a smaller {memory_option}.", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {on_one_line(str(error)) or type(error).__name__}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def model_errors(source: str) -> Iterator[None]:
    """Raises a ValueError that names the model, of whatever error the files of a damaged or foreign one lead to."""
    try:
        yield
    except (ValueError, OSError, ImportError, AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} cannot be loaded, a file of it is damaged or no model's: {reason}") from error


def on_one_line(text: str) -> str:
    """A message without line breaks, and with the control characters that file names may hold written as escapes."""
    words = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
