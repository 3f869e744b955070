"""`sam3-lite evaluate`: the scores of training, for any model and split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoints import refuse_training_checkpoint
from ..errors import model_errors
from ..exporting.folder import is_export
from ..exporting.opening import open_export
from ..files import write_file
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor
from .errors import one_line_errors

COLUMNS = ("AP", "AP50", "AP75", "AR100", "cgF1", "positive_micro_F1", "IL_MCC", "objects")


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Dataset as in training: folder, COCO file, Hub repository.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, precision_recall.png and confusion.png.")
    ] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Where the file names of a COCO file start.")] = None,
    category_map: Annotated[Path | None, typer.Option(help="YAML file that renames categories into phrases.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images ahead.")] = 2,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = "main",
):
    """Scores a model on a split: COCO AP, cgF1 and presence, for each concept and together. FP16 on a GPU."""
    with one_line_errors(task="evaluating"):
        if output is not None:
            _check_writable(output)  # before the scoring, not after it
        scores = _scores(model, data, split, image_folder, category_map, batch_size, workers, revision)
    typer.echo(table(scores))
    if output is not None:
        with one_line_errors():
            _write(scores, output)


def _scores(source, data, split, image_folder, category_map, batch_size, workers, revision) -> dict:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from ..data import EvalDataset, load_dataset_splits
    from ..evaluation.curves import Confusion, PrecisionRecall
    from ..evaluation.loop import evaluate as score
    from ..evaluation.text import PhraseFeatures

    splits = load_dataset_splits(data, image_folder, category_map, check_images=[split])
    if split not in splits:
        raise ValueError(f"{data} has no split {split}: --split takes {', '.join(splits)}.")
    with model_errors(source):
        refuse_training_checkpoint(source)
        exported = is_export(source, revision=revision)
        if exported:
            model, processor = open_export(source, revision=revision)
        else:
            model = Sam3LiteModel.from_pretrained(source, preset="same", dtype="float32", revision=revision).eval()
            processor = Sam3LiteProcessor.of_source(source, model.config, revision=revision)
    half = torch.cuda.is_available() and not exported
    accelerator = Accelerator(mixed_precision="fp16" if half else "no", cpu=exported)
    model.to(accelerator.device)
    dataset = EvalDataset(splits[split], model.config.image_size)
    if dataset.has_masks and not model.config.mask_supervision:
        typer.echo(f"{source} was trained on boxes alone: its boxes are scored, and no masks.", err=True)
        dataset.has_masks = False
    text = PhraseFeatures(model, processor, dataset.concepts, accelerator.device)
    set_seed(0)  # the mask losses sample points; training evaluates with its --seed, 0 if not given
    figures = score(
        accelerator,
        model,
        processor,
        text,
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        more=(PrecisionRecall, Confusion),
    )
    precision = model.export.precision if exported else accelerator.mixed_precision.replace("no", "fp32")
    about = {"model": source, "data": data, "split": split, "images": len(dataset), "precision": precision}
    return about | figures


def table(scores: dict) -> str:
    """The scores for each concept and together, of masks and of boxes, as text."""
    parts = [f"{scores['model']} on {scores['data']}, {scores['split']}: {scores['images']} images"]
    for kind in ("segm", "bbox"):
        classes = scores.get(f"{kind}_per_class")
        if classes is None:
            continue
        width = max(len(name) for name in [*classes, "all"])
        together = {key: scores.get(f"{kind}_{key}", scores.get(key)) for key in COLUMNS}
        together["objects"] = sum(row["objects"] for row in classes.values())
        heading = "\n" + {"segm": "masks", "bbox": "boxes"}[kind].ljust(width)
        parts.append(heading + "".join(f"  {_title(key):>7}" for key in COLUMNS))
        for name, row in [*classes.items(), ("all", together)]:
            parts.append(name.ljust(width) + "".join(f"  {_cell(row[key]):>7}" for key in COLUMNS))
    return "\n".join(parts + _undefined(classes))


def _undefined(classes: dict[str, dict]) -> list[str]:
    """A line on the concepts that have neither MCC nor cgF1, if there are any."""
    from ..evaluation.cgf1 import why_undefined

    reasons = {name: why_undefined(row["pairs"], row["positive_pairs"]) for name, row in classes.items()}
    texts = [
        f"{reason} ({', '.join(name for name in reasons if reasons[name] == reason)})"
        for reason in sorted(set(reasons.values()) - {""})
    ]
    return [f"\ncgF1 and MCC are not defined where {' or '.join(texts)}."] if texts else []


def _title(key: str) -> str:
    return {"positive_micro_F1": "pos. F1", "IL_MCC": "MCC"}.get(key, key)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return "-" if value == -1 else f"{value:.3f}"  # COCO writes -1 where there is nothing to find


def _check_writable(folder: Path) -> None:
    """
    Raises:
        OSError: the folder cannot be written, or not be made.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing} is no folder that can be written: choose another --output.")


def _write(scores: dict, output: Path) -> None:
    from ..evaluation.plots import plot_confusion, plot_precision_recall

    write_file(output / "metrics.json", json.dumps(scores, indent=1) + "\n")
    kind = "segm" if "segm_AP" in scores else "bbox"
    name = f"{Path(scores['model']).name}, {scores['split']}, {'masks' if kind == 'segm' else 'boxes'}, IoU 0.5"
    plot_precision_recall(scores[f"{kind}_precision_recall"], name, output / "precision_recall.png")
    plot_confusion(scores[f"{kind}_confusion"], f"{name}, score 0.5", output / "confusion.png")
    typer.echo(f"\nWritten: {output}/metrics.json, precision_recall.png, confusion.png")
