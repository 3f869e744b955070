"""
How good smaller models are that start from a larger one, by how they start: before any training, and how many steps
of fine-tuning it takes to come near the larger one.

    python benchmarks/mapping_quality.py flatten training/configs/tiny_standard.yaml --output OUT --teacher TEACHER \\
        --flat OUT/flat_teacher
    python benchmarks/mapping_quality.py run training/configs/tiny_standard.yaml --output OUT --teacher TEACHER \\
        --name trained --seeds 0 --max-steps 600 --learning-rates 2e-4 5e-4
    python benchmarks/mapping_quality.py run training/configs/tiny_standard.yaml --output OUT --teacher TEACHER \\
        --name trained --seeds 1 2 --max-steps 600 --learning-rates best
    python benchmarks/mapping_quality.py table --output OUT

Students have 3/4 of the teacher's ViT width and depth, and 4 DETR layers for its 6; with `-plus`, all 6 of the
decoder. The YAML file and any flag of `training/train.py` say what they are trained on and how, but the schedule: a
short warm-up, then a constant learning rate, or with `--schedule cosine` one that falls to a hundredth; scored with
averaged weights. With `data: generated` or `composed`, the pictures scored on come from another seed than those
trained on; in the composed world, students are also scored on unseen combinations and on dense pictures. Each result
is a JSON file of its own under OUT/results: what is there is not done again, and runs with other strategies or another
--name may share OUT at the same time, once OUT/data is written.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
from mapping_measures import captured_energy, fpn_cosines, scores_of
from mapping_students import IDENTITY, PARTS, STRATEGIES, make_student
from mapping_table import TARGETS, best_learning_rate, constant_runs, table
from mapping_training import FlatLabels, fine_tune

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import write_composed
from sam3_hf.data.generated import write_dataset
from sam3_hf.data.words import SCORED_PHRASES
from sam3_hf.files import write_file, write_folder
from sam3_hf.training.accelerator import start_accelerator
from sam3_hf.training.arguments import Arguments, parse_arguments
from sam3_hf.training.data import load_data
from sam3_hf.training.objectives import Labels

logger = logging.getLogger(__name__)

ANNOTATIONS = "_annotations.coco.json"
HELD_OUT_SEED = 10_000  # added to the seed of the training pictures
WARMUP_STEPS = 20
AVERAGE_DECAY = 0.98  # of the weights that are scored: a constant rate leaves noise that an average takes out
SCHEDULES = {"constant": 1.0, "cosine": 0.01}  # share of the learning rate at the end
COMPOSED_SPLITS = ("seen", "unseen", "dense")
GIVEN = ("seed", "learning_rate", "max_steps", "warmup_ratio", "final_learning_rate_ratio", "ema_decay", "output_dir")


def main(argv: list[str] | None = None) -> None:
    """Runs one of the subcommands."""
    parser, arguments, trainer_flags = parse(argv)
    output = Path(arguments.output)
    if arguments.command == "table":
        sys.stdout.write("\n".join(table(*read_results(folder)) for folder in sorted((output / "results").glob("*"))))
        return
    clash = [flag for flag in trainer_flags if flag.lstrip("-").split("=")[0] in GIVEN]
    if clash:
        parser.error(f"{clash[0]} is set by the benchmark itself")
    check_settings(output, arguments, trainer_flags)
    bench = Bench(arguments, trainer_flags)
    if arguments.command == "flatten":
        bench.flatten(Path(arguments.flat), arguments.steps, arguments.weight)
    else:
        bench.run()


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    """The parser, what it read, and the flags that are for the trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("config", help="YAML file of the trainer; further flags are the trainer's")
    shared.add_argument("--output", required=True, help="folder of data, students and results")
    shared.add_argument("--teacher", required=True, help="folder or Hub id of the larger model")
    shared.add_argument("--held-out", type=int, default=100, help="generated pictures to score on")
    shared.add_argument("--curve-images", type=int, default=40, help="of them, how many are scored on in training")
    shared.add_argument("--every", type=int, default=25, help="steps between two scores in training")
    flatten = commands.add_parser("flatten", parents=[shared], allow_abbrev=False, help="make a flat-spectrum teacher")
    flatten.add_argument("--flat", required=True, help="folder to write the flat teacher to")
    flatten.add_argument("--steps", type=int, default=400, help="optimizer steps")
    flatten.add_argument("--weight", type=float, default=100.0, help="of the flatness penalty beside the task's loss")
    flatten.add_argument("--learning-rates", type=float, nargs=1, default=[5e-4], help="learning rate")
    run = commands.add_parser("run", parents=[shared], allow_abbrev=False, help="measure and train students")
    run.add_argument("--name", help="of the teacher in results; default: that of its folder")
    run.add_argument(
        "--strategies",
        nargs="+",
        choices=(IDENTITY, *STRATEGIES, *PARTS),
        default=[IDENTITY, *STRATEGIES],
        help="the last three make one part smaller alone, and say which loses what (default: all others)",
    )
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--max-steps", type=int, default=600, help="of each fine-tuning; 0 only scores the students")
    run.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate")
    run.add_argument(
        "--learning-rates", nargs="+", default=["5e-4"], help="to try; `best`: the best of the results so far"
    )
    commands.add_parser("table", help="print the results as Markdown").add_argument("--output", required=True)
    return parser, *parser.parse_known_args(argv)


def check_settings(output: Path, arguments: argparse.Namespace, trainer_flags: list[str]) -> None:
    """
    Keeps results that do not compare out of one folder.

    Raises:
        ValueError: the folder holds results of other settings; the message names them.
    """
    names = ("held_out", "curve_images", "every")
    now = {name: getattr(arguments, name) for name in names}
    now |= {"config": Path(arguments.config).read_text(encoding="utf-8"), "trainer_flags": trainer_flags}
    path = output / "settings.json"
    if not path.is_file():
        write_json(path, now)
    before = json.loads(path.read_text(encoding="utf-8"))
    odd = [name for name in now if before[name] != now[name]]
    if odd:
        raise ValueError(f"{output} holds results with other {', '.join(odd)}: use another --output")


class Bench:
    """Data, teacher and results of one call of the benchmark."""

    def __init__(self, arguments: argparse.Namespace, trainer_flags: list[str]):
        self.arguments, self.trainer_flags = arguments, trainer_flags
        self.output = Path(arguments.output)
        recipe = self.recipe(seed=0, learning_rate=0.0, max_steps=1)
        self.accelerator = start_accelerator(recipe)
        self.more_held_out: dict[str, EvalDataset] = {}
        if recipe.data.data == "generated":
            self.trainer_flags = [*trainer_flags, *self.write_generated(recipe)]
        elif recipe.data.data == "composed":
            self.trainer_flags = [*trainer_flags, *self.write_composed(recipe)]
        self.teacher = Sam3LiteModel.from_pretrained(arguments.teacher, preset="same", dtype=torch.float32)
        self.teacher.to(self.accelerator.device)
        self.train_data, self.held_out = self.load_data(seed=0)
        count = min(arguments.curve_images, len(self.held_out))
        rows, categories = self.held_out.rows.select(range(count)), self.held_out.categories
        self.curve_data = EvalDataset(rows, self.held_out.image_size, categories)
        self.batch_size = recipe.output.eval_batch_size

    def recipe(self, seed: int, learning_rate: float, max_steps: int, **more: float) -> Arguments:
        """The trainer's arguments, with a constant learning rate after the warm-up, unless `more` says otherwise."""
        flags = {
            "seed": seed,
            "learning_rate": learning_rate,
            "max_steps": max_steps,
            "warmup_ratio": min(1.0, WARMUP_STEPS / max_steps),
            "final_learning_rate_ratio": 1.0,
            "ema_decay": AVERAGE_DECAY,
            "output_dir": self.output,
            **more,
        }
        own = [f"--{name}={value}" for name, value in flags.items()]
        return parse_arguments([self.arguments.config, *self.trainer_flags, *own])

    def write_generated(self, recipe: Arguments) -> list[str]:
        """Writes the generated pictures where they are not there yet; the trainer's flags that say where they are."""
        options = {"image_size": self.image_size()}
        if recipe.data.generated_concepts is not None:
            options["num_concepts"] = recipe.data.generated_concepts
        train, held_out = self.output / "data", self.output / "held_out"
        if not train.is_dir():
            write_folder(train, lambda to: write_dataset(to, recipe.data.generated_train, 0, **options))
        if not held_out.is_dir():
            count = self.arguments.held_out
            write_folder(held_out, lambda to: write_dataset(to, 0, 0, num_test=count, seed=HELD_OUT_SEED, **options))
        return data_flags(train / "train", held_out / "test")

    def write_composed(self, recipe: Arguments) -> list[str]:
        """The same for those of the composed world, and `more_held_out`."""
        size, train, held_out = self.image_size(), self.output / "data", self.output / "held_out"
        if not train.is_dir():
            counts = {"train": recipe.data.generated_train}
            write_folder(train, lambda to: write_composed(to, counts, size))
        if not held_out.is_dir():
            counts = dict.fromkeys(COMPOSED_SPLITS, self.arguments.held_out)
            write_folder(held_out, lambda to: write_composed(to, counts, size, HELD_OUT_SEED))
        for split in COMPOSED_SPLITS[1:]:
            file = held_out / split / ANNOTATIONS
            rows = load_dataset_splits({"test": file}, check_images=False)["test"]
            self.more_held_out[split] = EvalDataset(rows, size)
        return data_flags(train / "train", held_out / "seen")

    def image_size(self) -> int:
        """Side of the teacher's input in pixels."""
        return Sam3LiteConfig.from_pretrained(self.arguments.teacher).image_size

    def load_data(self, seed: int):
        """Training split with the order and augmentation of a seed, and the held-out images."""
        recipe = self.recipe(seed, learning_rate=0.0, max_steps=1)
        train, held_out = load_data(self.accelerator, recipe, self.teacher.config.image_size)
        if self.more_held_out:  # training asks for all phrases, which would take long to score
            categories = [train.concepts.index(phrase) for phrase in SCORED_PHRASES]
            held_out = EvalDataset(held_out.rows, held_out.image_size, categories)
        return train, held_out

    def all_scores(self, model) -> dict[str, dict[str, float]]:
        """ "scores" on the held-out images, and those of each of `more_held_out`."""
        data = {"scores": self.held_out, **self.more_held_out}
        return {name: scores_of(self.accelerator, model, each, self.batch_size) for name, each in data.items()}

    def flatten(self, target: Path, steps: int, weight: float) -> None:
        """Trains the teacher on with a flatter residual stream, and writes it to a folder of its own."""
        if target.exists():
            raise FileExistsError(f"{target} exists: choose another --flat")
        model, (rate,) = self.teacher, self.arguments.learning_rates
        recipe = self.recipe(0, rate, steps, final_learning_rate_ratio=0.01)

        def after(step: int, terms: dict[str, float]) -> bool:
            logger.info("step %d: loss %.2f, flatness penalty %.3f", step, terms["loss"], terms["flatness"])
            return False

        self._log_teacher("before")
        data = (self.train_data, self.curve_data)
        fine_tune(self.accelerator, model, recipe, FlatLabels(weight), data, self.arguments.every, after)
        self._log_teacher("after")
        write_folder(target, model.save_pretrained)

    def _log_teacher(self, when: str) -> None:
        scores = scores_of(self.accelerator, self.teacher, self.curve_data, self.batch_size)
        energy = captured_energy(self.teacher, self.curve_data, self.batch_size)
        logger.info("%s: %s, energy in the strongest directions %s", when, scores, energy)

    def run(self) -> None:
        """Scores each student, then trains it with each learning rate."""
        name = self.arguments.name or Path(self.arguments.teacher).name
        results = self.output / "results" / name
        teacher = self.teacher_record(results / "teacher.json", name)
        for seed in self.arguments.seeds:
            for strategy in self.arguments.strategies:
                self.start(results, strategy, seed)
                if self.arguments.max_steps == 0 or strategy == IDENTITY:
                    continue
                for rate in self.learning_rates(results, strategy):
                    self.train(results, strategy, seed, rate, teacher["curve_AP"])

    def learning_rates(self, results: Path, strategy: str) -> list[float]:
        """Those to train a strategy with."""
        given = self.arguments.learning_rates
        if given != ["best"]:
            return [float(rate) for rate in given]
        teacher, records = read_results(results)
        runs = [each for each in constant_runs(records) if each["strategy"] == strategy]
        if not runs:
            raise ValueError(f"{results} has no runs of {strategy} yet: give --learning-rates as numbers first")
        return [best_learning_rate(runs, teacher["curve_AP"])]

    def teacher_record(self, path: Path, name: str) -> dict:
        """
        What is known of the teacher; measured where it is not there yet.

        Raises:
            ValueError: the results under this name are of another teacher.
        """
        weights = fingerprint(self.teacher)
        if not path.is_file():
            record = {
                "name": name,
                "path": str(self.arguments.teacher),
                "weights": weights,
                **self.all_scores(self.teacher),
                "curve_AP": self.curve_ap(self.teacher),
                "captured_energy": captured_energy(self.teacher, self.held_out, self.batch_size),
            }
            write_json(path, record)
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["weights"] != weights:
            raise ValueError(f"{path.parent} holds results of {record['path']} with other weights: use another --name")
        return record

    def curve_ap(self, model) -> float:
        """Segm AP on the images that are scored on in training."""
        return scores_of(self.accelerator, model, self.curve_data, self.batch_size)["segm_AP"]

    def start(self, results: Path, strategy: str, seed: int) -> None:
        """Makes a student and scores it before any training."""
        path = results / f"{strategy}_seed{seed}.json"
        if path.is_file():
            return
        folder, begin = self.student_folder(results, strategy, seed), time.perf_counter()
        model = make_student(strategy, self.arguments.teacher, self.train_data, seed)
        seconds = time.perf_counter() - begin
        write_folder(folder, model.save_pretrained)
        model.to(self.accelerator.device)
        record = {
            "kind": "start",
            "strategy": strategy,
            "seed": seed,
            "seconds": round(seconds, 1),
            "parameters": model.num_parameters(),
            **self.all_scores(model),
            "fpn_cosines": fpn_cosines(self.teacher, model, self.held_out, self.batch_size),
        }
        write_json(path, record)
        logger.info("%s", record)

    def train(self, results: Path, strategy: str, seed: int, rate: float, teacher_ap: float) -> None:
        """Fine-tunes a student until it has the highest of the targets, or `--max-steps` are done."""
        schedule, max_steps = self.arguments.schedule, self.arguments.max_steps
        constant = schedule == "constant"
        suffix = "" if constant else f"_{schedule}{max_steps}"
        path = results / f"{strategy}_seed{seed}_lr{rate:g}{suffix}.json"
        goal = TARGETS[-1] * teacher_ap if constant else math.inf  # a schedule is worth what it ends with
        if path.is_file():
            done = json.loads(path.read_text(encoding="utf-8"))["curve"]
            if done[-1][0] >= max_steps or done[-1][1] >= goal:
                return
        model = Sam3LiteModel.from_pretrained(self.student_folder(results, strategy, seed), dtype=torch.float32)
        model.to(self.accelerator.device)
        curve, begin = [[0, self.curve_ap(model)]], time.perf_counter()

        def after(step: int, terms: dict[str, float]) -> bool:
            curve.append([step, self.curve_ap(model)])
            logger.info("%s, seed %d, LR %g, step %d: segm AP %.3f", strategy, seed, rate, step, curve[-1][1])
            return curve[-1][1] >= goal

        if curve[0][1] < goal:
            train_data, _ = self.load_data(seed)
            recipe = self.recipe(seed, rate, max_steps, final_learning_rate_ratio=SCHEDULES[schedule])
            data = (train_data, self.curve_data)
            fine_tune(self.accelerator, model, recipe, Labels(), data, self.arguments.every, after)
        record = {"kind": "run", "strategy": strategy, "seed": seed, "learning_rate": rate, "curve": curve}
        if not constant:
            record |= {"schedule": schedule, **self.all_scores(model)}
        write_json(path, record | {"seconds": round(time.perf_counter() - begin, 1)})

    def student_folder(self, results: Path, strategy: str, seed: int) -> Path:
        """Where a student is kept as it is before training."""
        return self.output / "students" / results.name / f"{strategy}_seed{seed}"


def data_flags(train: Path, held_out: Path) -> list[str]:
    """The trainer's flags for two folders with COCO files."""
    return [f"--data={train / ANNOTATIONS}", f"--validation_data={held_out / ANNOTATIONS}"]


def read_results(folder: Path) -> tuple[dict, list[dict]]:
    """The record of a teacher, and those of its students and their runs."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != "teacher.json"]
    teacher = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
    return teacher, [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is whole from the moment it is there."""
    write_file(path, json.dumps(content, indent=1) + "\n")


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the float32 weights, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
