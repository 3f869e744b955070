"""`sam3-lite export`: a model as graphs for ONNX Runtime, OpenVINO or TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import model_errors
from ..files import recover
from ..precision_sam3_lite import precision_name
from .errors import one_line_errors


def export(
    model: Annotated[str, typer.Argument(help="Hub id, folder (also of graphs for onnx in fp32), or .pt of Meta's.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[Literal["onnx", "openvino"], typer.Option(help="For which runtime.")] = "onnx",
    precision: Annotated[
        str,
        typer.Option(help="fp32, fp16, int8-weights (computes in float), or int8 (needs --calibration-images)."),
    ] = "fp32",
    image_size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels. Default: the model's.")
    ] = None,
    calibration_images: Annotated[
        Path | None, typer.Option(help="Folder of pictures like yours, to which int8 fits its ranges.")
    ] = None,
    calibration_prompt: Annotated[
        list[str] | None, typer.Option(help="Phrase to ask on them; repeat it. Default: the vocabulary of the model.")
    ] = None,
    num_calibration_images: Annotated[int, typer.Option(min=1, help="How many to use at most.")] = 16,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = "main",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
):
    """
    Writes a model as graphs that run without PyTorch, with its tokenizer and a JSON of all that a program needs. The
    folder is a model for `predict`, `evaluate`, `compare`, `label`, `demo` and `info`.
    """
    if calibration_prompt and calibration_images is None:
        raise typer.BadParameter("--calibration-prompt needs --calibration-images DIR")
    with one_line_errors(memory_option="--num-calibration-images"):
        from ..exporting.calibration import Calibration
        from ..exporting.export import export_model
        from ..exporting.folder import read_export

        recover(output.parent, output.name)
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: choose another folder, or pass --overwrite.")
        pictures = None
        if calibration_images is not None:
            pictures = Calibration(calibration_images, calibration_prompt or [], num_calibration_images)
        with model_errors(model):
            export_model(
                model,
                output,
                format=format,
                precision=precision,
                image_size=image_size,
                calibration=pictures,
                revision=revision,
            )
        size = sum(file["bytes"] for file in read_export(output).facts["files"].values())
    typer.echo(f"{output}: {format}, {precision_name(precision)}, {size / 1e6:.1f} MB")
