"""The models and the data of commands that score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ..checkpoints import refuse_training_checkpoint
from ..errors import model_errors
from ..exporting.folder import is_export
from ..exporting.model import ExportedModel, precision_of
from ..exporting.opening import open_export
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from ..data import EvalDataset

Data = Annotated[str, typer.Option(help="Dataset as in training: folder, COCO file, Hub repository.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
ImageFolder = Annotated[Path | None, typer.Option(help="Where the file names of a COCO file start.")]
CategoryMap = Annotated[Path | None, typer.Option(help="YAML file that renames categories into phrases.")]
ValidationSplit = Annotated[
    float | None,
    typer.Option(
        "--validation-split",
        "--validation_split",
        help="Where there is no validation split: the share that training held out by its --seed (0.1 unless told).",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="That of the training, for --validation-split.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images ahead.")]


def load_split(
    data: str,
    split: str,
    image_folder: Path | None,
    category_map: Path | None,
    validation_split: float | None,
    seed: int,
) -> datasets.Dataset:
    """
    The checked rows of a split. Without a validation split, the part of the training split that training holds out by
    the same share and seed is that, and the rest is the training split.

    Raises:
        ValueError: there is no such split, or the share is not between 0 and 1, or of no use.
        DatasetError: the dataset has faults.
    """
    from ..data import load_dataset_splits
    from ..data.held_out import hold_out

    if validation_split is not None and not 0 < validation_split < 1:
        raise ValueError(f"--validation-split {validation_split:g} must be above 0 and below 1.")
    splits = load_dataset_splits(data, image_folder, category_map, check_images=[split])
    if validation_split is not None and "validation" in splits:
        raise ValueError(f"{data} has a validation split, training holds nothing out: leave --validation-split out.")
    if validation_split is not None and "train" in splits:
        if split == "validation":
            splits = load_dataset_splits(data, image_folder, category_map, check_images=["train"])
        splits["train"], splits["validation"] = hold_out(splits["train"], validation_split, seed)
    if split not in splits:
        held_out = split == "validation" and "train" in splits
        hint = ", or give --validation-split 0.1 (and --seed), as training was given it" if held_out else ""
        raise ValueError(f"{data} has no split {split}: --split takes {', '.join(splits)}{hint}.")
    return splits[split]


def open_scored(source: str, revision: str) -> tuple[Sam3LiteModel | ExportedModel, Sam3LiteProcessor]:
    """
    A model to score, in evaluation mode and float32, and its processor; or what an exported folder holds.

    Raises:
        ValueError: it cannot be loaded.
    """
    with model_errors(source):
        refuse_training_checkpoint(source)
        if is_export(source, revision=revision):
            return open_export(source, revision=revision)
        model = Sam3LiteModel.from_pretrained(source, preset="same", dtype=torch.float32, revision=revision).eval()
        return model, Sam3LiteProcessor.of_source(source, model.config, revision=revision)


def dataset_for(source: str, model, rows: datasets.Dataset) -> EvalDataset:
    """The rows as a model is asked for them; says where its masks will not be scored."""
    from ..data import EvalDataset

    dataset = EvalDataset(rows, model.config.image_size)
    if dataset.has_masks and not model.config.mask_supervision:
        typer.echo(f"{source} was trained on boxes alone: its boxes are scored, and no masks.", err=True)
        dataset.has_masks = False
    return dataset


def accelerator_for(*models: Sam3LiteModel | ExportedModel) -> Accelerator:
    """FP16 on a GPU; the CPU where one of the models is exported, so that all compute on one device."""
    from accelerate import Accelerator

    exported = any(isinstance(model, ExportedModel) for model in models)
    half = torch.cuda.is_available() and not exported
    return Accelerator(mixed_precision="fp16" if half else "no", cpu=exported)


def scored_precision(model: Sam3LiteModel | ExportedModel, accelerator: Accelerator) -> str:
    """What it computes in."""
    return precision_of(model, accelerator.mixed_precision.replace("no", "fp32"))


def check_writable(folder: Path) -> None:
    """
    Raises:
        OSError: the folder cannot be written, or not be made.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing} is no folder that can be written: choose another --output.")
