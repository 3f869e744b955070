"""`sam3-lite track`: follows what prompts name through a film."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..plain_text import plain
from ..precision_sam3_lite import precision_name
from ..prediction.pipeline import PredictionSettings, Prompt
from ..prediction.processes import Processes
from ..prediction.run import fingerprint
from ..tracking.films import open_source
from ..tracking.output import Followed, TrackFolder
from ..tracking.run import Span
from ..tracking.run import track as follow
from ..tracking.tracker import TrackingSettings, check_tracker
from ..visualization import score_text
from .errors import list_failures, one_line_errors
from .opening import open_pipeline
from .options import Device, Dtype, MaskThreshold, NmsIou, Prompts, Revision


def track(
    source: Annotated[str, typer.Argument(help="A film, a folder of frames, or the number of a camera.")],
    prompt: Prompts,
    output: Annotated[Path, typer.Option(help="Folder to write, or to complete.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model with its processor, or a .pt of Meta's. Needed.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Sizes that a standard checkpoint is mapped to, such as lite-plus.")
    ] = "same",
    masks: Annotated[bool, typer.Option("--masks", help="Write a PNG of ids for each frame.")] = False,
    threshold: Annotated[float, typer.Option(help="Lowest score to begin a track with.")] = TrackingSettings.threshold,
    low_threshold: Annotated[
        float, typer.Option(help="Lowest score to go on with a track.")
    ] = TrackingSettings.low_threshold,
    mask_threshold: MaskThreshold = 0.5,
    nms_iou: NmsIou = PredictionSettings.nms_iou,
    every: Annotated[int, typer.Option(min=1, help="Look at one frame of so many.")] = 1,
    start: Annotated[int, typer.Option(min=0, help="Number of the first frame, from 0.")] = 0,
    end: Annotated[int | None, typer.Option(min=1, help="Number of the frame to stop before.")] = None,
    max_objects: Annotated[
        int | None, typer.Option(min=1, help="Follow the best so many of a frame. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames at once.")] = 4,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = "main",
):
    """
    Follows what the prompts name through a film, by detection in each frame and ByteTrack: writes ids, boxes and masks
    as JSON and as MOT text, and a film with them drawn in. The same command goes on where an earlier one stopped. A
    camera is followed until Ctrl-C or --end. Computes in FP16 on a GPU, in float32 on a CPU.
    """
    with one_line_errors():
        if model is None:
            raise ValueError(
                "--model is missing: give a fine-tuned model, as --model runs/final, or a standard checkpoint and the "
                "sizes to map it to, as --model facebook/sam3 --preset lite-plus."
            )
        check_tracker()
        tracking = TrackingSettings(threshold, low_threshold)
        settings = PredictionSettings(low_threshold, mask_threshold, max_objects, nms_iou)
        span = Span(start, end, every)
        if end is not None and end <= start:
            raise ValueError(f"--end {end} must be above --start {start}.")
        words = list(dict.fromkeys(prompt))
        prompts = [Prompt(text) for text in words]
        film = open_source(source, exclude=output)
        pipe, text = open_pipeline(
            model,
            words,
            Processes(),
            masks=masks,
            device=device,
            dtype=dtype,
            revision=revision,
            preset=preset,
        )
        record = {
            "model": model,
            "source": film.record,
            "weights": fingerprint(pipe.model),
            "dtype": precision_name(pipe.model.dtype),
            "prompts": words,
            **asdict(tracking),
            **span._asdict(),
            "mask_threshold": mask_threshold,
            "nms_iou": nms_iou,
            "max_objects": max_objects,
        }
        folder = TrackFolder(output, record, masks=masks, live=film.live)
        followed = follow(
            pipe,
            film,
            folder,
            prompts=prompts,
            text=text,
            settings=settings,
            tracking=tracking,
            span=span,
            batch_size=batch_size,
        )
    say(output, words, followed, threshold)
    list_failures("Not all could be read:", film.faults)
    if film.faults:
        raise typer.Exit(1)


def say(output: Path, words: list[str], followed: Followed, threshold: float) -> None:
    """What was followed, and the best score of what was not."""
    counts = ", ".join(f"{len(followed.objects.get(word, ()))} {plain(word)}" for word in words)
    typer.echo(f"{output}: {counts} in {followed.frames} frames.")
    for word in words:
        if word not in followed.objects and word in followed.best:
            score, number = followed.best[word]
            typer.echo(
                f"Nothing above --threshold {threshold:g} in two frames in a row for {plain(word)!r}: the best score "
                f"is {score_text(score)}, in frame {number}."
            )
