"""The trainer as a process of its own, on generated pictures and a model of the smallest sizes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import warm
import yaml
from conftest import HUNG, micro_config

SCRIPT = [str(Path(__file__).parents[1] / "training" / "train.py")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MICRO = micro_config(detr_encoder_layers=1).to_dict()
SETTINGS = {
    "preset": "tiny",
    "model_overrides": {name: value for name, value in MICRO.items() if name.endswith("_config")},
    "prompts_per_image": 3,
    "num_workers": 1,
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "log_every_steps": 1,
    "eval_batch_size": 2,
    "prediction_images": 0,
    "output_dir": "run",
}


def launcher(folder: Path, patch: str) -> list[str]:
    """A program that runs the trainer after a few lines that break something."""
    path = folder / "patched.py"
    path.write_text(f"import os, sys\n{patch}\nfrom sam3_hf.training.main import main\nsys.exit(main())\n")
    return [str(path)]


def command(folder: Path, data: Path | str, program: list[str], **settings) -> list[str]:
    """Writes config.yaml, and says what Python is to run in the folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": str(data), **settings}))
    return [*program, "config.yaml"]


def environment() -> dict:
    """That of a run on the CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def train(
    folder: Path,
    data: Path | str,
    *flags: str,
    program: list[str] = SCRIPT,
    fresh: bool = False,
    together: bool = False,
    **settings,
) -> subprocess.CompletedProcess:
    """
    Runs to the end; the finished process, with `stdout` and `stderr`. Whatever it leaves running is ended.

    Args:
        program: what Python runs.
        fresh: whether the interpreter starts anew instead of with the libraries loaded.
        together: whether `stdout` holds `stderr` as well.
    """
    arguments = [*command(folder, data, program, **settings), *flags]
    if fresh:
        return train_anew(folder, arguments, together)
    return warm.run(arguments, folder, environment(), together=together)


def train_in_two(folder: Path, data: Path | str, *flags: str, together: bool = False, **settings):
    """As `train`, in two processes that know each other as those of torchrun do."""
    arguments = [*command(folder, data, SCRIPT, **settings), *flags]
    return warm.run_two(arguments, folder, environment(), together=together)


def train_anew(folder: Path, arguments: list[str], together: bool) -> subprocess.CompletedProcess:
    """In an ordinary process: pipes stay open as long as there is a process that could write to them."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=HUNG)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def error_of(finished: subprocess.CompletedProcess) -> str:
    """The one line that a run ended with."""
    lines = [line for line in finished.stderr.splitlines() if "Error" in line or "Traceback" in line]
    assert len(lines) == 1 and finished.stderr.splitlines()[-1] == lines[0], finished.stderr
    assert finished.returncode == 2
    return lines[0]


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())
