"""A run after its start: what it trains with, where it stands, and what it writes."""

import logging
import math
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import broadcast_object_list, set_seed

from ..data import BatchKeys, EvalDataset, make_loader, steps_per_epoch
from ..data.workers import batches_of
from ..evaluation.cgf1 import presence_is_defined
from ..evaluation.loop import Pictures, evaluate
from ..files import copy_folder
from ..sharing.model_card import versions
from ..visualization import plot_curves
from .accelerator import decide
from .arguments import DRAWN
from .batch_size import choose_batch_size
from .checkpoints import damage, read_state, replace_state
from .compatibility import check_compatible
from .early_score import EarlyScore
from .early_stopping import EarlyStopping
from .export import export_adapter, export_final, push_final
from .loop import TrainingLoop
from .model import start_of_weights
from .parts import Parts
from .reporting import UNDEFINED, Metrics, log_scores, main_scores
from .stopping import StopSignal, any_process, leave_signals_to_the_parent

logger = logging.getLogger(__name__)


class Run:
    """
    Attributes:
        loop: takes the steps and counts them.
        early_score: says between evaluations whether the model learns.
        early_stopping: says after an evaluation whether the run shall end.
        evaluated: the step of the last evaluation, 0 before the first.
        retained_before: scores of retention before the first step, or None.
        best: {"step", "metric", "value", "scores"} of the best evaluation, or None.
        origin: where the weights started from, as a dict.
        batch_size: images per process and forward pass.
        images_per_step: images over all processes and forward passes of a step.
        steps_per_epoch, total_steps: length of the run in steps.
    """

    def __init__(self, parts: Parts, checkpoint: Path | None = None):
        """
        Args:
            checkpoint: to go on from.

        Raises:
            ValueError: the scores cannot be had that shall pick the best weights, the batch size cannot be found, or
                the checkpoint was made with other settings.
        """
        self.arguments, self.accelerator, self.model = parts.arguments, parts.accelerator, parts.model
        self.processor, self.text = parts.processor, parts.text
        self.train_data, self.valid_data = parts.train_data, parts.valid_data
        self.retention_data, self.retained_before = parts.retention_data, None
        self.folder = Path(self.arguments.output.output_dir)
        self.evaluated, self.best = 0, None
        if self.metric_for_best().startswith("segm") and not self.valid_data.has_masks:
            raise ValueError(
                f"metric_for_best {self.metric_for_best()} needs masks, and the validation split has none for some "
                "objects: use bbox_AP"
            )
        if self.metric_for_best().endswith("cgF1") and not presence_is_defined(self.valid_data):
            raise ValueError(
                f"metric_for_best {self.metric_for_best()} is not defined: every picture of the validation split has "
                "every concept, or none has any; use segm_AP, bbox_AP or loss, or add pictures without a concept"
            )
        self.loop, self.early_score = TrainingLoop(parts), EarlyScore(parts)
        self.early_stopping = EarlyStopping(self.arguments.progress, self.metric_for_best())

        saved = None if checkpoint is None else read_state(checkpoint)
        if saved is not None and "origin" in saved:
            self.origin = saved["origin"]
        else:
            self.origin = asdict(start_of_weights(self.arguments))
        settings, processes = self.arguments.optimization, self.accelerator.num_processes
        if settings.batch_size != "auto":
            self.batch_size = settings.batch_size
        elif saved is not None:
            self.batch_size = saved["batch_size"]
        else:
            self.batch_size = choose_batch_size(parts)
        self.images_per_step = self.batch_size * settings.gradient_accumulation_steps * processes
        self.steps_per_epoch = steps_per_epoch(len(self.train_data), self.images_per_step)
        self.total_steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        if saved is not None:
            self._resume(checkpoint, saved)
        logger.info(
            "%d images per step (%d per pass x %d passes x %d processes), %d steps per epoch, %d steps in all",
            self.images_per_step,
            self.batch_size,
            settings.gradient_accumulation_steps,
            processes,
            self.steps_per_epoch,
            self.total_steps,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done, or in progress."""
        return self.loop.step

    @property
    def epoch(self) -> float:
        """Passes over the training split, e.g. 2.5."""
        return self.step / self.steps_per_epoch

    @property
    def last(self) -> Path:
        """The checkpoint that the run goes on from."""
        return self.folder / "checkpoints" / "last"

    def at_epoch_end(self) -> bool:
        """Whether a pass over the training split, or the run, ends with this step."""
        return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps

    @property
    def evaluation_steps(self) -> int:
        """Steps from one evaluation to the next, or to that after the last step."""
        return min(self.arguments.output.eval_every_epochs * self.steps_per_epoch, self.total_steps)

    def evaluation_due(self) -> bool:
        """Whether this step is one to evaluate after, and that was not done yet."""
        wanted = self.step >= self.total_steps or self.step % self.evaluation_steps == 0
        return wanted and self.step > self.evaluated

    def is_finished(self) -> bool:
        """Whether no further step is to be taken, and this one needs no evaluation."""
        return (self.step >= self.total_steps or self.early_stopping.is_due) and not self.evaluation_due()

    def score_early(self, metrics: Metrics | None) -> bool:
        """Says how a few fixed prompts do after this step, if that is due and no evaluation is; whether it was."""
        due = self.early_score.is_due(self.step, self.evaluation_steps) and not self.evaluation_due()
        if due:
            with self.weights_to_judge():
                self.early_score.write(self.step, self.epoch, metrics)
        return due

    def batches(self) -> Generator[tuple[dict, ...], None, None]:
        """The batches of this process for each step from the next to the last; `close` ends what loads them."""
        settings, accelerator = self.arguments.optimization, self.accelerator
        keys = BatchKeys(
            len(self.train_data),
            self.batch_size,
            settings.seed,
            first_step=self.step + 1,
            last_step=self.total_steps,
            accumulation=settings.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        loader = make_loader(
            self.train_data,
            keys,
            num_workers=self.arguments.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
        )
        with batches_of(loader) as batches:
            yield from zip(*[batches] * settings.gradient_accumulation_steps, strict=True)  # all from one iterator

    def state(self) -> dict:
        """What a checkpoint says about the run."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "overflows": self.loop.overflows,
            "evaluated": self.evaluated,
            "best": self.best,
            "retained_before": self.retained_before,
            "early_start": self.early_score.start,
            "early_stopping": self.early_stopping.state_dict(),
            "origin": self.origin,
            "batch_size": self.batch_size,
            "images_per_step": self.images_per_step,
            "dataset": {
                "training images": len(self.train_data),
                "concepts": self.train_data.concepts,
                "has masks": self.train_data.has_masks,
            },
            "arguments": self.arguments.flat(),
        }

    def save(self) -> None:
        """Writes checkpoints/last, and names it epoch_N or best if it is that."""
        self.loop.save(self.last, self.state())
        self._name_checkpoint(self.last)

    def _name_checkpoint(self, checkpoint: Path) -> None:
        every, whole_epoch = self.arguments.output.save_every_epochs, self.step % self.steps_per_epoch == 0
        if self.accelerator.is_main_process:
            if every and whole_epoch and round(self.epoch) % every == 0:
                copy_folder(checkpoint, self.folder / "checkpoints" / f"epoch_{round(self.epoch)}")
            if self.best is not None and self.best["step"] == self.step:
                copy_folder(checkpoint, self.folder / "checkpoints" / "best")
        self.accelerator.wait_for_everyone()

    def _resume(self, checkpoint: Path, saved: dict) -> None:
        if "early_stopping" in saved:
            self.early_stopping.load_state_dict(saved["early_stopping"])
        finished = saved["step"] >= self.total_steps or self.early_stopping.is_due
        check_compatible(saved, self.state(), finished)
        self.loop.resume(checkpoint, saved)
        self.evaluated, self.best = saved["evaluated"], saved["best"]
        self.retained_before, self.early_score.start = saved.get("retained_before"), saved.get("early_start")
        logger.info("going on from %s, step %d", checkpoint, self.step)
        if checkpoint.resolve() == self.last.resolve():
            self._name_checkpoint(checkpoint)  # a kill may have come between the two
        if self.best is not None and not self._best_exists():
            logger.warning(
                "the best checkpoint so far, of step %d, is damaged or not here any more", self.best["step"]
            )
            self.best = None

    def _best_exists(self) -> bool:
        try:
            return read_state(self.folder / "checkpoints" / "best")["step"] == self.best["step"]
        except (FileNotFoundError, ValueError):
            return False

    def evaluate(self, metrics: Metrics | None, stop: StopSignal) -> bool:
        """
        Scores the model on the validation split, writes that to `metrics` and into the checkpoint of this step, which
        was saved before, notes the best and draws pictures.

        Returns:
            Whether it was done; a stop signal to any process ends it, and the resumed run does it again.
        """
        pictures = self.folder / "predictions" / f"epoch_{math.ceil(self.epoch)}"
        scores = self._scores(self.valid_data, stop, Pictures(pictures, self.arguments.output.prediction_images))
        retained = None if scores is None else self.retention(stop)
        if scores is None or retained is None:
            return False
        scores |= retained
        self.evaluated = self.step
        if scores[self.metric_for_best()] not in UNDEFINED:
            self.note_if_best(scores)
            self.early_stopping.note(scores[self.metric_for_best()])
        log_scores(self.epoch, scores)
        if metrics:
            metrics.write("eval", self.step, {"epoch": self.epoch, **scores})
            metrics.trackers.show("predictions", self.step, sorted(pictures.glob("*.png")))
        if self.accelerator.is_main_process:
            replace_state(self.last, self.state())
        self._name_checkpoint(self.last)
        return True

    def retention(self, stop: StopSignal) -> dict[str, float] | None:
        """How far the model agrees with its teacher on the phrases to retain; None after a stop."""
        if self.retention_data is None:
            return {}
        scores = self._scores(self.retention_data, stop)
        if scores is None:
            return None
        return {f"retention_{name}": score for name, score in main_scores(scores).items() if name != "loss"}

    def measure_before(self, metrics: Metrics | None, stop: StopSignal) -> bool:
        """Notes what there is to be retained before the first step. Returns whether that was done, not stopped."""
        self.retained_before = self.retention(stop)
        if self.retained_before:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in self.retained_before.items())
            logger.info("before the first step: %s", figures)
            if metrics:
                metrics.write("retention", self.step, {"epoch": self.epoch, **self.retained_before})
        return self.retained_before is not None

    def _scores(self, data: EvalDataset, stop: StopSignal, pictures: Pictures | None = None) -> dict | None:
        """Those of `evaluate`, in all processes; None after a stop."""
        set_seed(self.arguments.optimization.seed)  # mask losses sample points: the same ones each time
        with self.weights_to_judge():
            scores = evaluate(
                self.accelerator,
                self.model,
                self.processor,
                self.text,
                data,
                batch_size=self.arguments.output.eval_batch_size,
                num_workers=self.arguments.data.num_workers,
                worker_init_fn=leave_signals_to_the_parent,
                stop=lambda: any_process(self.accelerator, stop.received is not None),
                pictures=pictures,
            )
        (scores,) = broadcast_object_list([scores])
        return scores

    def weights_to_judge(self) -> AbstractContextManager:
        """Puts the averaged weights, if there are any, into the model for the time of a `with` block."""
        return nullcontext() if self.loop.ema is None else self.loop.ema.applied()

    def note_if_best(self, scores: dict) -> None:
        """Remembers scores that are better than all before."""
        metric = self.metric_for_best()
        value = scores[metric]
        better = self.best is None or (value < self.best["value"] if metric == "loss" else value > self.best["value"])
        if better:
            plain = {name: score for name, score in scores.items() if isinstance(score, float)}
            self.best = {"step": self.step, "epoch": self.epoch, "metric": metric, "value": value, "scores": plain}

    def metric_for_best(self) -> str:
        """The name of the score that picks the best checkpoint."""
        chosen = self.arguments.output.metric_for_best
        if chosen == "auto":
            return "segm_AP" if self.valid_data.has_masks else "bbox_AP"
        return chosen

    def finish(self) -> None:
        """
        Exports the best weights to final/, or those of the last step if no score could tell or their checkpoint is
        damaged; says what was reached and where it is.
        """
        if self.best is None:
            logger.info(
                "no %s says which weights are best: those of the last step are exported", self.metric_for_best()
            )
        elif self.best["step"] != self.step:
            best = self.folder / "checkpoints" / "best"
            fault = decide(self.accelerator, lambda: damage(best))
            if fault is None:
                self.loop.load(best)
            else:
                logger.warning(
                    "%s is damaged (%s): the best weights, of step %d, are lost, and those of the last step exported",
                    best,
                    fault,
                    self.best["step"],
                )
                self.best = None
        with self.weights_to_judge():
            self._export()
        if self.accelerator.is_main_process:
            self._report()
            push_final(self.folder / "final", self.arguments.output)

    def _export(self) -> None:
        """Writes final/."""
        parts, about = (self.accelerator, self.model, self.processor), (self.folder, self.provenance())
        if not self.arguments.adapter.merge_adapter:
            export_adapter(*parts, *about, self.arguments.model.init)
            return
        vocabulary = self.train_data.concepts if self.arguments.output.freeze_vocabulary else None
        export_final(*parts, self.text, *about, vocabulary)

    def provenance(self) -> dict:
        """How the exported model came about, for its card."""
        data = self.arguments.data.data
        generated = data in DRAWN
        on_hub = not generated and not Path(data).exists()
        state = self.state()
        return {
            "origin": self.origin,
            "versions": versions(),
            "steps": self.step,
            "epochs": self.epoch,
            "images_per_step": self.images_per_step,
            "dataset": {
                **state["dataset"],
                "name": f"{data} shapes" if generated else data if on_hub else Path(data).name,
                "hub_id": data if on_hub else None,
            },
            "best": self.best,
            "retained_before": self.retained_before,
            "arguments": state["arguments"],
        }

    def _report(self) -> None:
        """Draws the curves; logs the scores of the exported model, and where everything is."""
        curves = plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        if self.best is not None:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in main_scores(self.best["scores"]).items())
            logger.info("best by %s, at epoch %.2f: %s", self.best["metric"], self.best["epoch"], scores)
        logger.info("curves: %s", curves)
        for picture in sorted((self.folder / "predictions" / f"epoch_{math.ceil(self.epoch)}").glob("*.png")):
            logger.info("picture: %s", picture)
        logger.info("model: %s", self.folder / "final")
