"""`sam3-lite evaluate`: the scores of training, for any model and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..files import write_file
from ..plain_text import aligned, plain
from .errors import one_line_errors
from .options import Revision
from .scoring import (
    BatchSize,
    CategoryMap,
    Data,
    ImageFolder,
    Seed,
    Split,
    ValidationSplit,
    Workers,
    accelerator_for,
    check_writable,
    dataset_for,
    load_split,
    open_scored,
    scored_precision,
)

COLUMNS = ("AP", "AP50", "AP75", "AR100", "cgF1", "positive_micro_F1", "IL_MCC", "objects")


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder.")],
    data: Data,
    split: Split = "validation",
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, precision_recall.png and confusion.png.")
    ] = None,
    image_folder: ImageFolder = None,
    category_map: CategoryMap = None,
    validation_split: ValidationSplit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    workers: Workers = 2,
    revision: Revision = "main",
):
    """Scores a model on a split: COCO AP, cgF1 and presence, for each concept and together. FP16 on a GPU."""
    with one_line_errors(task="evaluating"):
        if output is not None:
            check_writable(output)  # before the scoring, not after it
        rows = load_split(data, split, image_folder, category_map, validation_split, seed)
        scores = _scores(model, rows, batch_size, workers, revision)
    scores = {"model": model, "data": data, "split": split, **scores}
    typer.echo(table(scores))
    if output is not None:
        with one_line_errors():
            _write(scores, output)


def _scores(source, rows, batch_size, workers, revision) -> dict:
    from accelerate.utils import set_seed

    from ..evaluation.curves import Confusion, PrecisionRecall
    from ..evaluation.loop import evaluate as score
    from ..evaluation.text import PhraseFeatures

    model, processor = open_scored(source, revision)
    accelerator = accelerator_for(model)
    model.to(accelerator.device)
    dataset = dataset_for(source, model, rows)
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
    return {"images": len(dataset), "precision": scored_precision(model, accelerator), **figures}


def table(scores: dict) -> str:
    """The scores for each concept and together, of masks and of boxes, as text."""
    parts = [f"{scores['model']} on {scores['data']}, {scores['split']}: {scores['images']} images"]
    for kind in ("segm", "bbox"):
        classes = scores.get(f"{kind}_per_class")
        if classes is None:
            continue
        together = {key: scores.get(f"{kind}_{key}", scores.get(key)) for key in COLUMNS}
        together["objects"] = sum(row["objects"] for row in classes.values())
        rows = [({"segm": "masks", "bbox": "boxes"}[kind], *map(_title, COLUMNS))]
        rows += [(plain(name), *(_cell(row[key]) for key in COLUMNS)) for name, row in classes.items()]
        rows.append(("all", *(_cell(together[key]) for key in COLUMNS)))
        parts += ["", *aligned(rows)]
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


def _write(scores: dict, output: Path) -> None:
    from ..evaluation.plots import plot_confusion, plot_precision_recall

    write_file(output / "metrics.json", json.dumps(scores, indent=1) + "\n")
    kind = "segm" if "segm_AP" in scores else "bbox"
    name = f"{Path(scores['model']).name}, {scores['split']}, {'masks' if kind == 'segm' else 'boxes'}, IoU 0.5"
    plot_precision_recall(scores[f"{kind}_precision_recall"], name, output / "precision_recall.png")
    plot_confusion(scores[f"{kind}_confusion"], f"{name}, score 0.5", output / "confusion.png")
    typer.echo(f"\nWritten: {output}/metrics.json, precision_recall.png, confusion.png")
