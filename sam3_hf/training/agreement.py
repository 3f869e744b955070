"""A teacher's answers as ground truth: how far a student agrees with it, where nobody labelled the pictures."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, gather_object

from ..data import EvalDataset, eval_batches, make_loader
from ..data.rows import RawSplit, build_dataset
from ..evaluation.loop import model_inputs, prediction_rows, prompt_chunks
from ..evaluation.rows import CONFIDENT
from ..files import write_file
from ..processing_sam3_lite import Sam3LiteProcessor
from ..rle import extent, mask_areas
from .accelerator import decide
from .checksums import bytes_of, module_checksum
from .teacher import Teacher

logger = logging.getLogger(__name__)

MOST_PHRASES = 40  # that held-out pictures are asked for: each evaluation asks for all of them in every picture
STREAM = 2  # of random numbers, apart from those of other uses of the seed


def agreement_data(
    accelerator: Accelerator,
    teacher: Teacher,
    processor: Sam3LiteProcessor,
    rows: datasets.Dataset,
    concepts: Sequence[str],
    image_size: int,
    batch_size: int,
    seed: int,
    kept: Path,
) -> EvalDataset:
    """
    Pictures with what the teacher finds in them, scores of at least 0.5, as objects; called by every process, each of
    which asks about its share, unless it is known already.

    Args:
        processor: the student's; but for the tokenizer, it is the teacher's as well.
        rows: pictures; their objects are not looked at.
        concepts: what is asked for, at most `MOST_PHRASES` of them by chance. The teacher has their features.
        image_size: side of the models' input in pixels.
        batch_size: pictures at once.
        seed: of the choice of phrases.
        kept: file in which the objects are kept for a run that goes on.
    """
    if len(concepts) > MOST_PHRASES:
        chosen = np.random.default_rng([seed, STREAM]).choice(len(concepts), MOST_PHRASES, replace=False)
        concepts = [concepts[index] for index in np.sort(chosen)]
    table = rows.select_columns(["image_id", "file_name", "width", "height"])
    bare = [{**row, "objects": []} for row in table]
    images = list(rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"])
    concepts = list(concepts)
    split = RawSplit("validation", "the teacher", bare, images, concepts)
    numbers = {concept: index for index, concept in enumerate(concepts)}
    asked = EvalDataset(build_dataset(split, concepts, numbers), image_size)

    def look_up() -> tuple[str, dict[int, list[dict]] | None]:
        key = content_key(teacher, split, image_size)
        return key, read_kept(kept, key)

    key, objects = decide(accelerator, look_up)
    if objects is None:
        objects = _ask(accelerator, teacher, processor, asked, batch_size)
        if accelerator.is_main_process:
            write_file(kept, json.dumps({"key": key, "objects": list(objects.items())}))
    for row in bare:
        row["objects"] = objects.get(row["image_id"], [])
    count = sum(map(len, objects.values()))
    text = "validation: %d pictures, %d phrases; the teacher finds %d objects, which count as truth"
    logger.info(text, len(bare), len(concepts), count)
    if not count:
        logger.warning("the teacher finds nothing there: how far the model agrees with it cannot be measured")
    return EvalDataset(build_dataset(split, concepts, numbers), image_size)


def content_key(teacher: Teacher, split: RawSplit, image_size: int) -> str:
    """Of all that the answers follow from."""
    phrases = teacher.text(split.category_names)
    digest = xxhash.xxh3_128(module_checksum(teacher.model, teacher.model.config.to_dict()).encode())
    for tensor in phrases.values():
        digest.update(bytes_of(tensor))
    about = [split.category_names, image_size, CONFIDENT, split.rows]
    digest.update(json.dumps(about).encode())
    for image in split.images:
        digest.update(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"])
    return digest.hexdigest()


def read_kept(file: Path, key: str) -> dict[int, list[dict]] | None:
    """{image id: objects}; None if they are not there, of something else, or damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return dict(record["objects"]) if record["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _ask(
    accelerator: Accelerator, teacher: Teacher, processor: Sam3LiteProcessor, asked: EvalDataset, batch_size: int
) -> dict[int, list[dict]]:
    """{image id: objects}, in all processes."""
    found = {}
    for batch in _share(accelerator, asked, batch_size):
        for row in _answers(teacher, processor, batch):
            found[row["image_id"], row["category"]] = row  # a picture may be dealt out to two processes
    everything = [found] if accelerator.num_processes == 1 else gather_object([found])
    return _objects({key: row for part in everything for key, row in part.items()}, asked.concepts)


def _share(accelerator: Accelerator, asked: EvalDataset, batch_size: int):
    batches = eval_batches(len(asked), batch_size, accelerator.process_index, accelerator.num_processes)
    return make_loader(asked, batches, num_workers=0)


@torch.no_grad()
def _answers(teacher: Teacher, processor: Sam3LiteProcessor, batch: dict) -> list[dict]:
    model = teacher.model
    pixels = batch["pixel_values"].to(model.device, model.dtype)
    vision, rows = model.get_vision_features(pixels), []
    for chunk in prompt_chunks(batch):
        asked = {name: values for name, values in chunk.items() if name != "labels"}
        inputs = model_inputs(asked, teacher.text, model.device)
        outputs = convert_to_fp32(model(vision_embeds=vision, **inputs))
        rows += prediction_rows(processor, outputs, chunk, teacher.has_masks)
    return rows


def _objects(found: dict[tuple, dict], concepts: list[str]) -> dict[int, list[dict]]:
    """{image id: objects} of confident predictions."""
    objects: dict[int, list[dict]] = {}
    for (image, category), row in sorted(found.items()):
        masks = row["masks"] or [None] * len(row["scores"])
        for box, score, mask in zip(row["boxes"], row["scores"], masks, strict=True):
            if score < CONFIDENT or (mask is not None and not mask_areas([mask])[0]):
                continue
            left, top, right, bottom = box
            own = objects.setdefault(image, [])
            own.append(
                {
                    "id": len(own) + 1,
                    "category": concepts[category],
                    "bbox": [left, top, right - left, bottom - top] if mask is None else extent(mask),
                    "area": float((right - left) * (bottom - top) if mask is None else mask_areas([mask])[0]),
                    "iscrowd": False,
                    "segmentation": mask,
                }
            )
    return objects
