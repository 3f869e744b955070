"""What passes through a vision encoder, measured on images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..signals import LayerSignals, Stream, TowerSignals


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
def measure_signals(vision: nn.Module, batches: Iterable[Tensor]) -> TowerSignals:
    """
    Runs a vision encoder and records its residual stream, heads and MLP neurons.

    Args:
        vision: [`Sam3LiteVisionModel`] in evaluation mode.
        batches: `(images, 3, height, width)` each, on any device.
    """
    layers = vision.backbone.layers
    width = vision.config.backbone_config.hidden_size
    heads = vision.config.backbone_config.num_attention_heads
    final, normalized = Moments(width), torch.zeros(width, width, dtype=torch.float64)
    values = [Moments(width) for _ in layers]
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
            layer.attention.o_proj.register_forward_pre_hook(lambda _, args, value=value: value.add(args[0])),
            layer.mlp.fc2.register_forward_pre_hook(lambda _, args, neuron=neuron: neuron.add(args[0])),
        ]
    device = next(vision.parameters()).device
    try:
        for batch in batches:
            stream = vision.backbone(batch.to(device)).last_hidden_state
            record_stream(stream)
            final.add(stream)
    finally:
        for hook in hooks:
            hook.remove()
    signals = [_layer_signals(*parts, heads) for parts in zip(layers, values, neurons, strict=True)]
    return TowerSignals((normalized / tokens).float(), signals, final.stream)


def _layer_signals(layer: nn.Module, value: Moments, neuron: Spread, heads: int) -> LayerSignals:
    """Scores are the energies that a head or neuron adds to the stream around its mean, which goes into a bias."""
    out = layer.attention.o_proj.weight.detach().float().cpu().unflatten(1, (heads, -1)).movedim(1, 0)
    stream = value.stream
    blocks = stream.covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # (heads, d, heads, d)
    own = torch.stack([blocks[head, :, head] for head in range(heads)])
    down = layer.mlp.fc2.weight.detach().float().cpu()
    return LayerSignals(
        ((out.mT @ out) * own).sum((1, 2)), stream.mean, neuron.variance * down.square().sum(0), neuron.mean
    )
