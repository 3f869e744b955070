"""The trainer's own steps without its output folder: to fine-tune students, and to flatten a teacher's stream."""

from collections.abc import Callable

import torch
from mapping_measures import residual_streams
from torch import Tensor, nn

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, TrainDataset
from sam3_hf.training.accelerator import prepare
from sam3_hf.training.arguments import Arguments
from sam3_hf.training.objectives import Labels, Objective
from sam3_hf.training.parts import Parts
from sam3_hf.training.phrases import TokenizedText
from sam3_hf.training.run import Run

FLOOR = 1e-3  # added to each eigenvalue relative to their mean, so that a dead direction costs a finite amount


def fine_tune(
    accelerator,
    model: Sam3LiteModel,
    arguments: Arguments,
    objective: Objective,
    data: tuple[TrainDataset, EvalDataset],
    every: int,
    after: Callable[[int, dict[str, float]], bool],
) -> None:
    """
    Trains `model` in place as the trainer does, for `max_steps` of the arguments.

    Args:
        data: training and validation split.
        every: steps between two calls of `after`.
        after: called with the step and the terms of its loss while the model holds its averaged weights, if the
            arguments have an `ema_decay`; returns whether to end.
    """
    processor = Sam3LiteProcessor.from_config(model.config)
    prepared, optimizer = prepare(accelerator, model, arguments.optimization)
    text = TokenizedText(processor)
    run = Run(Parts(arguments, accelerator, prepared, optimizer, objective, processor, text, *data))
    for done in run.loop.steps(run.batches(), run.total_steps):
        if run.step % every == 0 or run.step == run.total_steps:
            with run.weights_to_judge():
                ended = after(run.step, done.terms)
            if ended:
                break
    accelerator.free_memory()


class FlatLabels(Labels):
    """The loss of the labels, and `weight` times the flatness penalty of the ViT's residual stream."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, model: nn.Module, batch: dict, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        with residual_streams(model) as streams:
            loss, terms = super().__call__(model, batch, inputs)
        penalty = torch.stack([flatness_penalty(tokens) for tokens in streams]).mean()
        return loss + self.weight * penalty, {**terms, "flatness": penalty.detach()}


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
