"""Optimizer, learning-rate schedule and moving average of the weights."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .arguments import OptimizationArguments

VIT = "vision_encoder.backbone."
VIT_LAYER = re.compile(re.escape(VIT) + r"layers\.(\d+)\.")


def build_optimizer(model: nn.Module, arguments: OptimizationArguments, fused: bool) -> torch.optim.AdamW:
    """
    AdamW over the parameters that require a gradient, grouped by learning rate and weight decay.

    Args:
        fused: one pass over weights, gradients and moments, without copies of them; what a GPU wants.
    """
    return torch.optim.AdamW(parameter_groups(model, arguments), lr=arguments.learning_rate, fused=fused)


def parameter_groups(model: nn.Module, arguments: OptimizationArguments) -> list[dict]:
    """
    Groups in a fixed order: {"params", "lr", "weight_decay"}.

    Parameters of at most one dimension, that is biases, norms and scales, are not decayed. In the vision encoder the
    rate falls from the last layer to the first.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = [int(match[1]) for name, _ in model.named_parameters() if (match := VIT_LAYER.match(name))]
    rates = {
        "vision": arguments.vision_learning_rate,
        "text": arguments.text_learning_rate,
        "detector": arguments.learning_rate,
    }
    rates = {part: arguments.learning_rate if rate is None else rate for part, rate in rates.items()}
    groups = {}
    for name, parameter in named:
        scale = vit_scale(name, 1 + max(layers, default=-1), arguments.vit_layer_decay)
        decay = arguments.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((part_of(name), scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part] * scale, "weight_decay": decay}
        for (part, scale, decay), parameters in groups.items()
    ]


def part_of(name: str) -> str:
    """Which of the three learning rates a parameter has: that of "vision", "text" or "detector"."""
    if name.startswith("vision_encoder."):
        return "vision"
    return "text" if name.startswith(("text_encoder.", "text_projection.")) else "detector"


def vit_scale(name: str, depth: int, decay: float) -> float:
    """
    Factor on the learning rate: decay^(depth - i) in layer i of the ViT, decay^(depth + 1) in what comes before the
    layers, 1 elsewhere. Position embeddings are exempt, as in SAM 3's fine-tuning configuration.
    """
    if not name.startswith(VIT) or "position_embeddings" in name:
        return 1.0
    layer = VIT_LAYER.match(name)
    return decay ** (depth - int(layer[1]) if layer else depth + 1)


class Schedule:
    """Linear warm-up, then a cosine; a function of the step alone, so it has no state to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, arguments: OptimizationArguments):
        """
        Args:
            optimizer: its groups have their highest learning rates.
        """
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.warmup_ratio = arguments.warmup_ratio
        self.final_ratio = arguments.final_learning_rate_ratio

    def scale(self, step: int, total: int) -> float:
        """Share of the highest learning rate that step 1, 2, ... total runs with."""
        warmup = round(self.warmup_ratio * total)
        if step <= warmup:
            return step / warmup
        progress = (step - warmup) / (total - warmup)
        return self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * progress)) / 2

    def apply(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> float:
        """Sets the rates for a step; returns the highest of them."""
        scale = self.scale(step, total)
        for group, highest in zip(optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * scale
        return max(group["lr"] for group in optimizer.param_groups)


class MovingAverage:
    """Exponential moving average of the trained parameters, in float32 on their device."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step; the first steps use less decay, so the start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the model for the time of the `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """
        Raises:
            ValueError: the averages are those of other parameters.
        """
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())
            raise ValueError(f"the checkpoint averages other parameters than this run trains: {odd[:5]}")
        for name, value in state.items():
            self.average[name].copy_(value)
