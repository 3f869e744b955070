"""What passes through a tower, measured while it runs."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .signals import LayerSignals, Stream, TowerSignals


class Moments:
    """Mean and covariance of vectors, summed up batch by batch in float64."""

    def __init__(self, width: int):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, width, dtype=torch.float64)

    def add(self, vectors: Tensor):
        """`(..., width)`."""
        vectors = vectors.flatten(0, -2).float()
        self.count += len(vectors)
        self.sum += vectors.sum(0).double().cpu()
        self.squares += (vectors.T @ vectors).double().cpu()

    @property
    def stream(self) -> Stream:
        mean = self.sum / self.count
        return Stream(mean.float(), (self.squares / self.count - torch.outer(mean, mean)).float())


class Spread:
    """Mean and variance of each of many channels."""

    def __init__(self, width: int):
        self.count = 0
        self.sum, self.squares = torch.zeros(2, width, dtype=torch.float64)

    def add(self, vectors: Tensor):
        vectors = vectors.flatten(0, -2).float()
        self.count += len(vectors)
        self.sum += vectors.sum(0).double().cpu()
        self.squares += vectors.square().sum(0).double().cpu()

    @property
    def mean(self) -> Tensor:
        return (self.sum / self.count).float()

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - (self.sum / self.count).square()).float()


@torch.no_grad()
def measure_signals(
    layers: nn.ModuleList, out_proj: str, heads: int, streams: Iterable[Callable[[], Tensor]]
) -> TowerSignals:
    """
    Records the residual stream, heads and MLP neurons of a tower.

    Args:
        layers: of the tower, in evaluation mode.
        out_proj: name in a layer of what adds the heads to the stream.
        heads: of a layer.
        streams: each runs the tower on some inputs, and returns the stream behind the last layer.
    """
    width = layers[0].layer_norm1.normalized_shape[0]
    final, normalized = Moments(width), torch.zeros(width, width, dtype=torch.float64)
    values = [Moments(layer.get_submodule(out_proj).in_features) for layer in layers]
    neurons = [Spread(layer.mlp.fc2.in_features) for layer in layers]
    tokens = 0

    def record_stream(stream: Tensor):
        nonlocal tokens
        centered = stream.flatten(0, -2).float()
        centered = centered - centered.mean(1, keepdim=True)
        centered = centered / centered.square().mean(1, keepdim=True).clamp_min(1e-12).sqrt()
        tokens += len(centered)
        normalized.add_((centered.T @ centered).double().cpu())

    hooks = []
    for layer, value, neuron in zip(layers, values, neurons, strict=True):
        hooks += [
            layer.layer_norm1.register_forward_pre_hook(lambda _, args: record_stream(args[0])),
            layer.layer_norm2.register_forward_pre_hook(lambda _, args: record_stream(args[0])),
            layer.get_submodule(out_proj).register_forward_pre_hook(lambda _, args, value=value: value.add(args[0])),
            layer.mlp.fc2.register_forward_pre_hook(lambda _, args, neuron=neuron: neuron.add(args[0])),
        ]
    try:
        for run in streams:
            stream = run()
            record_stream(stream)
            final.add(stream)
    finally:
        for hook in hooks:
            hook.remove()
    signals = [_layer_signals(*parts, out_proj, heads) for parts in zip(layers, values, neurons, strict=True)]
    return TowerSignals((normalized / tokens).float(), signals, final.stream)


def _layer_signals(layer: nn.Module, value: Moments, neuron: Spread, out_proj: str, heads: int) -> LayerSignals:
    """Scores are the energies that a head or neuron adds to the stream around its mean, which goes into a bias."""
    weight = layer.get_submodule(out_proj).weight.detach().float().cpu()
    out = weight.unflatten(1, (heads, -1)).movedim(1, 0)
    stream = value.stream
    blocks = stream.covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # (heads, d, heads, d)
    own = torch.stack([blocks[head, :, head] for head in range(heads)])
    down = layer.mlp.fc2.weight.detach().float().cpu()
    return LayerSignals(
        ((out.mT @ out) * own).sum((1, 2)), stream.mean, neuron.variance * down.square().sum(0), neuron.mean
    )
