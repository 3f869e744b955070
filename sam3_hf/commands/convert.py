"""`sam3-lite convert`: a lite model from any SAM 3 checkpoint, or the same model in another precision."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..conversion_sam3_lite import open_checkpoint
from ..model_card import origin_of, versions, write_card
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor


def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder, or Meta's .pt file.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help="Sizes, or `same`. Default: `lite`, for a lite source `same`.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="E.g. float16. Default: that of the source.")] = None,
    mapping: Annotated[str, typer.Option(help="auto, isometry, select or skip.")] = "auto",
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the source on the Hub.")] = "main",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Print what became of every tensor.")] = False,
):
    """Writes a lite model, with its processor, from any SAM 3 checkpoint; or the same model in another precision."""
    try:
        _convert(source, target, preset, dtype, mapping, image_size, revision, overwrite, report)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _convert(source, target, preset, dtype, mapping, image_size, revision, overwrite, report):
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass --overwrite.")
    fields = {} if image_size is None else {"image_size": image_size}
    model = Sam3LiteModel.from_pretrained(
        source, preset=preset, dtype=dtype, mapping=mapping, revision=revision, **fields
    )
    # Complete beside its place before the old folder goes.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(partial)
    write_card(partial, {"origin": asdict(origin_of(source, revision=revision)), "versions": versions()})
    _verify(model, partial)
    if target.is_dir():
        shutil.rmtree(target)
    partial.rename(target)
    if report and model.mapping_report is not None:
        typer.echo(str(model.mapping_report))
    before = _size(Path(source))
    typer.echo(
        f"{target}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters in {model.dtype}, "
        f"{_size(target) / 1e6:.1f} MB" + (f" (source: {before / 1e6:.1f} MB)" if before else "")
    )


def _verify(model: Sam3LiteModel, folder: Path):
    """Compares the files with the model, tensor by tensor."""
    written = open_checkpoint(folder)
    for name, tensor in model.state_dict().items():
        if name not in written or not torch.equal(written.read(name), tensor):
            raise OSError(f"{folder}: `{name}` was not written as it is in memory; is the disk full?")


def _size(path: Path) -> int:
    """Bytes of the weights at a local path, 0 if there is none."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.pt")]
    return sum(file.stat().st_size for file in files)
