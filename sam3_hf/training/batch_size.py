"""How many images fit into the memory of a GPU."""

import logging
from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import clear_device_cache

from ..data import PromptCollator
from ..evaluation.loop import model_inputs
from .parts import Parts

logger = logging.getLogger(__name__)


def choose_batch_size(parts: Parts) -> int:
    """
    Images per forward pass that fit into GPU memory with a tenth to spare: a power of two, at most 64 and at most the
    dataset. Tried on real images.

    Raises:
        ValueError: there is no GPU, or more than one process.
        RuntimeError: not even one image fits.
    """
    accelerator, model, dataset = parts.accelerator, parts.model, parts.train_data
    device = accelerator.device
    if device.type != "cuda":
        raise ValueError("batch_size 'auto' needs a CUDA GPU, whose memory it fills: give a number")
    if accelerator.num_processes > 1:  # one that runs out of memory would leave the others waiting for its gradients
        raise ValueError(
            "batch_size 'auto' works in a run of one process only: find the number in one (--num_processes 1, the log "
            "says it), then give it here"
        )
    collate = PromptCollator()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def attempt(size: int) -> None:
        clear_device_cache(garbage_collection=True)  # what a larger batch left would count as taken
        torch.cuda.reset_peak_memory_stats(device)
        moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # as AdamW will hold
        batch = parts.objective.complete(collate([dataset[0, index] for index in range(size)]))
        model.train()
        with accelerator.autocast():
            loss, _ = parts.objective(model, batch, model_inputs(batch, parts.text, device))
        accelerator.backward(loss)
        model.zero_grad()
        del moments, loss
        if torch.cuda.max_memory_reserved(device) > 0.9 * torch.cuda.get_device_properties(device).total_memory:
            raise torch.OutOfMemoryError("less than a tenth of the memory is left: nearly out of memory.")

    size = largest_size(attempt, start=min(64, 1 << (len(dataset).bit_length() - 1)))
    torch.cuda.reset_peak_memory_stats(device)
    clear_device_cache(garbage_collection=True)
    return size


def largest_size(attempt: Callable[[int], None], start: int = 64) -> int:
    """
    The first of `start`, `start`/2, ... 1 for which `attempt` does not run out of memory.

    Raises:
        RuntimeError: not even one image fits.
    """
    size = start

    def halve() -> int:
        nonlocal size
        logger.info("a batch of %d does not fit into memory", size)
        size //= 2
        return size

    # Accelerate's own step, a tenth less, would try many more sizes.
    search = find_executable_batch_size(attempt, starting_batch_size=start, reduce_batch_size_fn=halve)
    try:
        search()
    except RuntimeError as error:
        if size > 0:
            raise
        raise RuntimeError(
            "not even one image fits into memory: use a smaller --preset or --image_size, fewer --prompts_per_image, "
            "or --gradient_checkpointing"
        ) from error
    return size
