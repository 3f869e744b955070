"""Two models side by side on one dataset: scores, time, and the pictures in which they differ most."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..data import EvalDataset, eval_batches, make_loader
from ..data.images import load_image
from ..data.workers import batches_of
from ..rle import ious
from ..visualization import side_by_side
from .cgf1 import CGF1
from .coco_ap import CocoAP
from .loop import (
    DRAWN_SCORE,
    best_scores,
    instances_of,
    merge_figures,
    metric_options,
    outputs_by_chunk,
    prediction_rows,
    with_progress,
)
from .text import PhraseFeatures

SAME_OBJECT_IOU = 0.5  # two models found the same thing if what they found overlaps by as much


@dataclass
class Contender:
    """A model that is compared, on the device that it computes on, and the data at its resolution."""

    model: torch.nn.Module
    processor: object
    text: PhraseFeatures
    dataset: EvalDataset


@dataclass
class Difference:
    """
    How far two models differ in a picture, in what they find with a score of at least 0.3.

    Args:
        index: of the picture in the dataset.
        both, only_first, only_second: how many things both found, or one of them alone.
        rows: their predictions for it.
    """

    index: int
    both: int
    only_first: int
    only_second: int
    rows: tuple[list[dict], list[dict]] = field(repr=False)

    @property
    def count(self) -> int:
        return self.only_first + self.only_second


@dataclass
class Comparison:
    """
    Args:
        scores: the figures of `CocoAP` and `CGF1` of both.
        seconds: per image, of both: the median over batches, without the first one.
        differences: the pictures in which they differ most, and those alone that differ.
    """

    scores: tuple[dict, dict]
    seconds: tuple[float, float]
    differences: list[Difference]


@torch.no_grad()
def compare(
    accelerator: Accelerator,
    pair: tuple[Contender, Contender],
    *,
    batch_size: int,
    num_workers: int,
    most_pictures: int,
) -> Comparison:
    """
    Asks two models every concept of every image. They take turns with each batch, and in who is first, so that both
    are timed under the same conditions: from the pixels at their resolution to what they say, without losses, metrics
    and masks at the size of the image.

    Args:
        pair: with datasets of the same rows, both with masks or both without.
        batch_size: images per forward pass.
        most_pictures: so many differences are kept.
    """
    batches = eval_batches(len(pair[0].dataset), batch_size)
    loaders = [make_loader(one.dataset, batches, num_workers=num_workers) for one in pair]
    seconds, differences = ([], []), []
    with (
        tempfile.TemporaryDirectory() as cache,
        batches_of(loaders[0]) as first,
        batches_of(loaders[1]) as second,
    ):
        metrics = [_metrics(accelerator, one.dataset, Path(cache) / str(place)) for place, one in enumerate(pair)]
        loaded = zip(batches, first, second, strict=True)
        for number, (indices, *own) in enumerate(with_progress(loaded, len(batches), accelerator)):
            rows = [[], []]
            for place in (0, 1) if number % 2 == 0 else (1, 0):
                rows[place], taken = _answers(accelerator, pair[place], own[place])
                seconds[place].append(taken / len(indices))
                for metric in metrics[place]:
                    metric.add_batch(predictions=rows[place], references=own[place]["references"])
            differences += _differences(indices, own[0]["image_index"].tolist(), rows, pair[0].dataset.has_masks)
            differences = sorted(differences, key=lambda one: -one.count)[:most_pictures]
        scores = tuple(merge_figures(*(metric.compute() for metric in of_one)) for of_one in metrics)
    times = tuple(statistics.median(of_one[1:] or of_one) for of_one in seconds)
    return Comparison(scores, times, [one for one in differences if one.count])


def _metrics(accelerator: Accelerator, dataset: EvalDataset, cache: Path) -> list:
    cache.mkdir()
    return [metric(**metric_options(accelerator, dataset, str(cache))) for metric in (CocoAP, CGF1)]


def _answers(accelerator: Accelerator, one: Contender, batch: dict) -> tuple[list[dict], float]:
    """The prediction rows of a model for a batch, and the seconds that it took."""
    rows, taken = [], 0.0
    chunks = outputs_by_chunk(accelerator, one.model, one.text, batch, with_loss=False)
    while True:
        start = _now(accelerator.device)
        answered = next(chunks, None)
        taken += _now(accelerator.device) - start
        if answered is None:
            return rows, taken
        chunk, outputs = answered
        rows += prediction_rows(one.processor, outputs, chunk, one.dataset.has_masks)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _differences(indices: list[int], owners: list[int], rows: list[list[dict]], with_masks: bool) -> list[Difference]:
    """Of the images of a batch. `owners`: the image that each row is of, by its place in the batch."""
    found = []
    for image, index in enumerate(indices):
        own = tuple([row for row, owner in zip(of_one, owners, strict=True) if owner == image] for of_one in rows)
        counts = np.array([agreement(*both, with_masks) for both in zip(*own, strict=True)]).sum(axis=0)
        found.append(Difference(index, *counts.tolist(), own))
    return found


def agreement(first: dict, second: dict, with_masks: bool) -> tuple[int, int, int]:
    """
    Args:
        first, second: prediction rows of one concept in one image.

    Returns:
        How many things with a score of at least 0.3 are in both, in the first alone, and in the second alone.
    """
    shown = [[index for index, score in enumerate(row["scores"]) if score >= DRAWN_SCORE] for row in (first, second)]
    if not all(shown):
        return 0, len(shown[0]), len(shown[1])
    overlaps = ious(*(_shapes(row, own, with_masks) for row, own in zip((first, second), shown, strict=True))).copy()
    both = 0
    while overlaps.max() >= SAME_OBJECT_IOU:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[row], overlaps[:, column] = 0, 0
        both += 1
    return both, len(shown[0]) - both, len(shown[1]) - both


def _shapes(row: dict, kept: list[int], with_masks: bool) -> list[dict] | np.ndarray:
    """What `ious` takes."""
    if with_masks:
        return [row["masks"][index] for index in kept]
    boxes = np.array([row["boxes"][index] for index in kept], dtype=float)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def draw_difference(dataset: EvalDataset, difference: Difference, names: tuple[str, str]) -> Image.Image:
    """What two models find in a picture, side by side under their names."""
    row = dataset.rows[difference.index]
    pixels, _ = load_image(row["image"], row["width"], row["height"])
    halves = [
        instances_of(rows, dataset, lambda row, index: row["scores"][index] >= DRAWN_SCORE)
        | {"best": best_scores(rows, dataset)}
        for rows in difference.rows
    ]
    image = pixels.permute(1, 2, 0).numpy()
    return side_by_side(image, *halves, title=row["file_name"], names=names, counted=("by A", "by B"))
