"""`sam3-lite label`: a dataset to train on, from pictures and what a model finds in them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..launcher import end_with_launcher
from ..picture_files import find_pictures
from ..precision_sam3_lite import precision_name
from ..prediction.pipeline import PredictionSettings, Prompt
from ..prediction.processes import Outcome, Processes
from ..prediction.run import fingerprint, predict_files
from ..reading import MAX_PIXELS
from ..sharing.model_card import versions
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

if TYPE_CHECKING:
    from ..prediction.label_folder import Labels  # which needs the extra `train`


def label(
    inputs: Inputs,
    model: Model,
    prompt: Prompts,
    output: Annotated[Path, typer.Option(help="Folder of the dataset, to write or to complete.")],
    threshold: Threshold = 0.5,
    phrase_threshold: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT=SCORE", help="Another threshold for one of the prompts.")
    ] = None,
    masks: Annotated[
        Literal["rle", "polygon"], typer.Option(help="How masks are written; polygons have no holes.")
    ] = "rle",
    images: Annotated[
        Literal["link", "copy", "refer"],
        typer.Option(help="Link or copy each picture into the dataset, or link to their folder once."),
    ] = "link",
    valid_share: Annotated[float, typer.Option(help="About this share of the pictures is for validation.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split, which goes by it and the name of a picture alone.")] = 0,
    overlays: Overlays = False,
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
    Labels pictures: writes what a model finds in them as a dataset, in the Roboflow layout that training takes. The
    same command goes on where an earlier one stopped. `accelerate launch -m sam3_hf.cli label ...` shares
    the pictures over several GPUs.
    """
    end_with_launcher()
    with one_line_errors(task="labelling"):
        processes = Processes.join(device)
        with processes.in_turn():
            from ..prediction.label_folder import LabelFolder

            settings = PredictionSettings(threshold, mask_threshold, max_detections, nms_iou, tile_size, tile_overlap)
            if not 0 <= valid_share < 1:
                raise ValueError(f"--valid-share {valid_share} must be 0 or more and less than 1.")
            words = distinct_phrases(prompt)
            thresholds = read_thresholds(phrase_threshold or [], words)
            prompts = [Prompt(word, threshold=thresholds.get(word)) for word in words]
            pictures = find_pictures(inputs, exclude=output)
            pipe, text = open_pipeline(
                model, words, processes, masks=False, device=device, dtype=dtype, revision=revision
            )
            record = {
                "model": model,
                "weights": fingerprint(pipe.model),
                "dtype": precision_name(pipe.model.dtype),
                "versions": versions(),
                "prompts": words,
                "phrase_thresholds": thresholds,
                **asdict(settings),
            }
            folder = LabelFolder(
                output, record, overlays, images=images, masks=masks, valid_share=valid_share, seed=seed
            )
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
        labels = folder.write_coco()
    say(output, labels, outcome, valid_share)
    if outcome.failures or labels.broken:
        raise typer.Exit(1)


def distinct_phrases(prompts: list[str]) -> list[str]:
    """
    The prompts as names of categories.

    Raises:
        ValueError: two of them are one to the model, which training refuses.
    """
    from ..data.concepts import as_read

    words = list(dict.fromkeys(prompt.strip() for prompt in prompts))
    first: dict = {}
    for word, reading in zip(words, as_read(words), strict=True):
        other = first.setdefault(reading, word)
        if other != word:
            raise ValueError(f"--prompt {other!r} and {word!r} are one phrase to the model: leave one of them out.")
    return words


def read_thresholds(given: list[str], words: list[str]) -> dict[str, float]:
    """
    Of `PROMPT=SCORE`, of which the last `=` counts.

    Raises:
        ValueError: the phrase is no prompt, or the score no number in 0..1.
    """
    thresholds = {}
    for one in given:
        word, _, score = one.rpartition("=")
        if word.strip() not in words:
            raise ValueError(f"--phrase-threshold {one!r} must be PROMPT=SCORE with one of the prompts {words}.")
        try:
            thresholds[word.strip()] = float(score)
        except ValueError:
            raise ValueError(f"--phrase-threshold {one!r}: {score!r} is no number in 0..1.") from None
    return thresholds


def say(output: Path, labels: Labels, outcome: Outcome, valid_share: float) -> None:
    """What was done, and what was not."""
    parts = [
        f"{split} {labels.images[split]} pictures ({labels.negatives[split]} without annotations), "
        f"{labels.annotations[split]} annotations"
        for split in ("train", "valid")
    ]
    typer.echo(f"{output}: {'; '.join(parts)}. {outcome.new} pictures were new, {outcome.before} done before.")
    if labels.left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(labels.left_out.items()))
        number = labels.left_out.total()
        typer.echo(f"{number} detections are left out, as training would refuse them: {kinds}.", err=True)
    missing = [split for split in ("train", "valid") if not labels.images[split] and (valid_share or split == "train")]
    for split in missing:
        typer.echo(f"No picture fell to {split}/, which training needs: add pictures, or change --seed.", err=True)
    failures = list(outcome.failures.values())
    list_failures(f"{len(failures)} could not be read or written:", failures)
    list_failures(f"{len(labels.broken)} earlier labels are left out:", labels.broken)
