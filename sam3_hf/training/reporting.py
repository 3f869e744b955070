"""What a run tells: the log, the progress bar, metrics.jsonl and services such as TensorBoard."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from tqdm import tqdm

from ..files import write_file
from .trackers import Trackers

logger = logging.getLogger(__name__)

UNDEFINED = (None, -1)  # scores without anything to find: cgF1 and MCC are None then, COCO's AP is -1


def set_up_logging(output_dir: Path, is_main: bool) -> None:
    """INFO to the console and to OUTPUT_DIR/logs/train.log in the main process, errors alone in the others."""
    logging.raiseExceptions = False  # a log that cannot be written, as on a full disk, is not worth a traceback
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    for library in (
        "httpx",
        "datasets",
        "accelerate",
        "filelock",
        "matplotlib",
        "PIL",
        "fsspec",
        "absl",
        "faster_coco_eval",
    ):
        logging.getLogger(library).setLevel(logging.WARNING if is_main else logging.ERROR)
    handlers = [_TqdmHandler()]
    if not is_main:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    if is_main:
        (output_dir / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(output_dir / "logs" / "train.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)


class _TqdmHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record):
        if getattr(record, "on_bar", False):
            return  # the progress bar shows it already
        tqdm.write(self.format(record), file=sys.stderr)


class Metrics:
    """Scores by step, one JSON object a line in metrics.jsonl and as curves in services; main process only."""

    def __init__(
        self,
        output_dir: Path,
        step: int,
        evaluated: int,
        report_to: Sequence[str] = ("tensorboard",),
        settings: dict | None = None,
    ):
        """
        Args:
            step: the step that the run stands at; what a killed run wrote after it is removed.
            evaluated: the same for its last evaluation.
            report_to: names of services.
            settings: of the run, by name, for the services.

        Raises:
            RuntimeError: a service cannot be started.
        """
        self.path = output_dir / "metrics.jsonl"
        self.trackers = Trackers(report_to, output_dir, step, settings or {})
        truncate_metrics(self.path, step, evaluated)

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends one line: {"kind", "step", ...values}. Numbers go to the services as `kind/name`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.trackers.log(kind, step, values)

    def close(self) -> None:
        self.trackers.finish()


def truncate_metrics(path: Path, step: int, evaluated: int) -> None:
    """
    Removes the lines after a step, those of evaluations after `evaluated`, and a last one that was cut short; at step
    0 all, as what is measured before the first step is measured again.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]  # the process may end within a line
    last = {"eval": evaluated}
    kept = [line for line, entry in whole if step and entry["step"] <= last.get(entry["kind"], step)]
    write_file(path, "".join(kept))


class Speed:
    """Images per second and the share of time spent waiting for data, since `read` was last called."""

    def __init__(self):
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    def waiting_for(self, items: Iterator) -> Iterator:
        """The items; the time until each is there counts as waiting."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def count(self, images: int) -> None:
        self._images += images

    def images_per_second(self) -> float:
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def read(self) -> dict[str, float]:
        """The two figures; starts anew."""
        waited = self._waited / max(time.perf_counter() - self._start, 1e-9)
        figures = {"images_per_second": self.images_per_second(), "data_wait": waited}
        self.__init__()
        return figures


def progress_bar(step: int, total_steps: int, is_main: bool) -> tqdm:
    """A bar on the terminal of the main process; none where output goes to a file."""
    return tqdm(total=total_steps, initial=step, unit="step", disable=None if is_main else True, dynamic_ncols=True)


def log_step(step: int, total_steps: int, images_per_step: int, values: dict, bar: tqdm) -> None:
    """A line for the log, which has no progress bar: {"loss", "lr", "images_per_second", ...}."""
    logger.info(
        "step %d/%d, epoch %.2f: loss %.4f, lr %.2e, %.1f images/s, %.0f%% of the time waiting for data, %.2f GB, "
        "%d overflows, %s of training left",
        step,
        total_steps,
        values["epoch"],
        values["loss"],
        values["lr"],
        values["images_per_second"],
        100 * values["data_wait"],
        values["memory_gb"],
        values["overflows"],
        tqdm.format_interval(seconds_left(total_steps - step, images_per_step, values["images_per_second"])),
        extra={"on_bar": not bar.disable},
    )


def seconds_left(steps: int, images_per_step: int, images_per_second: float) -> float:
    """How long so many steps take at this speed; evaluations come on top."""
    return steps * images_per_step / max(images_per_second, 1e-9)


def main_scores(scores: dict) -> dict[str, float]:
    """The scores that a reader wants first, as far as they are defined."""
    kinds = [kind for kind in ("segm", "bbox") if f"{kind}_AP" in scores]
    names = [f"{kind}_{name}" for kind in kinds for name in ("AP", "AP50", "cgF1")]
    return {name: scores[name] for name in [*names, "IL_MCC", "loss"] if scores.get(name) not in UNDEFINED}


def log_scores(epoch: float, scores: dict) -> None:
    """The main scores of an evaluation, and a table of those per class."""
    shown = main_scores(scores) | {name: value for name, value in scores.items() if name.startswith("retention_")}
    figures = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    logger.info("epoch %.2f, validation: %s", epoch, figures)
    if scores["IL_MCC"] is None:
        logger.info("cgF1 and IL_MCC are not defined: every picture has every concept, or none has any")
    kind = "segm" if "segm_AP" in scores else "bbox"
    classes = scores[f"{kind}_per_class"]
    shown = {name: values for name, values in classes.items() if values["objects"]}
    for name, values in shown.items():
        defined = [key for key in ("AP", "AP50", "cgF1") if values[key] not in UNDEFINED]
        figures = ", ".join(f"{key} {values[key]:.4f}" for key in defined)
        logger.info("  %-24s %s %s, %d objects", name, kind, figures, values["objects"])
    if not shown:
        logger.info("AP is not defined: the pictures show no object of any class")
    elif len(shown) < len(classes):
        logger.info("  and %d classes of which the pictures show no object", len(classes) - len(shown))


def memory_gb(device: torch.device) -> float:
    """Peak of the tensors on the GPU in GB, or what the process holds now where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
