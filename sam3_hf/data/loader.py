"""Which images make up a batch, their way through the worker processes, and how fast they come."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from .collate import PromptCollator


def steps_per_epoch(count: int, images_per_step: int) -> int:
    """Steps until each of `count` images was seen; the last step is filled up from the start of the epoch's order."""
    return -(-count // images_per_step)


def epoch_order(count: int, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
    """(steps, images_per_step) int64 indices of images: a permutation that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = steps_per_epoch(count, images_per_step)
    return np.resize(order, (steps, images_per_step))  # which starts again where the permutation ends


class BatchKeys(Sampler):
    """For each forward pass of this process from step `first_step` on, the (epoch, index) pairs of its images.

    All batches are full, every image is seen in every epoch, and all processes make the same number of passes. A
    step's images are split into `accumulation` equal parts one after the other, and each of these into one equal part
    per process: what a step sees does not depend on how it is spread. It deals images out to processes by itself and
    must not be sharded once more (as `accelerator.prepare` would).

    Args:
        count: images in the dataset.
        batch_size: images per process and forward pass.
        seed: 0 or more.
        first_step, last_step: optimizer steps, counted from 1 through all epochs, both included.
        accumulation: forward passes per step.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.count, self.seed = count, seed
        self.shape = (accumulation, world_size, batch_size)
        self.rank = rank
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return max(self.last_step - self.first_step + 1, 0) * self.shape[0]

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


def eval_batches(count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Indices of the images of each evaluation batch of one process, every `world_size`-th image in order.

    Each process gets equally many images, because losses are computed by all processes together. Where they do not
    come out even, at most `world_size` - 1 images are dealt out once more; the metrics of `sam3_hf.evaluation` count
    them once. The last batch may be smaller.
    """
    share = np.resize(np.arange(count), steps_per_epoch(count, world_size) * world_size)[rank::world_size].tolist()
    return [share[start : start + batch_size] for start in range(0, len(share), batch_size)]


def make_loader(
    dataset: Dataset,
    batches: Iterable[list],
    collator: Callable | None = None,
    num_workers: int = 4,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """Decodes the batches in order, for training and evaluation.

    Workers live for one iteration over the loader. `BatchKeys` runs through all epochs in one, so that they start
    once, and those of an evaluation hold no memory while training goes on.

    Args:
        dataset: `TrainDataset` or `EvalDataset`.
        batches: lists of the dataset's keys: `BatchKeys`, or the list of `eval_batches`.
        collator: default: `PromptCollator()`.
        num_workers: processes that decode and augment; 0 does it in the loop.
        prefetch_factor: batches per worker that wait in shared memory; few, because masks are large: 4 images of 1008
            pixels with 4 concepts of 10 objects each have 160 MB of them.
        pin_memory: for a GPU, whose copies then do not wait.
        worker_init_fn: called with its number in each worker at its start.
    """
    # Workers get one torch thread each from DataLoader itself, so they do not fight over cores
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=PromptCollator() if collator is None else collator,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=worker_init_fn,
    )


def measure_throughput(loader: DataLoader, batches: int) -> float:
    """Images per second that a loader delivers when nothing else waits, from its second batch on.

    Args:
        loader: of `make_loader`.
        batches: how many to time, at least 1; fewer if it has fewer.

    Raises:
        ValueError: the loader has only one batch.
    """
    iterator = iter(loader)
    next(iterator)  # workers start
    start, images = time.perf_counter(), 0
    for _, batch in zip(range(batches), iterator, strict=False):
        images += len(batch["pixel_values"])
    if images == 0:
        raise ValueError("a loader with one batch cannot be timed")
    return images / (time.perf_counter() - start)
