"""
AP and cgF1 of a model with and without suppression of overlapping masks, which is a default of prediction.

    python benchmarks/suppression.py MODEL DATA [--split validation] [--images 40]

The model is run once. Without masks, boxes are compared.
"""

import argparse
import tempfile

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, eval_batches, load_dataset_splits, make_loader
from sam3_hf.evaluation import CGF1, CocoAP
from sam3_hf.evaluation.loop import metric_options, outputs_by_chunk, prediction_rows
from sam3_hf.evaluation.text import PhraseFeatures
from sam3_hf.prediction.detections import suppress
from sam3_hf.rle import encode_part

LIMITS = (None, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    accelerator = Accelerator()
    splits = load_dataset_splits(arguments.data)
    rows = splits[arguments.split]
    rows = rows if arguments.images is None else rows.select(range(min(arguments.images, len(rows))))
    model = Sam3LiteModel.from_pretrained(arguments.model, preset="same", dtype="float32").to(accelerator.device)
    processor = Sam3LiteProcessor.of_source(arguments.model, model.config)
    dataset = EvalDataset(rows, model.config.image_size)
    dataset.has_masks &= model.config.mask_supervision
    pairs = predict(accelerator, model.eval(), processor, dataset)
    kind = "segm" if dataset.has_masks else "bbox"
    names = (
        f"{kind}_AP",
        f"{kind}_AP50",
        f"{kind}_cgF1",
        f"{kind}_positive_micro_F1",
        f"{kind}_positive_micro_precision",
    )
    typer.echo(f"| suppressed above | {' | '.join(names)} | detections of 0.3 and more |")
    typer.echo("|---" * (len(names) + 2) + "|")
    for limit in LIMITS:
        kept = [(suppressed(prediction, limit), reference) for prediction, reference in pairs]
        scores = score(accelerator, dataset, kept)
        count = sum(value >= 0.3 for prediction, _ in kept for value in prediction["scores"])
        figures = " | ".join("-" if scores[name] is None else f"{scores[name]:.4f}" for name in names)
        typer.echo(f"| {limit or 'nothing'} | {figures} | {count} |")


@torch.no_grad()
def predict(
    accelerator: Accelerator, model, processor, dataset: EvalDataset, num_workers: int = 4
) -> list[tuple[dict, dict]]:
    """Prediction and reference row of each pair of an image and a concept."""
    set_seed(0)
    text = PhraseFeatures(model, processor, dataset.concepts, accelerator.device)
    pairs = []
    for batch in make_loader(dataset, eval_batches(len(dataset), 4, 0, 1), num_workers=num_workers):
        for chunk, outputs in outputs_by_chunk(accelerator, model, text, batch):
            found = prediction_rows(processor, outputs, chunk, dataset.has_masks)
            sizes = chunk["original_sizes"]
            pairs += [
                (row | {"size": size}, reference)
                for row, size, reference in zip(found, sizes, chunk["references"], strict=True)
            ]
    return pairs


def suppressed(prediction: dict, limit: float | None) -> dict:
    """A prediction row, best first, without what overlaps something better by more than the limit."""
    regions = prediction["masks"] or [_filled(box, prediction["size"]) for box in prediction["boxes"]]
    kept = range(len(regions)) if limit is None else suppress([""] * len(regions), regions, limit)
    row = {key: prediction[key] for key in ("image_id", "category")}
    row |= {key: [prediction[key][index] for index in kept] for key in ("boxes", "scores")}
    return row | {"masks": prediction["masks"] and [prediction["masks"][index] for index in kept]}


def _filled(box: list[float], size: tuple[int, int]) -> dict:
    left, top, right, bottom = (round(side) for side in box)
    return encode_part(torch.ones(max(bottom - top, 0), max(right - left, 0), dtype=torch.bool), top, left, size)


def score(accelerator: Accelerator, dataset: EvalDataset, pairs: list[tuple[dict, dict]]) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        scores = {}
        for kind in (CocoAP, CGF1):
            metric = kind(**metric_options(accelerator, dataset, cache))
            predictions, references = map(list, zip(*pairs, strict=True))
            scores |= metric.compute(predictions=predictions, references=references)
    return scores


if __name__ == "__main__":
    main()
