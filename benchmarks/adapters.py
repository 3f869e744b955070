"""
Adapters of several ranks against full fine-tuning: what a model learns of new phrases, and what is left of the old.

    python benchmarks/adapters.py run rank-8 --seed 0 --output OUT
    python benchmarks/adapters.py run full --seed 0 --output OUT --model outputs/base --preset tiny
    python benchmarks/adapters.py table --output OUT

New are the pairs of words of the composed world that its training never combines, which are trained here on pictures
that no score is taken from (`unseen` of composed_scores.py); old are those that it asks for (`seen`). Without --model
it is the packaged tiny-standard. A row that was interrupted goes on; one that is done is not done again.
"""

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from common import row_parser
from composed_scores import composed_split, split_scores
from distillation import PACKAGED, ROOT

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data.composed import write_composed
from sam3_hf.files import write_file

logger = logging.getLogger(__name__)

NEW, OLD = "unseen", "seen"
SEED = 30_000  # of the pictures, plus that of the run
# Adapters take a higher rate: what they add starts at 0.
ROWS: dict[str, dict] = {
    "full": {"learning_rate": 2e-4},
    **{f"rank-{rank}": {"lora_rank": rank, "learning_rate": 1e-3} for rank in (4, 8, 16)},
    "rank-8-all": {"lora_rank": 8, "lora_targets": "all", "learning_rate": 1e-3},
}
SETTINGS = {
    "prompts_per_image": 4,
    "crop": 0.0,
    "smallest_side": 0.9,  # the pictures are small already
    "num_workers": 1,
    "batch_size": 4,
    "vit_layer_decay": 1.0,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "eval_every_epochs": 10**6,
    "save_every_epochs": 0,
    "save_every_steps": 100,
    "prediction_images": 0,
    "resume": "auto",
}


def main(argv: list[str] | None = None) -> None:
    parser, run = row_parser(__doc__, ROWS, steps=500, train_images=1000)
    run.add_argument("--model", type=Path, default=PACKAGED, help="where all rows start")
    run.add_argument("--preset", default="tiny-standard", help="its sizes, if it is no lite model")
    run.add_argument("--image-size", type=int, default=128, help="of the pictures to learn from")
    run.add_argument("--learning-rate", type=float, help="instead of that of the row")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if arguments.command == "table":
        logger.info("%s", table(arguments.output))
        return
    before = arguments.output / "before.json"
    if not before.is_file():
        write_file(before, json.dumps(scores_of(arguments.model, arguments.images), indent=1) + "\n")
    target = arguments.output / f"{arguments.row}_seed{arguments.seed}_steps{arguments.steps}.json"
    if not target.is_file():
        folder = arguments.output / "runs" / target.stem
        train(folder, arguments)
        record = {"row": arguments.row, "seed": arguments.seed, "steps": arguments.steps}
        record |= scores_of(folder / "final", arguments.images)
        write_file(target, json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder.parent / f"{folder.name}_data")
    logger.info("%s", target.read_text(encoding="utf-8"))


def train(folder: Path, arguments: argparse.Namespace) -> None:
    """Runs the trainer on pictures of the new phrases, or goes on with it, as a process of its own."""
    data, seed = folder.parent / f"{folder.name}_data", SEED + arguments.seed
    parts = {"train": (arguments.train_images, seed), "valid": (1, seed + 1000)}  # nothing is chosen by the latter
    for part, (count, own) in parts.items():
        write_composed(data / part, {NEW: count}, arguments.image_size, own)
    files = {part: str((data / part / NEW / "_annotations.coco.json").resolve()) for part in parts}
    settings = {
        **SETTINGS,
        **ROWS[arguments.row],
        "init": str(arguments.model.resolve()),
        "preset": arguments.preset,
        "data": files["train"],
        "validation_data": files["valid"],
        "seed": seed,
        "max_steps": arguments.steps,
        "output_dir": str(folder.resolve()),
    }
    if arguments.learning_rate is not None:
        settings["learning_rate"] = arguments.learning_rate
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "sam3_hf.training", str(config)], check=True, cwd=ROOT)


def scores_of(source: Path, images: int) -> dict[str, dict]:
    """{split: scores} of a model on `images` pictures of each."""
    model = Sam3LiteModel.from_pretrained(source, preset="same", dtype=torch.float32)
    processor = Sam3LiteProcessor.of_source(source, model.config)
    with tempfile.TemporaryDirectory() as folder:
        data = {split: composed_split(Path(folder), split, images, model.config.image_size) for split in (NEW, OLD)}
        return {split: split_scores(model, processor, each, 8) for split, each in data.items()}


def table(output: Path) -> str:
    """Segm AP and cgF1 of every row on new and old phrases, means over seeds."""
    before = json.loads((output / "before.json").read_text(encoding="utf-8"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*_seed*.json"))]
    names = [(split, score) for split in (NEW, OLD) for score in ("segm_AP", "segm_cgF1")]
    titles = [f"{'new' if split == NEW else 'old'} {score}" for split, score in names]
    lines = [f"| row | steps | seeds | {' | '.join(titles)} |", "|---" * (3 + len(names)) + "|"]
    lines.append(f"| before | 0 | – | {' | '.join(f'{before[split][score]:.3f}' for split, score in names)} |")
    for row in ROWS:
        for steps in sorted({record["steps"] for record in records if record["row"] == row}):
            own = [record for record in records if (record["row"], record["steps"]) == (row, steps)]
            means = [statistics.mean(record[split][score] for record in own) for split, score in names]
            lines.append(f"| {row} | {steps} | {len(own)} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
