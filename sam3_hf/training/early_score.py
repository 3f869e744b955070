"""A score long before the first evaluation: the loss on a few fixed prompts, which falls where a model learns."""

import logging

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from ..data import EvalDataset, Sample, eval_batches, make_loader
from ..evaluation.loop import PROMPTS_AT_ONCE, outputs_by_chunk
from .parts import Parts
from .reporting import Metrics

logger = logging.getLogger(__name__)

PICTURES, PROMPTS = 8, 4  # few, so that it takes little of the run's time: forward passes alone, every fifty steps


class FixedPrompts(Dataset):
    """
    Pictures of a validation split, evenly spread over it and as they are, each asked for some concepts that are in it
    and one that is not.
    """

    def __init__(self, data: EvalDataset):
        self.data = data
        self.rows = np.unique(np.linspace(0, len(data) - 1, PICTURES).round().astype(int)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Sample:
        index, known = self.rows[position], self.data.categories
        objects = self.data.rows[index]["objects"]
        there = {item["category"] for item in objects}
        single = {item["category"] for item in objects if not item["iscrowd"]}
        present = [category for category in known if category in single][: PROMPTS - 1]
        absent = [category for category in known if category not in there]
        absent = [absent[position % len(absent)]] if absent else []
        return self.data.asked(index, present + absent or known[:1])


class EarlyScore:
    """
    Attributes:
        every: steps between two scores; 0: none are made.
        start: the loss before the first step, or None.
    """

    def __init__(self, parts: Parts):
        self.parts, self.every = parts, parts.arguments.progress.early_score_steps
        self.prompts, self.start = FixedPrompts(parts.valid_data), None

    def is_due(self, step: int, evaluation_steps: int) -> bool:
        """
        Args:
            step: that was done last; 0 before the first.
            evaluation_steps: between two evaluations, which say more.
        """
        return 0 < self.every < evaluation_steps and step % self.every == 0

    def write(self, step: int, epoch: float, metrics: Metrics | None) -> None:
        """Makes the score and says it; called by every process."""
        loss, count = self.loss()
        if step == 0:
            self.start = loss
        before = "" if self.start is None or step == 0 else f", {self.start:.4f} before the first step"
        logger.info("step %d: loss %.4f on %d fixed validation prompts%s", step, loss, count, before)
        if metrics:
            metrics.write("early", step, {"epoch": epoch, "loss": loss})

    @torch.no_grad()
    def loss(self) -> tuple[float, int]:
        """The mean over all prompts, and their number, from the weights as they are."""
        accelerator, settings = self.parts.accelerator, self.parts.arguments
        set_seed(settings.optimization.seed)  # mask losses sample points; each step of training sets its own seed
        self.parts.model.eval()
        ranks = (accelerator.process_index, accelerator.num_processes)
        at_once = min(settings.output.eval_batch_size, PROMPTS_AT_ONCE // PROMPTS)  # one chunk, in all processes
        batches = eval_batches(len(self.prompts), at_once, *ranks)
        total = torch.zeros(2, device=accelerator.device)  # of losses, and of prompts
        for batch in make_loader(self.prompts, batches, num_workers=0):
            for chunk, outputs in outputs_by_chunk(accelerator, self.parts.model, self.parts.text, batch):
                count = len(chunk["phrases"])
                total += torch.stack([outputs.loss * count, outputs.loss.new_tensor(count)])
        loss, count = accelerator.reduce(total, "sum").tolist()
        return loss / count, int(count)
