"""Which images a step trains on, and their way through the worker processes."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate.utils import send_to_device
from stopping import leave_signals_to_the_parent
from torch.utils.data import DataLoader

from sam3_hf.data import PromptCollator, TrainDataset


def steps_per_epoch(count: int, images_per_step: int) -> int:
    """Steps until each of `count` images was seen; the last step is filled up from the start of the epoch's order."""
    return -(-count // images_per_step)


def epoch_order(count: int, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
    """(steps, images_per_step) indices of images: a permutation that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = steps_per_epoch(count, images_per_step)
    return np.resize(order, (steps, images_per_step))  # which starts again where the permutation ends


class BatchKeys:
    """
    For each forward pass of this process from step `first_step` on, the (epoch, index) pairs of its images.

    A step's images are split into `accumulation` equal parts one after the other, and each of these into one equal
    part per process: what a step sees does not depend on how it is spread.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        """
        Args:
            count: images in the dataset.
            batch_size: images per process and forward pass.
            accumulation: forward passes per step.
            first_step, last_step: counted from 1, both included.
            rank, world_size: which of how many processes this is.
        """
        self.count, self.seed = count, seed
        self.shape = (accumulation, world_size, batch_size)
        self.rank = rank
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step + 1) * self.shape[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        images_per_step = int(np.prod(self.shape))
        steps = steps_per_epoch(self.count, images_per_step)
        order, order_epoch = None, None
        for step in range(self.first_step - 1, self.last_step):
            epoch = step // steps
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.count, images_per_step, self.seed, epoch), epoch
            for passes in order[step % steps].reshape(self.shape):
                yield [(epoch, int(index)) for index in passes[self.rank]]


def make_loader(dataset: TrainDataset, keys: BatchKeys, num_workers: int, pin_memory: bool) -> DataLoader:
    """Decodes and augments the batches that `keys` asks for, in order; one set of workers serves all epochs."""
    return DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=PromptCollator(),
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )


def model_inputs(batch: dict, text: Callable[[list[str]], dict], device: torch.device) -> dict:
    """What the model's forward takes of a collated batch, on its device."""
    taken = ("pixel_values", "image_index", "input_boxes", "input_boxes_labels", "labels")
    inputs = {key: batch[key] for key in taken if key in batch} | text(batch["phrases"])
    return send_to_device(inputs, device, non_blocking=True)
