"""What FP16 training costs in accuracy and in skipped steps: the demo in float32 and in emulated FP16, by seed.

    python benchmarks/fp16_recipe.py --seeds 1 2 3
    python benchmarks/fp16_recipe.py --seeds 1 --steps 40 --precisions fp16 --init-scale 65536

Each row is a run of its own, in a process of its own, on one thread of the CPU; see `fp16_emulation.py` for FP16. The
seed is that of the data and of the training. `skipped` counts the steps whose gradients overflowed, `last skipped` is
the last of them, `scale` the loss scale at the end; `train loss` is the mean of the last 20 steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from common import parser, reporting

from sam3_hf.precision_sam3_lite import precision_name
from sam3_hf.training import main as trainer

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "demo.yaml"
PROGRAMS = {
    "fp32": ["-m", trainer.__package__],
    "fp16": [str(Path(__file__).with_name("fp16_emulation.py"))],
}
SCORES = {"segm AP": "segm_AP", "segm AP50": "segm_AP50", "valid loss": "loss"}


def train(folder: Path, precision: str, settings: list[str]) -> None:
    """
    Raises:
        subprocess.CalledProcessError: the run failed; what it said is printed.
    """
    command = [sys.executable, *PROGRAMS[precision], str(CONFIG), "--output_dir", str(folder), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=CONFIG.parents[2], env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.stderr.write(finished.stderr)
        finished.check_returncode()


def outcome(folder: Path) -> dict:
    """Steps, skipped steps, losses and scores of a run in `folder`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    overflows = [line["overflows"] for line in steps]
    skipped = [step for step, (before, now) in enumerate(pairwise([0, *overflows]), start=1) if now > before]
    losses = [line["loss"] for line in steps[-20:]]
    final = [line for line in lines if line["kind"] == "eval"][-1]
    scaler = folder / "checkpoints" / "last" / "scaler.pt"
    return {
        "steps": len(steps),
        "skipped": len(skipped),
        "last skipped": skipped[-1] if skipped else None,
        "scale": torch.load(scaler)["scale"] if scaler.is_file() else None,
        "train loss": sum(losses) / len(losses),
        **{name: final[score] for name, score in SCORES.items()},
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--steps", type=int, help="per run; default: those of the demo")
    options.add_argument("--images", type=int, help="for training; default: those of the demo")
    options.add_argument("--precisions", nargs="+", type=precision_name, choices=PROGRAMS, default=list(PROGRAMS))
    options.add_argument("--init-scale", type=float, help="loss scale to start from in FP16; default: the trainer's")
    arguments = options.parse_args()
    with reporting(arguments) as (rows, _):
        for seed in arguments.seeds:
            for precision in arguments.precisions:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / "run"
                    train(run, precision, settings(arguments, seed, precision))
                    rows.append({"seed": seed, "precision": precision, **outcome(run)})


def settings(arguments: argparse.Namespace, seed: int, precision: str) -> list[str]:
    """Flags of the trainer, or of the emulation."""
    flags = ["--seed", str(seed), "--log_every_steps", "1", "--prediction_images", "0"]
    if arguments.steps is not None:
        flags += ["--max_steps", str(arguments.steps)]
    if arguments.images is not None:
        flags += ["--generated_train", str(arguments.images)]
    if precision == "fp16" and arguments.init_scale is not None:
        flags += ["--init-scale", str(arguments.init_scale)]
    return flags


if __name__ == "__main__":
    main()
