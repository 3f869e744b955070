"""The trainer's own steps without its output folder: to fine-tune students, and to flatten a teacher's stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mapping_measures import residual_streams
from torch import Tensor

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, TrainDataset
from sam3_hf.training.arguments import Arguments
from sam3_hf.training.main import train_step
from sam3_hf.training.optim import Schedule, build_optimizer
from sam3_hf.training.phrases import TokenizedText
from sam3_hf.training.run import Run
from sam3_hf.training.starting import prepare

FLOOR = 1e-3  # added to each eigenvalue relative to their mean, so that a dead direction costs a finite amount


def fine_tune(
    accelerator,
    model: Sam3LiteModel,
    arguments: Arguments,
    train_data: TrainDataset,
    valid_data: EvalDataset,
    every: int,
    after: Callable[[int, dict[str, float]], bool],
) -> None:
    """
    Trains `model` in place as `training/train.py` does, for `max_steps` of the arguments.

    Args:
        every: steps between two calls of `after`.
        after: called with the step and the terms of its loss while the model holds its averaged weights, if the
            arguments have an `ema_decay`; returns whether to end.
    """
    settings, processor = arguments.optimization, Sam3LiteProcessor.from_config(model.config)
    optimizer = build_optimizer(model, settings, fused=accelerator.device.type == "cuda")
    schedule = Schedule(optimizer, settings)
    prepared, optimizer = prepare(accelerator, model, optimizer)
    text = TokenizedText(processor)
    run = Run(arguments, accelerator, prepared, optimizer, processor, text, train_data, valid_data, None)
    batches, ended = run.batches(), False
    while run.step < run.total_steps and not ended:
        run.step += 1
        schedule.apply(optimizer, run.step, run.total_steps)
        step_batches = [next(batches) for _ in range(settings.gradient_accumulation_steps)]
        terms, _ = train_step(run, step_batches, stop=False)
        if run.step % every == 0 or run.step == run.total_steps:
            if run.ema is None:
                ended = after(run.step, terms)
            else:
                with run.ema.applied():
                    ended = after(run.step, terms)
    accelerator.free_memory()


@contextmanager
def flattening(model: Sam3LiteModel, weight: float) -> Iterator[None]:
    """Adds `weight` times the flatness penalty of the ViT's residual stream to the training loss of `model`."""
    with residual_streams(model) as streams:

        def add(module, args, outputs):
            if module.training:
                penalty = torch.stack([flatness_penalty(tokens) for tokens in streams]).mean()
                outputs.loss = outputs.loss + weight * penalty
                outputs.loss_dict = outputs.loss_dict | {"flatness": penalty.detach()}
            streams.clear()

        hook = model.register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def flatness_penalty(tokens: Tensor) -> Tensor:
    """
    How far a covariance is from isotropic: minus the mean logarithm of its eigenvalues relative to their mean. 0 if
    they are all equal; grows with every weak direction, so that it cannot be lowered by the strong ones alone.

    Args:
        tokens: `(tokens, width)`, each centred: there is no variance along the constant vector, which is left out.
    """
    width = tokens.shape[1]
    covariance = torch.cov(tokens.T)
    relative = covariance * (width - 1) / covariance.trace() + 1 / width  # the constant vector gets eigenvalue 1
    return -torch.logdet((relative + FLOOR * torch.eye(width, device=tokens.device)) / (1 + FLOOR)) / width
