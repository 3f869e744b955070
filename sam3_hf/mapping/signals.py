"""What passes through a tower, estimated from its weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from .towers import Tower

# Share of the variance of a head's values that survives the average over the attended positions: a prior, only used
# to weigh attention against MLPs in the estimate of the residual stream.
ATTENDED_VARIANCE = 0.25


@dataclass
class Stream:
    """Estimate of the residual stream: mean `(width,)` and covariance `(width, width)` over positions and images."""

    mean: Tensor
    covariance: Tensor

    def normalized(self, gamma: Tensor | None = None, beta: Tensor | None = None) -> Stream:
        """Behind a LayerNorm with weight `gamma` and bias `beta`."""
        mean = self.mean - self.mean.mean()
        covariance = self.covariance - self.covariance.mean(0, keepdim=True)
        covariance = covariance - covariance.mean(1, keepdim=True)
        variance = ((mean @ mean + covariance.trace()) / len(mean)).clamp_min(1e-30)
        mean, covariance = mean / variance.sqrt(), covariance / variance
        if gamma is None:
            return Stream(mean, covariance)
        return Stream(gamma * mean + beta, gamma[:, None] * covariance * gamma)

    @property
    def moment(self) -> Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)


@dataclass
class LayerSignals:
    """What passes inside a layer: which heads and MLP neurons carry signal, and the mean of all."""

    head_scores: Tensor  # (heads,) energy that a head adds to the stream
    value_mean: Tensor  # (width,) per channel of all heads
    neuron_scores: Tensor  # (mlp,)
    neuron_mean: Tensor  # (mlp,)


@dataclass
class TowerSignals:
    """
    What passes through a tower.

    Args:
        moment: `(width, width)` second moment of the normalised stream, summed over layers.
        layers: one per layer.
        final: the stream behind the last layer.
    """

    moment: Tensor
    layers: list[LayerSignals]
    final: Stream


def activation_moments(mean: Tensor, variance: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of an activation function of a normal variable, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    nodes = torch.as_tensor(nodes, dtype=mean.dtype)
    weights = torch.as_tensor(weights / weights.sum(), dtype=mean.dtype)
    values = ACT2FN[activation](mean[:, None] + variance.clamp_min(0).sqrt()[:, None] * nodes)
    first = values @ weights
    return first, ((values - first[:, None]) ** 2) @ weights


def through_layer(stream: Stream, read: Callable[[str], Tensor], tower: Tower) -> tuple[Stream, LayerSignals]:
    """
    The stream behind a layer of the source, as if its parts were independent and normally distributed.

    Args:
        read: the tensor of the layer that has a name, such as `mlp.fc1.weight`.
    """
    attention = tower.attention
    behind = stream.normalized(read("layer_norm1.weight"), read("layer_norm1.bias"))
    value_weight, out_weight = read(f"{attention}.v_proj.weight"), read(f"{attention}.{tower.out_proj}.weight")
    value_mean = value_weight @ behind.mean + read(f"{attention}.v_proj.bias")
    values = (value_weight @ behind.covariance).unflatten(0, (tower.heads, -1))  # (heads, head_dim, width)
    values = values @ value_weight.unflatten(0, (tower.heads, -1)).mT  # (heads, head_dim, head_dim)
    outs = out_weight.unflatten(1, (tower.heads, -1)).movedim(1, 0)  # (heads, width, head_dim)
    head_scores = ((outs.mT @ outs) * values).sum((1, 2))
    path = out_weight @ value_weight
    stream = Stream(
        stream.mean + out_weight @ value_mean + read(f"{attention}.{tower.out_proj}.bias"),
        stream.covariance + ATTENDED_VARIANCE * path @ behind.covariance @ path.T,
    )
    behind = stream.normalized(read("layer_norm2.weight"), read("layer_norm2.bias"))
    up, down = read("mlp.fc1.weight"), read("mlp.fc2.weight")
    variance = ((up @ behind.covariance) * up).sum(1)
    mean, variance = activation_moments(up @ behind.mean + read("mlp.fc1.bias"), variance, tower.activation)
    stream = Stream(stream.mean + down @ mean + read("mlp.fc2.bias"), stream.covariance + (down * variance) @ down.T)
    return stream, LayerSignals(head_scores, value_mean, variance * down.square().sum(0), mean)


__all__ = ["LayerSignals", "Stream", "TowerSignals", "activation_moments", "through_layer"]
