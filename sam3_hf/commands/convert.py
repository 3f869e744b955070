"""`sam3-lite convert`: a lite model from any SAM 3 checkpoint, or the same model in another precision."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoints import open_checkpoint
from ..errors import model_errors
from ..mapping import STRATEGIES
from ..mapping.calibration import calibrate_mapping
from ..modeling_sam3_lite import Sam3LiteModel
from ..phrases import read_phrases
from ..precision_sam3_lite import precision_name
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sharing.model_card import origin_of, versions
from ..sources_sam3_lite import is_training_checkpoint
from .errors import one_line_errors
from .writing import check_target, write_model


def convert(
    source: Annotated[
        str, typer.Argument(help="Hub id, folder, Meta's .pt file, or checkpoint folder of a training run.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help="Sizes, or `same`. Default: `lite`, for a lite source `same`.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: that of the source.")] = None,
    mapping: Annotated[str, typer.Option(help="auto, isometry, select or skip.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Take words from this model, of any of these kinds, instead of the source.")
    ] = None,
    text_hidden_size: Annotated[
        int | None, typer.Option(help="Width of a smaller text encoder, a multiple of its head size, 64.")
    ] = None,
    text_num_hidden_layers: Annotated[int | None, typer.Option(help="Layers of a smaller text encoder.")] = None,
    text_phrases: Annotated[
        Path | None,
        typer.Option(help="Text file, one phrase a line, to fit it to. Default: some thousand everyday ones."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the source on the Hub.")] = "main",
    calibration_images: Annotated[
        str | None,
        typer.Option(help="Folder of unlabelled images to fit the smaller model to, or `generated` for drawn ones."),
    ] = None,
    calibration_prompt: Annotated[
        list[str] | None, typer.Option(help="Phrase to ask on those images; repeat it for each of your classes.")
    ] = None,
    num_calibration_images: Annotated[
        int | None, typer.Option(min=1, help="How many to use at most. Default: as many as the sizes need.")
    ] = None,
    search_depth: Annotated[
        bool, typer.Option(help="Try which ViT layers to keep. Takes one fit of the ViT per choice.")
    ] = True,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a training checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Print what became of every tensor.")] = False,
):
    """
    Writes a lite model, with its processor, from any SAM 3 checkpoint; or the same model in another precision, or
    without what a training checkpoint holds beside its weights.
    """
    if calibration_images is None and (calibration_prompt or num_calibration_images or not search_depth):
        raise typer.BadParameter("the options of calibration need --calibration-images DIR (or `generated`)")
    if calibration_images is not None and mapping != "auto":
        raise typer.BadParameter("--mapping and --calibration-images exclude each other")
    where = {"revision": revision, "variant": "ema" if ema else None, "text_encoder": text_encoder}
    sizes = {
        "image_size": image_size,
        "text_hidden_size": text_hidden_size,
        "text_num_hidden_layers": text_num_hidden_layers,
    }
    wanted = {"preset": preset, "dtype": dtype, **{name: size for name, size in sizes.items() if size is not None}}
    with one_line_errors(memory_option="--num-calibration-images"):
        if mapping not in STRATEGIES:
            raise ValueError(f"--mapping {mapping} is none of {', '.join(STRATEGIES)}.")
        check_target(target, overwrite)
        if ema and not is_training_checkpoint(source):
            raise ValueError(
                f"{source} is no checkpoint folder of a training run: only those have averaged weights (--ema)."
            )
        wanted["text_phrases"] = None if text_phrases is None else read_phrases(text_phrases)
        if calibration_images is None:
            with model_errors(source):
                model = Sam3LiteModel.from_pretrained(source, mapping=mapping, **wanted, **where)
        else:
            model = calibrate_mapping(
                source,
                None if calibration_images == "generated" else calibration_images,
                prompts=calibration_prompt,
                num_images=num_calibration_images,
                search_depth=search_depth,
                device="cuda" if torch.cuda.is_available() else "cpu",
                **wanted,
                **where,
            ).cpu()
        before = _before(source, where)
        if text_encoder is None:
            processor = Sam3LiteProcessor.of_source(source, model.config, revision=revision)
        else:
            processor = Sam3LiteProcessor.of_source(text_encoder, model.config)
        origin = origin_of(source, text_encoder, revision=revision)
        write_model(model, processor, target, {"origin": asdict(origin), "versions": versions()})
    if report and model.mapping_report is not None:
        typer.echo(str(model.mapping_report))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(
        f"{target}: {parameters / 1e6:.1f}M parameters in {precision_name(model.dtype)}, "
        f"{open_checkpoint(target).size / 1e6:.1f} MB ({before})"
    )


def _before(source: str, where: dict) -> str:
    """The size of the files that a source was read from, also in the cache of the Hub, and of what was left behind."""
    weights = open_checkpoint(source, **where).size
    text = f"source: {weights / 1e6:.1f} MB"
    if is_training_checkpoint(source):
        files = [*Path(source).glob("*.safetensors"), *Path(source).glob("*.pt")]
        everything = sum(path.stat().st_size for path in files)
        text += f" of weights, {(everything - weights) / 1e6:.1f} MB of training state left behind"
    return text
