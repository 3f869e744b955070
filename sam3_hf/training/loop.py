"""The steps of training: forward, backward, optimizer, and what is wrong with numbers that are not finite."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from ..evaluation.loop import model_inputs
from .checkpoints import load_checkpoint, save_checkpoint
from .optim import MovingAverage, Schedule
from .parts import Parts

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50  # in a row; by then the loss scale has fallen from 2^6 to 2^-44
NOTHING_SAVED = "Nothing was saved, the last checkpoint is as it was."


@dataclass(frozen=True)
class Step:
    """
    What an optimizer step came to.

    Attributes:
        terms: "loss" averaged over batches and processes, the terms of this process's loss, and "grad_norm".
        rate: the highest learning rate.
        stopped: whether any process was asked to stop.
    """

    terms: dict[str, float]
    rate: float
    stopped: bool


class TrainingLoop:
    """
    Takes optimizer steps, and knows how many it has taken.

    Attributes:
        step: optimizer steps done, or in progress.
        overflows: of them, skipped because FP16 gradients overflowed.
        overflows_in_a_row: of those, how many the last steps were.
        ema: moving average of the weights, or None.
    """

    def __init__(self, parts: Parts):
        self.parts, self.settings = parts, parts.arguments.optimization
        self.accelerator, self.model, self.optimizer = parts.accelerator, parts.model, parts.optimizer
        self.step, self.overflows, self.overflows_in_a_row = 0, 0, 0
        self.schedule = Schedule(self.optimizer, self.settings)
        decay = self.settings.ema_decay
        self.ema = MovingAverage(self.accelerator.unwrap_model(self.model), decay) if decay else None

    def steps(
        self, batches: Iterable[Sequence[dict]], total_steps: int, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Step]:
        """
        Takes a step each time that it is asked for the next one.

        Args:
            batches: those of this process for each of the steps that are left.
            total_steps: length of the run, for the learning rate.
            stop: whether this process was asked to stop.

        Raises:
            RuntimeError: as `take_step`.
        """
        for step_batches in batches:
            self.step += 1
            rate = self.schedule.apply(self.optimizer, self.step, total_steps)
            terms, stopped = self.take_step(step_batches, stop())
            yield Step(terms, rate, stopped)

    def take_step(self, batches: Sequence[dict], stop: bool) -> tuple[dict[str, float], bool]:
        """
        One optimizer step over the batches of this process, one forward pass each.

        Args:
            stop: this process was asked to stop.

        Returns:
            `terms` and `stopped` of `Step`.

        Raises:
            RuntimeError: a prediction, the loss or a gradient is not finite, or was not in FP16 for many steps; names
                the images.
        """
        accelerator = self.accelerator
        # Randomness depends on the number of the step alone: a resumed run repeats it without stored generator states.
        set_seed(step_seed(self.settings.seed, self.step, accelerator.process_index))
        self.model.train()
        losses, terms = [], []
        for batch in batches:
            with accelerator.accumulate(self.model):
                loss, parts = self.loss(batch)
                accelerator.backward(loss)
                losses.append(loss.detach())
                terms.append(parts)
                if accelerator.sync_gradients:
                    limit = self.settings.max_grad_norm or math.inf
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    mean, stopped = average_over_processes(accelerator, losses, stop)
                    self.check_finite(mean, norm, losses, batches)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if accelerator.scaler is not None and not math.isfinite(norm):
            self.count_overflow(mean, norm, batches)
        else:
            self.overflows_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.step)
        return {"loss": mean, **mean_terms(terms), "grad_norm": float(norm)}, stopped

    def loss(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """
        What the objective says of a batch.

        Raises:
            RuntimeError: the model or the objective refused the batch, as where predictions are not finite; names the
                images.
        """
        inputs = model_inputs(batch, self.parts.text, self.accelerator.device)
        try:
            with self.accelerator.autocast():  # which Accelerate adds to the model itself, but not under FSDP
                return self.parts.objective(self.model, batch, inputs)
        except ValueError as error:  # this process alone may have it, so the others' images are not asked for
            raise RuntimeError(
                f"step {self.step} failed: {error}; ids of the images: {batch['image_ids']}. {NOTHING_SAVED}"
            ) from error

    def check_finite(self, loss: float, norm: Tensor, losses: list[Tensor], batches: Sequence[dict]) -> None:
        """
        Args:
            loss: the mean over batches and processes.
            losses: those of the batches of this process.

        Raises:
            RuntimeError: the loss is not finite, or a gradient outside of FP16, where the loss scaler skips the step.
        """
        if math.isfinite(loss) and (self.accelerator.scaler is not None or math.isfinite(norm)):
            return
        guilty = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)] or batches
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        raise not_finite(f"the {what} of step {self.step} is not finite", loss, norm, guilty)

    def count_overflow(self, loss: float, norm: Tensor, batches: Sequence[dict]) -> None:
        """
        Notes that the loss scaler skipped a step.

        Raises:
            RuntimeError: it has skipped so many in a row that a lower loss scale will not help.
        """
        self.overflows += 1
        self.overflows_in_a_row += 1
        logger.warning("step %d skipped: gradients overflowed in FP16, the loss scale is reduced", self.step)
        if self.overflows_in_a_row >= MAX_OVERFLOWS:
            what = f"gradients overflowed in each of the last {MAX_OVERFLOWS} steps, the last of which is {self.step}"
            raise not_finite(what, loss, norm, batches)

    def save(self, target: Path, state: dict) -> None:
        """Writes a checkpoint with `state` as its trainer_state.json; called by every process."""
        objective = self.parts.objective.state_dict()
        tokenizer = self.parts.processor.tokenizer
        save_checkpoint(self.accelerator, target, self.model, self.optimizer, self.ema, state, objective, tokenizer)

    def load(self, checkpoint: Path) -> None:
        """Restores weights, their average, and what optimizer and objective remember; called by every process."""
        objective = load_checkpoint(self.accelerator, checkpoint, self.model, self.optimizer, self.ema)
        if objective:
            self.parts.objective.load_state_dict(objective)

    def resume(self, checkpoint: Path, state: dict) -> None:
        """Goes on from a checkpoint with this trainer_state.json; called by every process."""
        self.load(checkpoint)
        self.step, self.overflows = state["step"], state["overflows"]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one process, 0 to 2^32 - 1."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def average_over_processes(accelerator, losses: list[Tensor], stop: bool) -> tuple[float, bool]:
    """The mean loss over batches and processes, and whether any process was asked to stop, in one exchange."""
    local = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(float(stop))])
    loss, stopped = accelerator.reduce(local, "mean").tolist()
    return loss, stopped > 0


def mean_terms(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each term averaged over the batches that have it, in alphabetical order."""
    names = sorted(set().union(*terms))
    means = torch.stack([torch.stack([term[name] for term in terms if name in term]).mean() for name in names])
    return dict(zip(names, means.tolist(), strict=True))


def not_finite(what: str, loss: float, norm: Tensor, batches: Sequence[dict]) -> RuntimeError:
    """The error for a step whose loss or gradient is not finite in any process; called by all processes."""
    images = gather_object([image for batch in batches for image in batch["image_ids"]])
    return RuntimeError(
        f"{what} (loss {loss}, gradient norm {float(norm)}); ids of the images: {images}. {NOTHING_SAVED} Look at "
        "these images' annotations, or lower --learning_rate, or use --mixed_precision bf16"
    )
