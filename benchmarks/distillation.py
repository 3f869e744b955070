"""
How near a smaller model comes to its teacher, by what it learns from: one command per row.

    python benchmarks/distillation.py run plus --seed 0 --output OUT
    python benchmarks/distillation.py run labels --seed 0 --output OUT --steps 1000
    python benchmarks/distillation.py table --output OUT

Each row is a run of the trainer with training/configs/distill_tiny.yaml and a few settings of its own, on pictures of
the composed world that neither the teacher was trained on nor the scores are taken from. A row that was interrupted
goes on; one that is done is not done again. Without --teacher it is the packaged tiny-standard.
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
from composed_scores import composed_split, split_scores

import sam3_hf
from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.files import write_file

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "training" / "configs" / "distill_tiny.yaml"
TEACHER = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"
SPLITS = ("seen", "unseen", "dense")
SEED = 20_000  # of the pictures, plus that of the run
HALF = {"vision_hidden_size": 64, "vision_num_hidden_layers": 4}
ROWS: dict[str, dict] = {  # settings of the trainer; TEACHER stands for the folder of the teacher
    "plus": {"preset": "tiny-plus"},
    "plus-calibrated": {"preset": "tiny-plus", "calibrate": True},
    "tiny": {"preset": "tiny"},
    "tiny-calibrated": {"preset": "tiny", "calibrate": True},
    "half": {"preset": "tiny-plus", "model_overrides": HALF},
    "labels": {"preset": "tiny-plus", "teacher": None, "init": "TEACHER", "feature_steps": None},
    "labels-and-teacher": {"preset": "tiny-plus", "label_loss_weight": 0.1},
    "features": {
        "preset": "tiny-plus",
        "feature_steps": 1.0,
    },
    "without-masks": {"preset": "tiny-plus", "distill_masks_weight": 0.0, "distill_semantic_weight": 0.0},
    "without-presence": {"preset": "tiny-plus", "distill_presence_weight": 0.0},
    "without-feature-phase": {"preset": "tiny-plus", "feature_steps": 0.0},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score one row")
    run.add_argument("row", choices=ROWS)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--steps", type=int, default=1000)
    run.add_argument("--images", type=int, default=100, help="pictures of each split to score on")
    run.add_argument("--train-images", type=int, default=3000, help="pictures to learn from")
    run.add_argument("--teacher", type=Path, default=TEACHER)
    run.add_argument("--output", type=Path, required=True)
    commands.add_parser("table", help="print the results as Markdown").add_argument(
        "--output", type=Path, required=True
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if arguments.command == "table":
        logger.info("%s", table(arguments.output))
        return
    teacher = arguments.output / "teacher.json"
    if not teacher.is_file():
        write_file(teacher, json.dumps(scores_of(arguments.teacher, arguments.images), indent=1) + "\n")
    target = arguments.output / f"{arguments.row}_seed{arguments.seed}_steps{arguments.steps}.json"
    if not target.is_file():
        folder = arguments.output / "runs" / target.stem
        train(folder, arguments)
        record = {"row": arguments.row, "seed": arguments.seed, "steps": arguments.steps}
        write_file(target, json.dumps(record | scores_of(folder / "final", arguments.images), indent=1) + "\n")
        shutil.rmtree(folder / "data")
    logger.info("%s", target.read_text(encoding="utf-8"))


def train(folder: Path, arguments: argparse.Namespace) -> None:
    """Runs the trainer, or goes on with it, as a process of its own."""
    teacher = str(arguments.teacher.resolve())
    settings = {
        "teacher": "TEACHER",
        "data": "composed",
        "generated_train": arguments.train_images,
        "generated_valid": 1,  # the scores are taken from other pictures, after the run
        "generated_concepts": None,
        "seed": SEED + arguments.seed,
        "max_steps": arguments.steps,
        "eval_every_epochs": 10**6,
        "save_every_steps": 200,
        "prediction_images": 0,
        "output_dir": str(folder.resolve()),
        "resume": "auto",
        **ROWS[arguments.row],
    }
    own = {"teacher", "feature_steps", "generated_concepts"} | settings.keys()
    lines = [line for line in CONFIG.read_text(encoding="utf-8").splitlines() if line.split(":")[0] not in own]
    for name, value in settings.items():
        if value is not None:
            lines.append(f"{name}: {json.dumps(teacher if value == 'TEACHER' else value)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "sam3_hf.training", str(config)], check=True, cwd=ROOT)


def scores_of(source: Path, images: int, splits: tuple[str, ...] = SPLITS) -> dict[str, dict]:
    """{split: scores} of a model."""
    model = Sam3LiteModel.from_pretrained(source, preset="same", dtype=torch.float32)
    processor = Sam3LiteProcessor.of_source(source, model.config)
    with tempfile.TemporaryDirectory() as folder:
        data = {split: composed_split(Path(folder), split, images, model.config.image_size) for split in splits}
        return {split: split_scores(model, processor, each, 8) for split, each in data.items()}


def table(output: Path) -> str:
    """Segm AP and cgF1 of every row, means over seeds, with their share of the teacher's."""
    teacher = json.loads((output / "teacher.json").read_text(encoding="utf-8"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*_seed*.json"))]
    names = [(split, score) for split in SPLITS for score in ("segm_AP", "segm_cgF1")]
    lines = ["| row | steps | seeds | " + " | ".join(f"{split} {score}" for split, score in names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    whole = [f"{teacher[split][score]:.3f}" for split, score in names]
    lines.append(f"| teacher | – | – | {' | '.join(whole)} |")
    for row in ROWS:
        for steps in sorted({record["steps"] for record in records if record["row"] == row}):
            own = [record for record in records if (record["row"], record["steps"]) == (row, steps)]
            cells = []
            for split, score in names:
                mean = statistics.mean(record[split][score] for record in own)
                cells.append(f"{mean:.3f} ({mean / teacher[split][score]:.1%})")
            lines.append(f"| {row} | {steps} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
