"""Services that a run reports to, through Accelerate's trackers."""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from ..errors import one_line
from ..files import write_file

logger = logging.getLogger(__name__)

PROJECT = "sam3-lite"
TRACKERS_FILE = "trackers.json"  # in the output folder: the run's id with each service, and what was reported last
CONTINUED = {"wandb": lambda run: run.id, "mlflow": lambda run: run.info.run_id}  # how a service names a run
SHOWN_SIDE = (
    1280  # pixels; pictures are shrunk to this, as those of a camera would fill a disk evaluation by evaluation
)


def check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
        ImportError: the library of a service is not installed.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder that a service left here is no library
            raise ImportError(f"report_to: {name} is not installed: pip install {name}, or leave it out")


class Trackers:
    """
    Services that are told the figures of a run.

    A run that was killed does steps again that it had reported. TensorBoard drops what came after the checkpoint;
    wandb and mlflow go on with their run and are not told twice; others begin a run of theirs anew.
    """

    def __init__(self, names: Sequence[str], output_dir: Path, step: int, settings: dict):
        """
        Args:
            names: of the services.
            step: the step that the run stands at; 0 begins anew with each service.
            settings: of the run, by name.

        Raises:
            RuntimeError: a service cannot be started, as without a login.
            ValueError: what is known of the run's services cannot be read.
        """
        self._file, self._running = output_dir / TRACKERS_FILE, {}
        self._ids, self._reported = _known(self._file) if step else ({}, {})
        for name in names:
            try:
                self._running[name] = _start(name, output_dir, step, settings, self._ids.get(name))
            except Exception as error:  # each service has its own
                raise RuntimeError(f"report_to: {name} does not start: {one_line(error)}") from error
        self._told = {name: dict(self._reported) if name in self._ids else {} for name in self._running}
        self._ids |= {name: CONTINUED[name](self._running[name].tracker) for name in CONTINUED if name in names}

    def log(self, kind: str, step: int, values: dict) -> None:
        """
        Args:
            kind: "train", "eval" and so on.
            values: numbers, as `kind/name`, and tables of numbers per class, as `kind_name/number/class`.
        """

        def send(name: str, tracker: GeneralTracker) -> None:
            if name == "wandb":  # its own steps only rise, and a run may go on with an evaluation of an earlier one
                tracker.log({**scalars, "step": step})
            else:
                tracker.log(scalars, step=step)

        scalars = scalars_of(kind, values)
        self._send(kind, step, send)

    def show(self, kind: str, step: int, pictures: Sequence[Path]) -> None:
        """Sends pictures, as `kind/stem`, to the services that take them; others are left out."""

        def send(name: str, tracker: GeneralTracker) -> None:
            if name == "tensorboard":
                tracker.log_images({key: pixels[None] for key, pixels in shown.items()}, step, dataformats="NHWC")
            elif name == "wandb":
                import wandb

                tracker.log({**{key: wandb.Image(pixels) for key, pixels in shown.items()}, "step": step})
            elif name == "mlflow":
                for path in pictures:
                    tracker.log_artifact(str(path), f"{kind}/step_{step}")

        shown = {f"{kind}/{path.stem}": _pixels(path) for path in pictures}
        if shown:
            self._send(kind, step, send)

    def _send(self, kind: str, step: int, send: Callable[[str, GeneralTracker], None]) -> None:
        self._reported[kind] = max(step, self._reported.get(kind, 0))
        if self._ids:
            write_file(self._file, json.dumps({"ids": self._ids, "reported": self._reported}))
        for name, tracker in list(self._running.items()):
            if step <= self._told[name].get(kind, -1):
                continue
            try:
                send(name, tracker)
            except Exception as error:  # the run is worth more than its curves
                logger.warning(
                    "report_to: %s fails and is told nothing more; metrics.jsonl has it all: %s", name, one_line(error)
                )
                del self._running[name]

    def finish(self) -> None:
        for tracker in self._running.values():
            tracker.finish()


def _known(file: Path) -> tuple[dict[str, str], dict[str, int]]:
    """The run's id with each service, and the last step that was reported of each kind."""
    if not file.is_file():
        return {}, {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return known["ids"], known["reported"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: delete it, and services other than tensorboard get new runs") from None


def _start(name: str, output_dir: Path, step: int, settings: dict, known: str | None) -> GeneralTracker:
    """
    Args:
        known: the id that the service has for the run, if it goes on.
    """
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", output_dir, purge_step=step and step + 1)
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        same = {} if known is None else {"id": known, "resume": "allow"}
        tracker = kind(project, name=output_dir.resolve().name, dir=str(output_dir), **same)
    elif name == "mlflow":
        tracker = kind(PROJECT, run_name=output_dir.resolve().name, run_id=known)
    else:
        tracker = kind(PROJECT, output_dir) if kind.requires_logging_directory else kind(PROJECT)
    tracker.start()
    if name == "wandb":
        tracker.tracker.define_metric("*", step_metric="step")
    if name != "tensorboard" and known is None:
        tracker.store_init_configuration(settings)
    return tracker


def scalars_of(kind: str, values: dict) -> dict[str, float]:
    """
    The numbers of a line of metrics.jsonl as services name them, which do not take all characters; what is not defined
    per class is left out.
    """
    scalars = {f"{kind}/{_plain(name)}": value for name, value in values.items() if isinstance(value, (int, float))}
    for table, classes in values.items():
        if table.endswith("_per_class"):
            for label, numbers in classes.items():
                for name in ("AP", "AP50", "cgF1"):
                    if numbers[name] not in (-1, None):
                        scalars[f"{kind}_{table}/{name}/{_plain(label)}"] = numbers[name]
    return scalars


def _plain(name: str) -> str:
    return re.sub(r"[^-\w.]", "_", name)


def _pixels(path: Path) -> np.ndarray:
    """(height, width, 3) uint8."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.array(picture)
