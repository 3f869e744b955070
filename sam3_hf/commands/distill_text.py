"""`sam3-lite distill-text`: a text encoder that learns from a larger one, from phrases alone."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers.utils import cached_file

from ..checkpoints import open_checkpoint, refuse_training_checkpoint
from ..errors import model_errors
from ..mapping import REPORT_FILE
from ..modeling_sam3_lite import Sam3LiteModel
from ..phrases import everyday_phrases, read_phrases
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sharing.model_card import origin_of, versions
from .errors import one_line_errors
from .writing import check_target, write_model


def distill_text(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model whose text encoder learns.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    teacher: Annotated[
        str, typer.Option(help="Hub id, folder or Meta's .pt file of the model whose text encoder it learns from.")
    ],
    phrases: Annotated[
        Path | None, typer.Option(help="Text file, one phrase a line. Default: some thousand everyday ones.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Phrases of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises in the first steps, then falls.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the order of phrases and words.")] = 0,
    data: Annotated[
        str | None, typer.Option(help="Dataset as in training, to score the detector with the old and the new words.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of that dataset: train, validation or test.")] = "validation",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
):
    """
    Teaches the text encoder of a model what phrases mean to a larger one: minutes on a CPU, without pictures or
    labels. All else of the model stays as it is. Says how near it comes on phrases that are held out.
    """
    with one_line_errors(task="distilling"):
        from ..training.text_distillation import TextSettings

        settings = TextSettings(steps, batch_size, learning_rate, seed)
        check_target(out, overwrite)
        asked = everyday_phrases() if phrases is None else read_phrases(phrases)
        with model_errors(model):
            student = _open(model)
            processor = Sam3LiteProcessor.of_source(model, student.config)
        dataset = None if data is None else _dataset(data, split, student)
        figures = _distill(student, processor, teacher, asked, settings, device, dataset)
        origin = origin_of(model, teacher)
        figures = {
            "teacher": teacher,
            "teacher_on_hub": not os.path.exists(teacher),
            "phrases": "everyday" if phrases is None else phrases.name,
            **asdict(settings),
            **figures,
        }
        student.to("cpu", open_checkpoint(model).dtype)
        provenance = {"origin": asdict(origin), "versions": versions(), "text_distilled": figures}
        write_model(student, processor, out, provenance, _report_of(model))
    typer.echo(told(out, figures))


def _open(source: str) -> Sam3LiteModel:
    refuse_training_checkpoint(source)
    model = Sam3LiteModel.from_pretrained(source, preset="same", dtype="float32")
    if model.vocabulary is not None:
        raise ValueError(
            f"{source} has a fixed vocabulary and no text encoder: give it one back with `restore_text_encoder`."
        )
    return model


def _dataset(data: str, split: str, model: Sam3LiteModel):
    from ..data import EvalDataset, load_dataset_splits

    splits = load_dataset_splits(data, check_images=[split])
    if split not in splits:
        raise ValueError(f"{data} has no split {split}: --split takes {', '.join(splits)}.")
    dataset = EvalDataset(splits[split], model.config.image_size)
    dataset.has_masks = dataset.has_masks and model.config.mask_supervision
    return dataset


def _distill(model: Sam3LiteModel, processor, teacher: str, phrases, settings, device: str | None, dataset) -> dict:
    """Trains the text encoder in place; the figures of [`distill_text`], and scores before and after."""
    from ..training.text_distillation import TextSide, detector_scores, distill_text, read_teacher

    large = read_teacher(teacher)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for part in (large.encoder, large.projection):
        part.to(device)
    scores = {} if dataset is None else {"scores_before": detector_scores(model, processor, dataset)}
    student = TextSide(model.text_encoder.to(device), model.text_projection.to(device), processor.tokenizer)
    with tqdm(total=settings.steps, unit="step") as bar:

        def show(step: int, loss: float):
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        figures = distill_text(student, large, phrases, settings, show)
    if dataset is not None:
        scores["scores_after"] = detector_scores(model, processor, dataset)
    return figures | scores


def _report_of(source: str) -> str | None:
    if os.path.isfile(source):
        return None
    return cached_file(source, REPORT_FILE, _raise_exceptions_for_missing_entries=False)


def told(out: Path, figures: dict) -> str:
    """What was done, as text."""
    lines = [f"{out}: text distilled from {figures['teacher']} on {figures['phrases_fitted']} phrases"]
    names = {
        "cosine": f"cosine of the features of {figures['phrases_held_out']} other phrases",
        "reordered": "the same of pooled features, words reordered",
    }
    for key, name in names.items():
        if f"{key}_after" in figures:
            lines.append(f"{name}: {figures[f'{key}_before']:.4f}, now {figures[f'{key}_after']:.4f}")
    for name, before in figures.get("scores_before", {}).items():
        lines.append(f"{name}: {before:.4f}, now {figures['scores_after'][name]:.4f}")
    return "\n".join(lines)
