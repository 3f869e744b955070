"""`sam3-lite predict`: finds what prompts name in files, folders and globs of pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..launcher import end_with_launcher
from ..picture_files import find_pictures
from ..plain_text import plain
from ..precision_sam3_lite import precision_name
from ..prediction.output_folder import Contents, PredictionFolder
from ..prediction.pipeline import PredictionSettings, Prompt
from ..prediction.processes import Processes
from ..prediction.run import fingerprint, predict_files
from ..reading import MAX_PIXELS
from ..visualization import score_text
from .errors import list_failures, one_line_errors
from .opening import open_pipeline
from .options import (
    BatchSize,
    Device,
    Dtype,
    Inputs,
    MaskThreshold,
    MaxDetections,
    MaxPixels,
    Model,
    NmsIou,
    Overlays,
    Prompts,
    Revision,
    Threshold,
    TileOverlap,
    TileSize,
    Workers,
)
from .showing import check_viewer, open_pictures

LISTED = 10  # prompts, and pictures, that are named


def predict(
    inputs: Inputs,
    model: Model,
    prompt: Prompts,
    output: Annotated[Path, typer.Option(help="Folder to write, or to complete.")],
    overlays: Overlays = False,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the overlays, and open the first 10 of them in the picture viewer.")
    ] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Write a PNG for each mask.")] = False,
    threshold: Threshold = 0.3,
    mask_threshold: MaskThreshold = 0.5,
    max_detections: MaxDetections = None,
    nms_iou: NmsIou = PredictionSettings.nms_iou,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    batch_size: BatchSize = 4,
    workers: Workers = 2,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = "main",
):
    """
    Finds what the prompts name, and writes a JSON file per picture and COCO results. The same command goes on where an
    earlier one stopped. Computes in FP16 on a GPU, in float32 on a CPU. `accelerate launch -m sam3_hf.cli predict ...`
    shares the pictures over several GPUs.
    """
    end_with_launcher()
    with one_line_errors(task="sharing pictures over processes"):
        processes = Processes.join(device)
        with processes.in_turn():
            if show:
                check_viewer()
            settings = PredictionSettings(threshold, mask_threshold, max_detections, nms_iou, tile_size, tile_overlap)
            words = list(dict.fromkeys(prompt))
            prompts = [Prompt(text) for text in words]  # an empty prompt is an error before anything is written
            pictures = find_pictures(inputs, exclude=output)
            pipe, text = open_pipeline(
                model, words, processes, masks=masks, device=device, dtype=dtype, revision=revision
            )
            record = {
                "model": model,
                "weights": fingerprint(pipe.model),
                "dtype": precision_name(pipe.model.dtype),
                "prompts": words,
                **asdict(settings),
            }
            folder = PredictionFolder(output, record, overlays or show, masks)
            processes.enter(output)
        outcome = predict_files(
            pipe,
            pictures,
            folder,
            processes,
            prompts=prompts,
            text=text,
            settings=settings,
            max_pixels=max_pixels,
            batch_size=batch_size,
            workers=workers,
        )
        outcome = processes.gather(output, outcome)
        if outcome is None:
            return
        contents = folder.write_coco()
    typer.echo(
        f"{output}: {contents.detections} detections in {contents.images} pictures; {outcome.new} pictures were new, "
        f"{outcome.before} done before."
    )
    for line in missed(contents, threshold):
        typer.echo(line)
    if show:
        with one_line_errors():
            open_pictures([folder.overlay_of(picture) for picture in pictures])
    failures = list(outcome.failures.values())
    list_failures(f"{len(failures)} could not be read or written:", failures)
    list_failures(f"{len(contents.broken)} earlier predictions are broken and left out:", contents.broken)
    if failures or contents.broken:
        raise typer.Exit(1)


def missed(contents: Contents, threshold: float) -> list[str]:
    """For prompts of which nothing was found, and for pictures in which nothing was, the best score below."""
    start, lines = f"Nothing above --threshold {threshold:g}", []
    prompts = {prompt: best for prompt, best in contents.missed.items() if best is not None}
    for prompt, (score, name) in list(prompts.items())[:LISTED]:
        lines.append(f"{start} for {plain(prompt)!r}: the best score is {score_text(score)}, in {plain(name)}.")
    if len(prompts) > LISTED:
        lines.append(f"{start} for {len(prompts) - LISTED} more prompts.")
    if 0 < len(contents.empty) < contents.images:
        best_first = sorted(contents.empty.items(), key=lambda entry: -entry[1][0])
        listed = [
            f"{plain(name)} {score_text(score)} ({plain(label)})" for name, (score, label) in best_first[:LISTED]
        ]
        listed += [f"and {len(best_first) - LISTED} more"] if len(best_first) > LISTED else []
        lines.append(f"{start} in {len(best_first)} pictures; their best scores: {', '.join(listed)}.")
    return lines
