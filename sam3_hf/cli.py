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

# without Rich, whose tables cut the names of long options short where a terminal has 80 columns
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


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


for command, short_help in {
    check: "What a dataset is, and whether training takes it.",
    compare: "Two models side by side on the same data.",
    convert: "A lite model from any SAM 3 checkpoint.",
    demo: "A page in the browser to try a model on.",
    distill_text: "A text encoder that learns from a larger one.",
    evaluate: "The scores of training, for any model and split.",
    export: "A model as graphs for ONNX Runtime, OpenVINO or TensorRT.",
    info: "What a model consists of, and what it costs to run.",
    label: "A dataset to train on, from pictures and a model.",
    predict: "Finds what prompts name in pictures.",
    push: "A saved or exported model to the Hub, in one commit.",
    track: "Follows what prompts name through a film.",
}.items():
    app.command(short_help=short_help)(command)
# Its flags are those of the trainer, which reads them itself.
app.command(
    short_help="Trains a model; `train --help` lists all settings.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)(train)

if __name__ == "__main__":  # `accelerate launch -m sam3_hf.cli`
    app()
