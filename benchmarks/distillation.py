"""
How near a smaller model comes to its teacher, by what it learns from: one command per row.

    python benchmarks/distillation.py run plus --seed 0 --output OUT
    python benchmarks/distillation.py run labels --seed 0 --output OUT --steps 1000
    python benchmarks/distillation.py run bccd --data path/to/bccd --output OUT
    python benchmarks/distillation.py table --output OUT

Each row is a run of the trainer with training/configs/distill_tiny.yaml and a few settings of its own, on pictures of
the composed world that neither the teacher was trained on nor the scores are taken from. A row that was interrupted
goes on; one that is done is not done again. Without --teacher it is the packaged tiny-standard; results of another
one, as of a flat-spectrum teacher (`mapping_quality.py flatten`), go into another folder. Students start from the
calibrated mapping, those of the rows with `-mapped` from the one without data.

`teachers-labels` learns from what `sam3-lite label` finds in the pictures of the other rows. `two-concepts` goes on
with the teacher itself on the labels of 2 of 12 concepts, and is scored on the other 10 as well; with `-retained`,
`--retain_phrases` names these. `bccd` is for photographs, a folder that --data names: `bccd-teacher`, which it makes
first, is the teacher after so many steps on its labels, and the student learns from that without them.
"""

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import yaml
from common import row_parser
from distillation_rows import ROWS, SEED, TEACHER, WORLDS, scores_of

import sam3_hf
from sam3_hf.files import write_file
from sam3_hf.training.checksums import checksum

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
PACKAGED = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"


def main(argv: list[str] | None = None) -> None:
    parser, run = row_parser(__doc__, ROWS, steps=1000, train_images=3000)
    run.add_argument("--teacher", type=Path, default=PACKAGED, help="folder of the teacher")
    run.add_argument("--data", type=Path, help="folder in the Roboflow layout, for the rows bccd and bccd-teacher")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if arguments.command == "table":
        logger.info("%s", table(arguments.output))
        return
    if ROWS[arguments.row].world == "folder" and arguments.data is None:
        parser.error(f"{arguments.row} is for pictures of yours: name their folder with --data")
    score_teacher(ROWS[arguments.row].world, arguments)
    logger.info("%s", run_row(arguments.row, arguments).read_text(encoding="utf-8"))


def score_teacher(world: str, arguments: argparse.Namespace) -> None:
    """
    Writes the scores that those of a world are compared with, unless they are there.

    Raises:
        SystemExit: those of another teacher are.
    """
    if world == "folder":  # whose teacher is a row
        return
    file = teacher_file(arguments.output, world)
    weights = [checksum(path) for path in sorted(arguments.teacher.glob("*.safetensors"))]
    if not file.is_file():
        record = {"weights": weights} | scores_of(arguments.teacher, world, arguments)
        write_file(file, json.dumps(record, indent=1) + "\n")
    if json.loads(file.read_text(encoding="utf-8"))["weights"] != weights:
        sys.exit(f"{file} is of another teacher than {arguments.teacher}: give its results another --output")


def teacher_file(output: Path, world: str) -> Path:
    return output / ("teacher.json" if world == "composed" else f"teacher_{world}.json")


def run_row(name: str, arguments: argparse.Namespace) -> Path:
    """Trains and scores a row, or goes on with it; the file of its scores."""
    stem = f"{name}_seed{arguments.seed}_steps{arguments.steps}"
    target, folder, row = arguments.output / f"{stem}.json", arguments.output / "runs" / stem, ROWS[name]
    if not target.is_file():
        teacher = arguments.teacher
        if row.teacher is not None:
            teacher = folder.parent / run_row(row.teacher, arguments).stem / "final"
        train(row, folder, teacher, arguments)
        record = {"row": name, "seed": arguments.seed, "steps": arguments.steps}
        record |= scores_of(folder / "final", row.world, arguments)
        write_file(target, json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder / "data", ignore_errors=True)
    return target


def train(row, folder: Path, teacher: Path, arguments: argparse.Namespace) -> None:
    """Runs the trainer, or goes on with it, as a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load(row.config.read_text(encoding="utf-8")) | {
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
    }
    if "teacher" in settings:
        settings["teacher"] = TEACHER
    if row.world == "folder":
        settings["data"] = str(arguments.data.resolve())
    settings |= row.settings
    if row.prepare is not None:
        settings |= row.prepare(folder.resolve(), arguments)
    taught = {name: str(teacher.resolve()) if value == TEACHER else value for name, value in settings.items()}
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in taught.items() if value is not None}))
    subprocess.run([sys.executable, "-m", "sam3_hf.training", str(config)], check=True, cwd=ROOT)


def table(output: Path) -> str:
    """Every row, means over seeds, with their share of the teacher's; a table for each world that has results."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*_seed*.json"))]
    tables = []
    for world in WORLDS:
        own = [record for record in records if ROWS[record["row"]].world == world]
        if own:
            tables.append("\n".join(lines_of(world, own, output)))
    return "\n\n".join(tables)


def lines_of(world: str, records: list[dict], output: Path) -> list[str]:
    """The table of a world."""
    names = [(split, figure) for split in WORLDS[world].splits for figure in WORLDS[world].figures]
    lines = ["| row | steps | seeds | " + " | ".join(f"{split} {figure}" for split, figure in names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    file = teacher_file(output, world)
    teacher = [json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    for each in teacher:
        lines.append(f"| teacher | – | – | {' | '.join(f'{each[split][figure]:.3f}' for split, figure in names)} |")
    for row in ROWS:
        for steps in sorted({record["steps"] for record in records if record["row"] == row}):
            by_row = {record["row"]: [] for record in records}
            for record in records:
                if record["steps"] == steps:
                    by_row[record["row"]].append(record)
            whole = teacher or by_row[ROWS[row].teacher or row]
            cells = []
            for split, figure in names:
                mean, full = (statistics.mean(each[split][figure] for each in some) for some in (by_row[row], whole))
                cells.append(f"{mean:.3f} ({mean / full:.1%})" if full > 0 else f"{mean:.3f}")
            lines.append(f"| {row} | {steps} | {len(by_row[row])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
