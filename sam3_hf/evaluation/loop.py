"""Scores, loss and pictures of a model on a split of a dataset."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, send_to_device
from tqdm import tqdm

from ..data import EvalDataset, eval_batches, make_loader
from ..data.images import load_image
from ..data.workers import batches_of
from ..files import write_file
from ..modeling_sam3_lite import Sam3LiteOutput
from ..rle import decode_mask, encode_masks
from ..visualization import score_text, side_by_side
from .cgf1 import CGF1
from .coco_ap import CocoAP
from .metric import DetectionMetric
from .rows import CONFIDENT, MAX_DETECTIONS, prediction_row

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 16  # bounds memory: 200 queries at 1008 px have 66 MB of mask logits for each prompt in float32
LOWEST_SCORE = 0.01  # detections below are too many to encode: COCO AP goes without the far end of its curves
DRAWN_SCORE = 0.3  # as `post_process_instance_segmentation` keeps by default


@dataclass(frozen=True)
class Pictures:
    """The first `count` images of the dataset, drawn into a folder: prediction beside truth, 0000.png and so on."""

    folder: Path
    count: int


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model,
    processor,
    text: Callable[[list[str]], dict],
    dataset: EvalDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    pictures: Pictures | None = None,
    more: Sequence[type[DetectionMetric]] = (),
) -> dict | None:
    """
    Asks every image for every concept; called by all processes, each of which does its share of the images.

    Args:
        model: as returned by `accelerator.prepare`; left in evaluation mode.
        text: turns phrases into the model's text inputs.
        batch_size: images per forward pass.
        num_workers, worker_init_fn: of `make_loader`.
        stop: asked before each batch whether to give up; all processes must get the same answer.
        pictures: what to draw.
        more: metrics whose figures are wanted beside those of `CocoAP` and `CGF1`.

    Returns:
        "loss" (where the model has one) and the figures of the metrics in the main process, None in the others and
        after a stop.
    """
    model.eval()
    batches = eval_batches(len(dataset), batch_size, accelerator.process_index, accelerator.num_processes)
    loader = make_loader(dataset, batches, num_workers=num_workers, worker_init_fn=worker_init_fn)
    with tempfile.TemporaryDirectory() as cache, batches_of(loader) as loaded:
        metrics = [metric(**metric_options(accelerator, dataset, cache)) for metric in (CocoAP, CGF1, *more)]
        total, prompts = torch.zeros((), device=accelerator.device), 0
        empty = {}
        for indices, batch in with_progress(zip(batches, loaded, strict=True), len(batches), accelerator):
            if stop is not None and stop():
                return None
            rows = []
            for chunk, outputs in outputs_by_chunk(accelerator, model, text, batch):
                if outputs.loss is not None:  # an exported model has none
                    total += outputs.loss * len(chunk["phrases"])
                    prompts += len(chunk["phrases"])
                rows += prediction_rows(processor, outputs, chunk, dataset.has_masks)
            for metric in metrics:
                metric.add_batch(predictions=rows, references=batch["references"])
            if pictures is not None:
                empty |= draw_batch(accelerator, dataset, indices, batch, rows, pictures)
        loss = {"loss": accelerator.reduce(total / prompts, "mean").item()} if prompts else {}
        figures = [metric.compute() for metric in metrics]
    if empty:
        listed = ", ".join(f"{name} {best}" for name, best in empty.items())
        text = "%d of the pictures drawn show objects, and nothing with a score of %g; their best scores: %s"
        logger.info(text, len(empty), DRAWN_SCORE, listed)
    if not accelerator.is_main_process:
        return None
    return {**loss, **merge_figures(*figures[:2]), **dict(chain.from_iterable(map(dict.items, figures[2:])))}


def with_progress(batches: Iterable, count: int, accelerator: Accelerator) -> Iterator:
    """
    The batches, with a bar and the time that is left on the terminal of the main process; where there is none, with a
    line of the log at each quarter.
    """
    is_main, start = accelerator.is_main_process, time.perf_counter()
    bar = tqdm(batches, "evaluating", count, unit="batch", leave=False, disable=None if is_main else True)
    for done, batch in enumerate(bar):
        if is_main and bar.disable and done and 4 * done // count > 4 * (done - 1) // count:
            left = tqdm.format_interval((time.perf_counter() - start) / done * (count - done))
            logger.info("evaluating: %d of %d batches, %s left", done, count, left)
        yield batch


def metric_options(accelerator: Accelerator, dataset: EvalDataset, cache: str) -> dict:
    """Arguments of a `DetectionMetric` for a dataset, in each of the processes."""
    return {
        "iou_types": ("bbox", "segm") if dataset.has_masks else ("bbox",),
        "category_names": dict(enumerate(dataset.concepts)),
        "num_process": accelerator.num_processes,
        "process_id": accelerator.process_index,
        "cache_dir": cache,
    }


def outputs_by_chunk(
    accelerator: Accelerator, model, text, batch: dict, with_loss: bool = True
) -> Iterator[tuple[dict, Sam3LiteOutput]]:
    """Each chunk of `prompt_chunks` with the model's float32 outputs for it; the images are encoded once."""
    device = accelerator.device
    with accelerator.autocast():
        vision = accelerator.unwrap_model(model).get_vision_features(batch["pixel_values"].to(device))
    for chunk in prompt_chunks(batch):
        if not with_loss:
            del chunk["labels"]
        with accelerator.autocast():
            outputs = model(vision_embeds=vision, **model_inputs(chunk, text, device))
        yield chunk, convert_to_fp32(outputs)  # Accelerate does that itself, but not under FSDP


def model_inputs(batch: dict, text: Callable[[list[str]], dict], device: torch.device) -> dict:
    """What the model's forward takes of a collated batch, on its device."""
    taken = ("pixel_values", "image_index", "input_boxes", "input_boxes_labels", "labels")
    inputs = {key: batch[key] for key in taken if key in batch} | text(batch["phrases"])
    return send_to_device(inputs, device, non_blocking=True)


def merge_figures(coco: dict, concept: dict) -> dict:
    """The figures of `CocoAP` and `CGF1` in one dict, and so those per class."""
    per_class = {
        key: {name: values | concept[key][name] for name, values in classes.items()}
        for key, classes in coco.items()
        if key.endswith("_per_class")
    }
    return {**coco, **concept, **per_class}


def prompt_chunks(batch: dict) -> list[dict]:
    """Parts of a batch with a bounded number of prompts, without the images; one size of the original per prompt."""
    chunks = []
    for start in range(0, len(batch["phrases"]), PROMPTS_AT_ONCE):
        part = slice(start, start + PROMPTS_AT_ONCE)
        chunk = {key: batch[key][part] for key in ("phrases", "labels", "references", "image_index")}
        chunk["original_sizes"] = [batch["original_sizes"][owner] for owner in chunk["image_index"].tolist()]
        chunks.append(chunk)
    return chunks


def prediction_rows(processor, outputs, chunk: dict, with_masks: bool) -> list[dict]:
    """What the metrics take, one row per prompt. Masks are enlarged for one prompt at a time: they are large."""
    rows = []
    for prompt, (reference, (height, width)) in enumerate(
        zip(chunk["references"], chunk["original_sizes"], strict=True)
    ):
        (found,) = processor.post_process_instance_segmentation(
            best_of_prompt(outputs, prompt),
            threshold=LOWEST_SCORE,
            target_sizes=[(height, width)] if with_masks else None,
        )
        boxes, masks = found["boxes"], None
        if with_masks:
            # One mask, unlike all together, stays in the processor's cache while it is turned and encoded.
            masks = [encode_masks(mask[None])[0] for mask in found["masks"]]
        else:  # then boxes are still relative
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        rows.append(prediction_row(reference["image_id"], reference["category"], boxes, found["scores"], masks))
    return rows


def best_of_prompt(outputs, prompt: int):
    """The model's output for one prompt and those queries only that `prediction_row` would keep, in their order."""
    scores = outputs.pred_logits[prompt].sigmoid() * outputs.presence_logits[prompt].sigmoid()
    count = max(MAX_DETECTIONS, int((scores >= CONFIDENT).sum()))
    kept = scores.argsort(descending=True, stable=True)[:count].sort().values
    return type(outputs)(
        pred_logits=outputs.pred_logits[prompt, kept][None],
        pred_boxes=outputs.pred_boxes[prompt, kept][None],
        pred_masks=outputs.pred_masks[prompt, kept][None],
        presence_logits=outputs.presence_logits[prompt][None],
    )


def draw_batch(
    accelerator: Accelerator,
    dataset: EvalDataset,
    indices: list[int],
    batch: dict,
    rows: list[dict],
    pictures: Pictures,
) -> dict[str, str]:
    """
    Draws those images of a batch that are asked for, each in one process: `eval_batches` deals some out twice.

    Args:
        indices: of its images in the dataset.
        rows: the predictions for its prompts.

    Returns:
        {name of the picture: the best score and its concept} where there are objects and nothing was drawn as found.
    """
    empty = {}
    for image, index in enumerate(indices):
        if index < pictures.count and index % accelerator.num_processes == accelerator.process_index:
            own = (batch["image_index"] == image).nonzero().flatten().tolist()
            predictions, references = [rows[row] for row in own], [batch["references"][row] for row in own]
            picture, name = draw(dataset, index, predictions, references), f"{index:04d}.png"
            write_file(pictures.folder / name, partial(picture.save, format="PNG"))
            best = best_scores(predictions, dataset)
            concept = max(best, key=best.get, default=None)
            if any(len(row["boxes"]) for row in references) and (concept is None or best[concept] < DRAWN_SCORE):
                said = f"{score_text(best[concept])} ({concept})" if best else f"below {LOWEST_SCORE}"
                empty[name] = said
    return empty


def best_scores(predictions: list[dict], dataset: EvalDataset) -> dict[str, float]:
    """{concept: the highest score of its prediction row}, without those of which nothing was kept."""
    return {dataset.concepts[row["category"]]: max(row["scores"]) for row in predictions if row["scores"]}


def draw(dataset: EvalDataset, index: int, predictions: list[dict], references: list[dict]):
    """Picture of one image, prediction beside truth, from its rows for all concepts."""
    row = dataset.rows[index]
    pixels, _ = load_image(row["image"], row["width"], row["height"])
    return side_by_side(
        pixels.permute(1, 2, 0).numpy(),
        instances_of(predictions, dataset, lambda row, index: row["scores"][index] >= DRAWN_SCORE)
        | {"best": best_scores(predictions, dataset)},
        instances_of(references, dataset, lambda row, index: not row["iscrowd"][index]),
        title=row["file_name"],
    )


def instances_of(rows: list[dict], dataset: EvalDataset, wanted: Callable[[dict, int], bool]) -> dict:
    """What `draw_instances` takes, of those objects of some rows of an image that `wanted(row, index)` picks."""
    picked = [(row, index) for row in rows for index in range(len(row["boxes"])) if wanted(row, index)]
    instances = {
        "boxes": np.array([row["boxes"][index] for row, index in picked]).reshape(-1, 4),
        "labels": [dataset.concepts[row["category"]] for row, _ in picked],
    }
    if dataset.has_masks and picked:
        instances["masks"] = np.stack([decode_mask(row["masks"][index]) for row, index in picked])
    if all("scores" in row for row in rows):
        instances["scores"] = [row["scores"][index] for row, index in picked]
    return instances
