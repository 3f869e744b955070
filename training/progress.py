"""What a run tells: the log, the progress bar, metrics.jsonl and TensorBoard."""

import json
import logging
import os
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger(__name__)


def set_up_logging(output_dir: Path, is_main: bool) -> None:
    """INFO to the console and to OUTPUT_DIR/logs/train.log in the main process, errors alone in the others."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    for library in ("httpx", "datasets", "accelerate", "filelock", "matplotlib", "PIL", "fsspec", "absl"):
        logging.getLogger(library).setLevel(logging.WARNING if is_main else logging.ERROR)
    handlers = [_TqdmHandler()]
    if is_main:
        (output_dir / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(output_dir / "logs" / "train.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)


class _TqdmHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


class Metrics:
    """Scalars by step, one JSON object a line in metrics.jsonl and as curves in tensorboard/; main process only."""

    def __init__(self, output_dir: Path, step: int):
        """
        Args:
            step: the step that the run stands at; what a killed run wrote after it is removed.
        """
        self.path = output_dir / "metrics.jsonl"
        truncate_metrics(self.path, step)
        self.writer = SummaryWriter(output_dir / "tensorboard", purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends one line: {"kind", "step", ...values}. Numbers go to TensorBoard as `kind/name`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


def truncate_metrics(path: Path, step: int) -> None:
    """Removes the lines after a step, and a last one that was cut short."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _step_of(line: str) -> float:
    if not line.endswith("\n"):
        return float("inf")  # the process ended within this line
    return json.loads(line)["step"]


class Speed:
    """Images per second and the share of time spent waiting for data, since `read` was last called."""

    def __init__(self):
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def images(self, count: int) -> None:
        self._images += count

    def read(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        result = {"images_per_second": self._images / elapsed, "data_wait": self._waited / elapsed}
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0
        return result


def memory_gb(device: torch.device) -> float:
    """Peak of the tensors on the GPU in GB, or what the process holds now where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
