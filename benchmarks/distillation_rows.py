"""The rows of `distillation.py`: what each trains, what it makes before that, and what it is measured by."""

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from composed_scores import SEED as SCORED_SEED
from composed_scores import composed_split, split_scores

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import write_composed
from sam3_hf.data.words import SEEN_PHRASES, some_phrases

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
TEACHER = "TEACHER"  # in settings: the folder of the teacher
SEED = 20_000  # of the pictures to learn from, plus that of the run
CONCEPTS, TRAINED = 12, 2  # of the rows on forgetting; the first are among the second, so that the teacher knows all
SHALLOW = {"detr_decoder_layers": 4}  # all else as in the teacher
HALF = {"vision_hidden_size": 64, "vision_num_hidden_layers": 4}


class World(NamedTuple):
    """Where scores are taken from, and which of them the table shows."""

    splits: tuple[str, ...]
    figures: tuple[str, ...]


WORLDS = {
    "composed": World(("seen", "unseen", "dense"), ("segm_AP", "segm_cgF1")),
    "concepts": World(("trained", "others"), ("segm_AP",)),
    "folder": World(("validation",), ("bbox_AP",)),
}


def teachers_labels(folder: Path, arguments: Namespace) -> dict:
    """Draws the pictures of the other rows, and has the teacher label them by the command that users have."""
    drawn, labelled = folder / "data" / "drawn", folder / "data" / "labelled"
    true = drawn / "valid" / "_annotations.coco.json"
    if not true.is_file():  # it is written last; pictures that are drawn again would be labelled again
        size = Sam3LiteConfig.from_pretrained(arguments.teacher).image_size
        write_composed(drawn, {"train": arguments.train_images, "valid": 1}, size, SEED + arguments.seed)
    prompts = [word for phrase in SEEN_PHRASES for word in ("--prompt", phrase)]
    command = ["label", drawn / "train", "--model", arguments.teacher, *prompts, "--output", labelled]
    call = "from sam3_hf.cli import app; app()"
    words = [*map(str, command), "--valid-share", "0", "--workers", "0"]
    subprocess.run([sys.executable, "-c", call, *words], check=True)
    return {
        "data": str(labelled / "train" / "_annotations.coco.json"),
        "validation_data": str(true),
    }


def retained_phrases(folder: Path, arguments: Namespace) -> dict:
    """Writes what shall not be forgotten into a file."""
    file = folder.parent / f"{folder.name}.txt"
    file.write_text("\n".join(untrained()) + "\n", encoding="utf-8")
    return {"retain_phrases": str(file)}


def untrained() -> list[str]:
    """The concepts that are scored and not trained."""
    return [phrase for phrase in some_phrases(CONCEPTS) if phrase not in some_phrases(TRAINED)]


class Row(NamedTuple):
    """
    Attributes:
        settings: of the trainer, beside those of `config`; None takes one out.
        prepare: is called with the folder of the run, and returns further settings.
        teacher: the row whose result is the teacher, instead of that of the command line.
    """

    settings: dict
    world: str = "composed"
    config: Path = CONFIGS / "distill_tiny.yaml"
    prepare: Callable[[Path, Namespace], dict] | None = None
    teacher: str | None = None


def plus(**settings) -> Row:
    """Without labels unless settings say otherwise, with all decoder layers."""
    return Row({"preset": "tiny-plus", **settings})


LABELS_ALONE = {"preset": "tiny-plus", "teacher": None, "init": TEACHER, "feature_steps": None}
AS_IT_IS = {"preset": "tiny-standard", "init": TEACHER, "calibrate": None}
MAPPED = {"calibrate": None, "feature_steps": 0.25, "learning_rate": 2e-4}
FINE_TUNED = {**AS_IT_IS, "generated_concepts": TRAINED, "learning_rate": 1e-4}  # of weights that are good already
ROWS = {
    "start": plus(learning_rate=1e-9),  # with --steps 1: what "plus" starts from, moved by nothing that can be seen
    "plus": plus(),
    "plus-mapped": plus(**MAPPED),
    "tiny": plus(preset="tiny"),
    "tiny-without-queries": plus(preset="tiny", distill_queries_weight=0.0),
    "tiny-mapped": plus(preset="tiny", **MAPPED),
    "half": plus(model_overrides=HALF),
    "decoder-alone": plus(preset="tiny-standard", model_overrides=SHALLOW, learning_rate=1e-4),
    "labels": Row(LABELS_ALONE),
    "labels-and-teacher": plus(label_loss_weight=0.1),
    "teachers-labels": Row(LABELS_ALONE, prepare=teachers_labels),
    "features": plus(feature_steps=1.0),
    "without-masks": plus(distill_masks_weight=0.0, distill_semantic_weight=0.0),
    "without-presence": plus(distill_presence_weight=0.0),
    "without-queries": plus(distill_queries_weight=0.0),
    "feature-phase": plus(feature_steps=0.25),
    "two-concepts": Row({**FINE_TUNED, "teacher": None, "feature_steps": None}, world="concepts"),
    "two-concepts-retained": Row(
        {**FINE_TUNED, "label_loss_weight": 0.1, "feature_steps": 0.0}, world="concepts", prepare=retained_phrases
    ),
    "bccd-teacher": Row({**AS_IT_IS, "num_queries": 60}, world="folder", config=CONFIGS / "tiny_cpu.yaml"),
    "bccd": Row({"preset": "tiny-plus"}, world="folder", teacher="bccd-teacher"),
}


def scores_of(source: Path, world: str, arguments: Namespace) -> dict[str, dict]:
    """{split: scores} of a model."""
    model = Sam3LiteModel.from_pretrained(source, preset="same", dtype=torch.float32)
    processor = Sam3LiteProcessor.of_source(source, model.config)
    with tempfile.TemporaryDirectory() as folder:
        splits = splits_of(world, Path(folder), model.config.image_size, arguments)
        return {name: split_scores(model, processor, data, 8) for name, data in splits}


def splits_of(world: str, folder: Path, image_size: int, arguments: Namespace) -> Iterable[tuple[str, EvalDataset]]:
    """The splits of a world; pictures are drawn into `folder`."""
    if world == "composed":
        for name in WORLDS[world].splits:
            yield name, composed_split(folder, name, arguments.images, image_size)
    elif world == "concepts":
        write_composed(folder, {"valid": arguments.images}, image_size, SCORED_SEED, CONCEPTS)
        file = folder / "valid" / "_annotations.coco.json"
        rows, others = load_dataset_splits({"test": file}, check_images=False)["test"], untrained()
        numbers = [number for number, phrase in enumerate(some_phrases(CONCEPTS)) if phrase in others]
        asked = [number for number in range(CONCEPTS) if number not in numbers], numbers
        for name, categories in zip(WORLDS[world].splits, asked, strict=True):
            yield name, EvalDataset(rows, image_size, categories)
    else:
        yield "validation", EvalDataset(load_dataset_splits(arguments.data)["validation"], image_size)
