"""The `sam3-lite` command: one module in `commands` for each of its subcommands."""

from typing import Annotated

import typer

from .commands.check import check
from .commands.compare import compare
from .commands.convert import convert
from .commands.demo import demo
from .commands.distill_text import distill_text
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.info import info
from .commands.label import label
from .commands.predict import predict
from .commands.push import push
from .commands.track import track
from .commands.train import train
from .version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool):
    if wanted:
        typer.echo(f"sam3-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
):
    """Lite SAM 3 models."""


app.command()(check)
app.command()(compare)
app.command()(convert)
app.command()(demo)
app.command()(distill_text)
app.command()(evaluate)
app.command()(export)
app.command()(info)
app.command()(label)
app.command()(predict)
app.command()(push)
app.command()(track)
# Its flags are those of the trainer, which reads them itself.
app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)(train)

if __name__ == "__main__":  # `accelerate launch -m sam3_hf.cli`
    app()
