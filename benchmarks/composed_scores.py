"""
Scores of a model in the composed world: on phrases that training asked for, on pairs of words that it never combined,
on pictures of 20 to 40 objects, and on phrases that are never there.

    python benchmarks/composed_scores.py sam3_hf/assets/tiny-standard --output benchmarks/results/composed_scores.json
    python benchmarks/composed_scores.py sam3_hf/assets/tiny-standard --splits train --images 60 --seed 1

The second line asks for all phrases of the training on pictures of it, where 1 is the seed of the run; with the seed
left out, on others that are drawn in the same way.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import write_composed
from sam3_hf.evaluation.loop import evaluate
from sam3_hf.evaluation.text import PhraseFeatures
from sam3_hf.files import write_file

logger = logging.getLogger(__name__)

SEED = 10_000  # no training has it
SPLITS = ("seen", "unseen", "dense", "absent")
FIGURES = ("segm_AP", "segm_AP50", "segm_AR100", "bbox_AP", "segm_cgF1", "IL_MCC", "IL_negative_accuracy")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--images", type=int, default=300, help="pictures of each split, a third of it for the absent")
    parser.add_argument("--splits", nargs="+", choices=(*SPLITS, "train"), default=SPLITS)
    parser.add_argument("--preset", default="same", help="sizes to map the model to first")
    parser.add_argument("--image-size", type=int, help="pixels to draw and to ask at; default: those of the model")
    parser.add_argument("--seed", type=int, default=SEED, help="of the pictures (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    size = {} if arguments.image_size is None else {"image_size": arguments.image_size}
    model = Sam3LiteModel.from_pretrained(arguments.model, preset=arguments.preset, dtype=torch.float32, **size)
    processor = Sam3LiteProcessor.of_source(arguments.model, model.config)
    counts = dict.fromkeys(arguments.splits, arguments.images) | {"absent": max(arguments.images // 3, 1)}
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for split in arguments.splits:
            data = composed_split(Path(folder), split, counts[split], model.config.image_size, arguments.seed)
            scores[split] = split_scores(model, processor, data, arguments.batch_size)
            logger.info("%s", line(split, scores[split]))
    if arguments.output is not None:
        about = {"model": arguments.model, "preset": arguments.preset, "image_size": model.config.image_size}
        about |= {"images": arguments.images, "absent_images": counts["absent"], "seed": arguments.seed}
        write_file(arguments.output, json.dumps(about | scores, indent=1) + "\n")


def composed_split(folder: Path, split: str, count: int, image_size: int, seed: int = SEED) -> EvalDataset:
    """`count` pictures of a split, drawn into a folder."""
    write_composed(folder, {split: count}, image_size, seed)
    file = folder / split / "_annotations.coco.json"
    return EvalDataset(load_dataset_splits({"test": file}, check_images=False)["test"], image_size)


def split_scores(model: Sam3LiteModel, processor: Sam3LiteProcessor, data: EvalDataset, batch_size: int) -> dict:
    """Those of `FIGURES` that are defined, AP by the number of words of a phrase, AP and AR by the size of masks."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model.to(accelerator.device).eval()
    set_seed(0)
    text = PhraseFeatures(model, processor, data.concepts, accelerator.device)
    figures = evaluate(accelerator, model, processor, text, data, batch_size=batch_size)
    scores = {name: figures[name] for name in FIGURES if figures.get(name) is not None}
    by_words: dict[str, list[float]] = {}
    for phrase, values in figures.get("segm_per_class", {}).items():
        if values["AP"] is not None and values["AP"] >= 0:
            by_words.setdefault(f"{phrase.count(' ') + 1} words", []).append(values["AP"])
    names = [f"{figure}{size}" for figure in ("AP", "AR") for size in "sml"]
    by_size = {name: figures[f"segm_{name}"] for name in names if f"segm_{name}" in figures}
    return scores | {"by_words": {name: sum(aps) / len(aps) for name, aps in by_words.items()}, "by_size": by_size}


def line(split: str, scores: dict) -> str:
    """The scores of a split, as text."""
    cells = [f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float)]
    cells += [f"{name} {value:.3f}" for part in ("by_words", "by_size") for name, value in scores[part].items()]
    return f"{split}: " + ", ".join(cells)


if __name__ == "__main__":
    main()
