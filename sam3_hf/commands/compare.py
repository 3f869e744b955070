"""`sam3-lite compare`: two models side by side on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import open_checkpoint
from ..exporting.model import ExportedModel
from ..files import write_file
from ..plain_text import aligned, plain, with_revision
from .errors import one_line_errors
from .options import Revision, RevisionB
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

SCORES = ("AP", "AP50", "AP75", "AR100", "cgF1")
KINDS = {"segm": "masks", "bbox": "boxes"}


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Hub id or folder of a model, also an exported one.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    data: Data,
    split: Split = "validation",
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json and pictures.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Draw the so many in which they differ most.")] = 8,
    image_folder: ImageFolder = None,
    category_map: CategoryMap = None,
    validation_split: ValidationSplit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    workers: Workers = 2,
    revision: Revision = "main",
    revision_b: RevisionB = None,
):
    """
    Compares two models on a split: scores, size and time per image, measured in turns in one run, and the pictures in
    which they differ most. FP16 on a GPU; both on the CPU where one of them is exported.
    """
    with one_line_errors(task="comparing"):
        if output is not None:
            check_writable(output)
        rows = load_split(data, split, image_folder, category_map, validation_split, seed)
        revisions = (revision, revision if revision_b is None else revision_b)
        found, drawings = _compare((first, second), revisions, rows, batch_size, workers, pictures if output else 0)
        found = {"data": data, "split": split, **found}
    typer.echo(table(found))
    if output is not None:
        with one_line_errors():
            for entry, draw in zip(found["pictures"], drawings, strict=True):
                write_file(output / entry["picture"], partial(draw().save, format="PNG"))
            write_file(output / "comparison.json", json.dumps(found, indent=1) + "\n")
        typer.echo(f"\nWritten: {output}/comparison.json, {len(found['pictures'])} pictures in {output}/pictures")


def _compare(sources, revisions, rows, batch_size, workers, most_pictures) -> tuple[dict, list[Callable]]:
    """What `comparison.json` holds, and what draws its pictures."""
    from ..evaluation.compare import Contender, compare, draw_difference
    from ..evaluation.text import PhraseFeatures

    opened = [open_scored(source, revision) for source, revision in zip(sources, revisions, strict=True)]
    accelerator = accelerator_for(*(model for model, _ in opened))
    datasets = [dataset_for(source, model, rows) for source, (model, _) in zip(sources, opened, strict=True)]
    with_masks = all(dataset.has_masks for dataset in datasets)
    pair = []
    for source, (model, processor), dataset in zip(sources, opened, datasets, strict=True):
        dataset.has_masks = with_masks
        model.to(accelerator.device)
        try:
            text = PhraseFeatures(model, processor, dataset.concepts, accelerator.device)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        pair.append(Contender(model, processor, text, dataset))
    result = compare(accelerator, pair, batch_size=batch_size, num_workers=workers, most_pictures=most_pictures)
    models = [
        {
            "model": source,
            "revision": revision,
            "precision": scored_precision(one.model, accelerator),
            **_size(source, revision, one.model),
            "seconds_per_image": seconds,
            "scores": scores,
        }
        for source, revision, one, seconds, scores in zip(
            sources, revisions, pair, result.seconds, result.scores, strict=True
        )
    ]
    shown = [
        {
            "file_name": rows[one.index]["file_name"],
            "found_by_both": one.both,
            "by_a_alone": one.only_first,
            "by_b_alone": one.only_second,
            "picture": f"pictures/{number:02d}.png",
        }
        for number, one in enumerate(result.differences)
    ]
    about = {"images": len(rows), "concepts": len(pair[0].dataset.concepts), "device": accelerator.device.type}
    names = tuple(_names(models))
    drawings = [partial(draw_difference, pair[0].dataset, one, names) for one in result.differences]
    return {**about, "batch_size": batch_size, "models": models, "pictures": shown}, drawings


def _size(source: str, revision: str, model) -> dict:
    """Parameters (None for graphs) and bytes on the disk."""
    if isinstance(model, ExportedModel):
        return {"parameters": None, "bytes": sum(file["bytes"] for file in model.export.facts["files"].values())}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "bytes": open_checkpoint(source, revision=revision).size}


def table(found: dict) -> str:
    """The comparison as text: scores, size and time of both and how they differ, the scores by concept, pictures."""
    models = found["models"]
    lines = [f"{name}, {one['precision']}" for name, one in zip(_names(models), models, strict=True)]
    about = f"{found['images']} images, {found['concepts']} concepts"
    lines += [f"on {found['data']}, {found['split']}: {about}, {found['device']}", ""]
    rows = [("", "A", "B", "B - A")]
    kinds = [kind for kind in KINDS if f"{kind}_AP" in models[0]["scores"]]
    for kind in kinds:
        for name in SCORES:
            rows.append(_row(f"{KINDS[kind]} {name}", *(one["scores"].get(f"{kind}_{name}") for one in models)))
    rows.append(_row("MCC", *(one["scores"].get("IL_MCC") for one in models)))
    if all(one["parameters"] for one in models):
        rows.append(_row("parameters, M", *(one["parameters"] / 1e6 for one in models), digits=1))
    rows.append(_row("size, MB", *(one["bytes"] / 1e6 for one in models), digits=1))
    rows.append(_row("time per image, ms", *(one["seconds_per_image"] * 1e3 for one in models), digits=1))
    lines += aligned(rows)
    classes = [one["scores"][f"{kinds[0]}_per_class"] for one in models]
    if len(classes[0]) > 1:
        rows = [(f"{KINDS[kinds[0]]} AP", "A", "B", "B - A")]
        rows += [_row(plain(name), *(of_one[name]["AP"] for of_one in classes)) for name in classes[0]]
        lines += ["", *aligned(rows)]
    if found["pictures"]:
        rows = [("they differ most in", "both", "A alone", "B alone")]
        for one in found["pictures"]:
            counts = (one["found_by_both"], one["by_a_alone"], one["by_b_alone"])
            rows.append((plain(one["file_name"]), *map(str, counts)))
        lines += ["", *aligned(rows)]
    return "\n".join(lines)


def _names(models: list[dict]) -> list[str]:
    return [
        f"{letter}: {with_revision(one['model'], one['model'], one['revision'])}"
        for letter, one in zip("AB", models, strict=True)
    ]


def _row(name: str, first: float | None, second: float | None, digits: int = 3) -> tuple[str, ...]:
    """A line of the table; - where a score is not defined, for which COCO writes -1."""
    known = [value if value is not None and not (digits == 3 and value == -1) else None for value in (first, second)]
    cells = ["-" if value is None else f"{value:.{digits}f}" for value in known]
    return name, *cells, "-" if None in known else f"{known[1] - known[0]:+.{digits}f}"
