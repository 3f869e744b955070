"""The `sam3-lite` command: one module in `commands` for each of its subcommands."""

import typer

from .commands.convert import convert
from .commands.evaluate import evaluate
from .commands.info import info
from .commands.predict import predict
from .commands.push import push

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main():
    """Lite SAM 3 models."""


app.command()(convert)
app.command()(evaluate)
app.command()(info)
app.command()(predict)
app.command()(push)
