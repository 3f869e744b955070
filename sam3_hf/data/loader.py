"""Batches: their order, their workers, and how fast they come."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .torch_dataset import EvalDataset, TrainDataset


class EpochBatchSampler(Sampler):
    """Batches of (epoch, index) keys in an order that depends only on (seed, epoch).

    Each process takes its part of every global batch of `batch_size * world_size` images. All batches are full: the
    last one is filled up from the start of the order, so that every image is seen in every epoch and processes make
    the same number of steps.

    Args:
        length: images in the dataset.
        batch_size: images per process and batch.
        seed: 0 or more.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration gives: an epoch, from its batch `first_batch` on (earlier ones are not decoded)."""
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return -(-self.length // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return max(self.batches_per_epoch - self.first_batch, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first_batch = self.epoch, self.first_batch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        global_batch = self.batch_size * self.world_size
        order = np.resize(order, self.batches_per_epoch * global_batch)  # repeats from the start
        for batch in range(first_batch, self.batches_per_epoch):
            start = batch * global_batch + self.rank * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


def train_loader(
    dataset: TrainDataset,
    collator: Callable,
    batch_size: int,
    num_workers: int = 4,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Loader of training batches; `loader.batch_sampler.set_epoch(epoch, first_batch)` before each iteration.

    It deals images out to processes by itself: it must not be sharded once more (as `accelerator.prepare` would).
    """
    sampler = EpochBatchSampler(len(dataset), batch_size, dataset.seed, rank, world_size)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, **_worker_options(num_workers))


def eval_loader(
    dataset: EvalDataset,
    collator: Callable,
    batch_size: int,
    num_workers: int = 4,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Loader of evaluation batches in the dataset's order.

    Of several processes, each gets every `world_size`-th image, none twice; so they may differ by one batch.
    """
    mine = _EverySo(dataset, rank, world_size)
    return DataLoader(mine, batch_size=batch_size, collate_fn=collator, **_worker_options(num_workers))


class _EverySo(Dataset):
    """Every `step`-th item, from `first` on."""

    def __init__(self, dataset: Dataset, first: int, step: int):
        self.dataset, self.indices = dataset, range(first, len(dataset), step)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[self.indices[index]]


def _worker_options(num_workers: int) -> dict:
    # Workers get one torch thread each from DataLoader itself, so they do not fight over cores
    options = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    if num_workers > 0:
        options |= {"persistent_workers": True}
    return options


def measure_throughput(loader: DataLoader, batches: int) -> float:
    """Images per second that a loader delivers when nothing else waits, from its second batch on.

    Args:
        loader: a loader of this module.
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
