"""Weights of a SAM 3 model for a smaller one, without data: selection, or rotation into a narrower residual stream."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.utils import logging

from ..checkpoints.checkpoint import Checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig
from ..files import write_file
from ..vocabulary_sam3_lite import INTEGER_BUFFERS

logger = logging.get_logger(__name__)

STRATEGIES = ("auto", "isometry", "select", "skip")
REPORT_FILE = "mapping_report.json"
# Share of the variance of a head's values that survives the average over the attended positions: a prior, only used
# to weigh attention against MLPs in the estimate of the residual stream.
ATTENDED_VARIANCE = 0.25
# ViT layers that DART-Pruned-16 keeps of the standard 32, by the global layers on both sides.
KNOWN_DEPTHS = {
    (32, (7, 15, 23, 31), 16, (6, 11, 13, 15)): [0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 13, 15, 16, 23, 29, 31],
}
_VIT = "vision_encoder.backbone"
_NECK = "vision_encoder.neck.fpn_layers"
_CLIP = "text_encoder.text_model"


@dataclass
class MappingRow:
    """
    What became of a group of tensors that differ in layer index and in weight or bias only.

    Args:
        group: name without `weight` and `bias`, layer indices as `*`.
        action: `copied`, `rotated`, `selected`, `refit` (fitted to images), `initialised` (at random, as an untrained
            model) or `dropped`.
        tensors, parameters: how many, in the target; in the source if dropped.
        source_shape, target_shape: of a weight, if there is one; `None` where it is not on that side.
        energy: share of the estimated signal that is kept, mean over the group; `None` where nothing is lost.
        reason: why a group was initialised or dropped.
    """

    group: str
    action: str
    tensors: int
    parameters: int
    source_shape: tuple[int, ...] | None
    target_shape: tuple[int, ...] | None
    energy: float | None = None
    reason: str = ""


@dataclass
class MappingReport:
    """
    Account of a mapping: one [`MappingRow`] per tensor group. `str()` is a table. It is of the model as the mapping
    made it: training it later, or freezing its vocabulary, changes nothing here.

    Args:
        source: where the weights come from.
        strategy: `isometry`, `select`, `skip`, `calibrated`, or `copy` where both sides have the same sizes.
        layers: for each stack of layers, the source layer that each target layer comes from.
        calibration: what a calibrated mapping measured.
        source_is_lite: whether the source was a lite model, and not one of SAM 3 itself.
    """

    source: str
    strategy: str
    layers: dict[str, list[int]] = field(default_factory=dict)
    rows: list[MappingRow] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)
    source_is_lite: bool = False

    def add(
        self,
        name: str,
        action: str,
        source_shape: tuple[int, ...] | None,
        target_shape: tuple[int, ...] | None,
        energy: float | None = None,
        reason: str = "",
    ):
        """Accounts for one tensor."""
        group = _group(name)
        size = math.prod(source_shape if target_shape is None else target_shape)
        for row in self.rows:
            if (row.group, row.action, row.reason) == (group, action, reason):
                if energy is not None:
                    known = 0.0 if row.energy is None else row.energy * row.tensors
                    row.energy = (known + energy) / (row.tensors + 1)
                row.tensors += 1
                row.parameters += size
                if name.endswith(".weight"):
                    row.source_shape, row.target_shape = source_shape, target_shape
                return
        self.rows.append(MappingRow(group, action, 1, size, source_shape, target_shape, energy, reason))

    def mark_refit(self, names: Iterable[str]):
        """Notes that tensors were fitted to data after they had been mapped."""
        groups = {_group(name) for name in names}
        for row in self.rows:
            if row.group in groups and row.target_shape is not None:
                row.action = "refit"

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Tensors and parameters per action."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows:
            total = totals.setdefault(row.action, {"tensors": 0, "parameters": 0})
            total["tensors"] += row.tensors
            total["parameters"] += row.parameters
        return totals

    def summary(self) -> str:
        """One sentence."""
        parts = [f"{total['tensors']} {action}" for action, total in self.totals.items()]
        return (
            f"Weights of {self.source} were mapped by `{self.strategy}`: {', '.join(parts)} tensors. "
            "`print(model.mapping_report)` shows them."
        )

    def to_json(self) -> str:
        """The report as JSON text: source, strategy, layers, totals, rows."""
        content = {
            "source": self.source,
            "source_is_lite": self.source_is_lite,
            "strategy": self.strategy,
            "layers": self.layers,
            "calibration": self.calibration,
            "totals": self.totals,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=2) + "\n"

    def save(self, folder: str | os.PathLike):
        """Writes `mapping_report.json` into `folder`."""
        write_file(Path(folder) / REPORT_FILE, self.to_json())

    def __str__(self) -> str:
        header = ("group", "action", "tensors", "source", "target", "energy", "reason")
        lines = [header]
        for row in self.rows:
            shapes = ["-" if s is None else "x".join(map(str, s)) for s in (row.source_shape, row.target_shape)]
            energy = "" if row.energy is None else f"{row.energy:.3f}"
            lines.append((row.group, row.action, str(row.tensors), *shapes, energy, row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join([self.summary(), *("  ".join(cells).rstrip() for cells in padded)])


def _group(name: str) -> str:
    """Name of a tensor without layer indices and without weight or bias."""
    return re.sub(r"\.(weight|bias)$", "", re.sub(r"(?<=\blayers|\bblocks)\.\d+(?=\.)", ".*", name))


@dataclass(frozen=True)
class Tower:
    """A pre-LayerNorm transformer: names and sizes of one side of a mapping."""

    prefix: str  # of the layers
    attention: str
    out_proj: str
    width: int
    heads: int
    mlp: int
    depth: int
    activation: str

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def _vision_tower(config: Sam3LiteConfig) -> Tower:
    vit = config.vision_config.backbone_config
    sizes = (vit.hidden_size, vit.num_attention_heads, vit.intermediate_size, vit.num_hidden_layers)
    return Tower(f"{_VIT}.layers", "attention", "o_proj", *sizes, vit.hidden_act)


def _text_tower(config: Sam3LiteConfig) -> Tower:
    text = config.text_config
    sizes = (text.hidden_size, text.num_attention_heads, text.intermediate_size, text.num_hidden_layers)
    return Tower(f"{_CLIP}.encoder.layers", "self_attn", "out_proj", *sizes, text.hidden_act)


# --- the residual stream -------------------------------------------------------------------------------------------


@dataclass
class Basis:
    """
    How the residual stream of the source becomes that of the target.

    Args:
        matrix: `(source width, target width)` with orthonormal columns; `None` leaves the stream as it is.
        folds: fold the affine part of every LayerNorm into the linear layers that read it. A rotation has to, a
            selection of channels cannot.
        energy: share of the estimated second moment of the stream that `matrix` keeps.
    """

    matrix: Tensor | None = None
    folds: bool = False
    energy: float | None = None

    @property
    def action(self) -> str:
        return "copied" if self.matrix is None else "rotated" if self.folds else "selected"

    @property
    def scale(self) -> float:
        """Factor on the rotated stream that keeps the variance per channel, and so the part of LayerNorm's epsilon."""
        return math.sqrt(self.matrix.shape[1] / self.matrix.shape[0]) if self.folds else 1.0

    @property
    def reader(self) -> Tensor:
        """`(source width, target width)`: undoes [`~Basis.write`] within the kept directions."""
        return self.matrix / self.scale

    def read(self, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """A linear layer `(out, width)` behind a LayerNorm."""
        if self.matrix is None:
            return weight, bias
        if not self.folds:
            return weight @ self.reader, bias
        return (weight * gamma) @ self.reader, bias + weight @ beta

    def norm(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of that LayerNorm."""
        if self.matrix is None:
            return gamma, beta
        if not self.folds:
            return self.write(gamma), self.write(beta)
        size = self.matrix.shape[1]
        return gamma.new_ones(size), beta.new_zeros(size)

    def write(self, tensor: Tensor) -> Tensor:
        """What is added to the stream: `(width, ...)`."""
        return tensor if self.matrix is None else self.scale * self.matrix.T @ tensor


def rotation(moment: Tensor, size: int) -> Basis:
    """
    An isometry under which LayerNorm stays LayerNorm: it takes the constant vector to the constant vector, and the
    `size - 1` strongest other directions of the stream to the rest.

    Args:
        moment: `(width, width)` second moment of the stream.
        size: target width, at most `width`.
    """
    width = len(moment)
    moment = moment.double()
    constant = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    centred = moment - constant @ (constant.T @ moment)
    centred = centred - (centred @ constant) @ constant.T
    total = centred.trace().clamp_min(1e-30)
    # The constant vector has no part in the centred moment; below all others, it is not among the strongest.
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2 - total * constant @ constant.T)
    strongest = vectors.flip(1)[:, : size - 1]
    signs = strongest.gather(0, strongest.abs().argmax(0, keepdim=True)).sign()
    small = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    # Householder reflection that swaps the last unit vector and the constant one: its other columns complete it.
    mirror = small.clone()
    mirror[-1] -= 1
    rest = torch.eye(size, dtype=torch.float64)
    if size > 1:
        rest = rest - 2 * mirror @ mirror.T / (mirror.T @ mirror)
    matrix = constant @ small.T + (strongest * signs) @ rest[:, :-1].T
    energy = (values.flip(0)[: size - 1].sum() / total).item()
    return Basis(matrix.float(), folds=True, energy=energy)


def selection(moment: Tensor, size: int) -> Basis:
    """The `size` strongest channels of the stream, in their order; `moment` is `(width, width)`."""
    scores = moment.diagonal()
    chosen = scores.topk(size).indices.sort().values
    return Basis(torch.eye(len(moment))[:, chosen], energy=(scores[chosen].sum() / scores.sum()).item())


@dataclass
class Stream:
    """Estimate of the residual stream: mean `(width,)` and covariance `(width, width)` over positions and images."""

    mean: Tensor
    covariance: Tensor

    def normalised(self, gamma: Tensor | None = None, beta: Tensor | None = None) -> Stream:
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


def _through_layer(stream: Stream, read, tower: Tower) -> tuple[Stream, LayerSignals]:
    """The stream behind a layer of the source, as if its parts were independent and normally distributed."""
    attention = tower.attention
    behind = stream.normalised(read("layer_norm1.weight"), read("layer_norm1.bias"))
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
    behind = stream.normalised(read("layer_norm2.weight"), read("layer_norm2.bias"))
    up, down = read("mlp.fc1.weight"), read("mlp.fc2.weight")
    variance = ((up @ behind.covariance) * up).sum(1)
    mean, variance = activation_moments(up @ behind.mean + read("mlp.fc1.bias"), variance, tower.activation)
    stream = Stream(stream.mean + down @ mean + read("mlp.fc2.bias"), stream.covariance + (down * variance) @ down.T)
    return stream, LayerSignals(head_scores, value_mean, variance * down.square().sum(0), mean)


def depth_map(source_types: list[bool], target_types: list[bool]) -> list[int]:
    """
    Source layers to keep, in order, evenly spread, each of its target layer's type.

    Args:
        source_types, target_types: per layer, e.g. whether its attention is global.

    Raises:
        ValueError: there is no such choice.
    """
    source, target = len(source_types), len(target_types)
    infinite = float("inf")
    cost = np.full((target + 1, source + 1), infinite)  # of the first layers of the target from those of the source
    cost[0] = 0
    takes_last = np.zeros_like(cost, dtype=bool)
    for j in range(1, target + 1):
        for i in range(1, source + 1):
            # From even spacing between the first and the last layer, which both stay. In whole numbers, so that ties
            # are ties: then the later layer stays.
            offset = ((i - 1) * (target - 1) - (j - 1) * (source - 1)) ** 2
            fits = source_types[i - 1] == target_types[j - 1]
            taken = cost[j - 1, i - 1] + offset if fits else infinite
            takes_last[j, i] = taken <= cost[j, i - 1]
            cost[j, i] = min(cost[j, i - 1], taken)
    if cost[target, source] == infinite:
        raise ValueError(
            f"{target} layers (global: {[i for i, t in enumerate(target_types) if t]}) cannot be chosen in order from "
            f"{source} (global: {[i for i, t in enumerate(source_types) if t]}), windowed from windowed and global "
            "from global: use other `global_attn_indexes` or fewer layers."
        )
    kept, i = [], source
    for j in range(target, 0, -1):
        while not takes_last[j, i]:
            i -= 1
        kept.append(i - 1)
        i -= 1
    return kept[::-1]


def layer_maps(source: Sam3LiteConfig, target: Sam3LiteConfig) -> dict[str, list[int]]:
    """
    For each stack of layers, by its prefix, the source layers to keep.

    Raises:
        ValueError: the sizes cannot be mapped.
    """
    _check_sizes(source, target)

    def types(config: Sam3LiteConfig) -> list[bool]:
        vit = config.vision_config.backbone_config
        return [i in vit.global_attn_indexes for i in range(vit.num_hidden_layers)]

    def spread(old: int, new: int) -> list[int]:
        return depth_map([False] * old, [False] * new)

    def global_layers(config: Sam3LiteConfig) -> tuple[int, ...]:
        return tuple(config.vision_config.backbone_config.global_attn_indexes)

    vision = (len(types(source)), global_layers(source), len(types(target)), global_layers(target))
    return {
        f"{_VIT}.layers": KNOWN_DEPTHS.get(vision) or depth_map(types(source), types(target)),
        f"{_CLIP}.encoder.layers": spread(source.text_config.num_hidden_layers, target.text_config.num_hidden_layers),
        "geometry_encoder.layers": spread(
            source.geometry_encoder_config.num_layers, target.geometry_encoder_config.num_layers
        ),
        "detr_encoder.layers": spread(source.detr_encoder_config.num_layers, target.detr_encoder_config.num_layers),
        # The last one stays: the mask head has learnt to read it alone. Boxes come out a little coarser, masks right.
        "detr_decoder.layers": spread(source.detr_decoder_config.num_layers, target.detr_decoder_config.num_layers),
    }


# --- the mapping ---------------------------------------------------------------------------------------------------


class Mapper:
    """
    Computes the parameters of a target model from a checkpoint, one tensor at a time.

    Args:
        checkpoint: the source.
        config: sizes of the target.
        shapes: name and shape of every parameter of the target.
        strategy: `isometry`, `select` or `skip`.
        dtype: of the result. All sums are computed in float32.
        vision_signals: measured ones of the source's ViT; estimated from its weights by default.
        layers: the layers to keep of some stacks, by their prefix; evenly spread by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Sam3LiteConfig,
        shapes: dict[str, tuple[int, ...]],
        strategy: str,
        dtype: torch.dtype,
        vision_signals: TowerSignals | None = None,
        layers: dict[str, list[int]] | None = None,
    ):
        self.checkpoint, self.config, self.shapes = checkpoint, config, shapes
        self.strategy, self.dtype = strategy, dtype
        self.vision_signals, self.layers = vision_signals, layers or {}
        self.state: dict[str, Tensor] = {}
        # Allocated before any temporary tensor, lest they end up between and fragment the memory.
        self._results = {
            name: torch.empty(shape, dtype=torch.long if name in INTEGER_BUFFERS else dtype)
            for name, shape in shapes.items()
        }
        self.report = MappingReport(checkpoint.label, strategy, source_is_lite=checkpoint.is_lite)
        self._used: set[str] = set()
        self.mismatched: list[str] = []  # tensors left to initialisation because their sizes differ

    def read(self, name: str) -> Tensor:
        """A source tensor in float32."""
        if name not in self.checkpoint:
            raise ValueError(f"{self.checkpoint.label} lacks `{name}`, without which its sizes cannot be changed.")
        self._used.add(name)
        return self.checkpoint.read(name).float()

    def put(self, name: str, tensor: Tensor, source: str, action: str, energy: float | None = None):
        """Stores a target tensor that comes from the source tensor `source`."""
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            raise ValueError(f"`{name}` was mapped to {tuple(tensor.shape)}, the model has {self.shapes[name]}.")
        result = self._results.pop(name).copy_(tensor)
        if not result.isfinite().all():
            raise ValueError(f"`{source}` does not fit into {self.dtype} or is not finite: use another `dtype`.")
        self.state[name] = result
        self._used.add(source)
        self.report.add(name, action, self.checkpoint.shape(source), tuple(tensor.shape), energy)

    def run(self):
        """Maps everything; see [`map_checkpoint`]."""
        if self.strategy == "skip":
            layers = {}
        else:
            layers = layer_maps(self.checkpoint.config, self.config) | self.layers
            self._map_towers(layers)
        self.report.layers = layers
        for name in self.shapes:
            if name not in self.state:
                self._copy(name, _source_name(name, layers))
        for name in self.checkpoint:
            if name not in self._used:
                self.report.add(name, "dropped", self.checkpoint.shape(name), None, reason="not in the smaller model")
        for name, reason in self.checkpoint.dropped.items():
            self.report.add(name, "dropped", self.checkpoint.stored_shape(name), None, reason=reason)
        for name in self.checkpoint.unknown:
            self.report.add(name, "dropped", self.checkpoint.stored_shape(name), None, reason="unknown name")

    def _copy(self, name: str, source: str):
        """Copies a tensor as it is, or its first rows where the target has fewer queries."""
        if source not in self.checkpoint:
            self.report.add(name, "initialised", None, self.shapes[name], reason="not in the source")
            return
        have, want = self.checkpoint.shape(source), tuple(self.shapes[name])
        per_query = name in ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight")
        if have == want:
            self.put(name, self.checkpoint.read(source), source, "copied")
        elif per_query and self.strategy != "skip" and have[1:] == want[1:] and have[0] > want[0]:
            self.put(name, self.checkpoint.read(source)[: want[0]], source, "selected")
        else:
            self._used.add(source)
            self.mismatched.append(f"{name}: {have} in the source, {want} in the model")
            self.report.add(name, "initialised", have, want, reason="sizes differ")

    def _map_towers(self, layers: dict[str, list[int]]):
        source, target = self.checkpoint.config, self.config
        old, new = _vision_tower(source), _vision_tower(target)
        if (old.width, old.mlp) != (new.width, new.mlp):
            signals = self.vision_signals
            if signals is None:
                entry = self._patches().normalised(*self._pair(f"{_VIT}.layer_norm"))
                signals = self._estimate_signals(old, entry)
            self._map_tower(old, new, layers[old.prefix], signals, self._vision_ends)
        old, new = _text_tower(source), _text_tower(target)
        if source.vocabulary is None and (old.width, old.mlp) != (new.width, new.mlp):
            signals = self._estimate_signals(old, self._tokens())
            self._map_tower(old, new, layers[old.prefix], signals, self._text_ends)

    def _estimate_signals(self, tower: Tower, stream: Stream) -> TowerSignals:
        """Follows the stream through the source's weights."""
        layers = []
        moment = torch.zeros_like(stream.covariance)
        for i in range(tower.depth):
            moment += stream.normalised().moment
            stream, signals = _through_layer(stream, lambda leaf, i=i: self.read(f"{tower.prefix}.{i}.{leaf}"), tower)
            layers.append(signals)
        moment += stream.normalised().moment
        # Layers that are read for the estimate only are still dropped.
        self._used -= {name for name in self._used if name.startswith(tower.prefix)}
        return TowerSignals(moment, layers, stream)

    def _map_tower(self, old: Tower, new: Tower, kept: list[int], signals: TowerSignals, map_ends):
        basis = self._basis(signals.moment, new.width)
        for j, i in enumerate(kept):
            self._map_layer(old, new, i, j, signals.layers[i], basis)
        map_ends(basis, signals.final)

    def _basis(self, moment: Tensor, width: int) -> Basis:
        if len(moment) == width:
            return Basis()
        return rotation(moment, width) if self.strategy == "isometry" else selection(moment, width)

    def _map_layer(self, old: Tower, new: Tower, i: int, j: int, signals: LayerSignals, basis: Basis):
        heads = signals.head_scores.topk(new.heads).indices.sort().values
        channels = (heads[:, None] * old.head_dim + torch.arange(old.head_dim)).flatten()
        neurons = signals.neuron_scores.topk(new.mlp).indices.sort().values
        attention = old.attention
        out = f"{attention}.{old.out_proj}"
        readers = {
            "layer_norm1": {f"{attention}.{letter}_proj": channels for letter in "qkv"},
            "layer_norm2": {"mlp.fc1": neurons},
        }
        writers = {
            out: (channels, signals.value_mean, signals.head_scores[heads].sum() / signals.head_scores.sum()),
            "mlp.fc2": (
                neurons,
                signals.neuron_mean,
                signals.neuron_scores[neurons].sum() / signals.neuron_scores.sum(),
            ),
        }
        for norm, linears in readers.items():
            affine = self._pair(f"{old.prefix}.{i}.{norm}")
            for name, rows in linears.items():
                weight, bias = self._pair(f"{old.prefix}.{i}.{name}")
                mapped = basis.read(weight[rows], bias[rows], *affine)
                action = "selected" if basis.matrix is None and len(rows) < len(weight) else basis.action
                self._put_pair(old, new, i, j, name, mapped, action, basis.energy)
            self._put_pair(old, new, i, j, norm, basis.norm(*affine), basis.action, None)
        for name, (columns, mean, energy) in writers.items():
            weight, bias = self._pair(f"{old.prefix}.{i}.{name}")
            removed = mean.clone()
            removed[columns] = 0  # what the removed heads or neurons add on average goes into the bias
            mapped = (basis.write(weight[:, columns]), basis.write(bias + weight @ removed))
            action = "selected" if basis.matrix is None and len(columns) < weight.shape[1] else basis.action
            self._put_pair(old, new, i, j, name, mapped, action, energy.item() if action != "copied" else None)

    def _pair(self, module: str) -> tuple[Tensor, Tensor]:
        return self.read(f"{module}.weight"), self.read(f"{module}.bias")

    def _put_pair(self, old: Tower, new: Tower, i: int, j: int, module: str, pair, action: str, energy: float | None):
        for leaf, tensor in zip(("weight", "bias"), pair, strict=True):
            name, source = f"{new.prefix}.{j}.{module}.{leaf}", f"{old.prefix}.{i}.{module}.{leaf}"
            self.put(name, tensor, source, action, energy)

    # ViT: patches and positions in front, the feature pyramid behind

    def _patches(self) -> Stream:
        """The embedded patches, for pixels with the colour and position correlations of natural images."""
        weight = self.read(f"{_VIT}.embeddings.patch_embeddings.projection.weight")
        positions = self.read(f"{_VIT}.embeddings.position_embeddings")[0]
        kernel, patch = weight.flatten(1), weight.shape[-1]
        grid = torch.cartesian_prod(torch.arange(patch), torch.arange(patch)).float()
        near = torch.exp(-torch.cdist(grid, grid) / patch)
        colours = 0.6 + 0.4 * torch.eye(weight.shape[1])
        prior = 0.25 * torch.kron(colours, near)  # pixels in [-1, 1] have a standard deviation of about 0.5
        spread = positions - positions.mean(0)
        return Stream(positions.mean(0), kernel @ prior @ kernel.T + spread.T @ spread / len(spread))

    def _vision_ends(self, basis: Basis, final: Stream):
        projection = f"{_VIT}.embeddings.patch_embeddings.projection.weight"
        positions = f"{_VIT}.embeddings.position_embeddings"
        weight, table = self.read(projection), self.read(positions)
        gamma, beta = self._pair(f"{_VIT}.layer_norm")
        if basis.folds:
            # No linear layer reads this LayerNorm alone, so its weight moves in front of it: exact if it is constant.
            matrix = basis.scale * basis.matrix.T * gamma
            matrix = matrix - matrix.mean(0, keepdim=True)
            matrix = matrix - matrix.mean(1, keepdim=True)
            length = ((matrix @ self._patches().normalised().moment) * matrix).sum()
            gamma = torch.full((len(matrix),), math.sqrt(length / len(matrix)))
        else:
            matrix = torch.eye(len(gamma)) if basis.matrix is None else basis.matrix.T
            gamma = basis.write(gamma)
        self.put(projection, torch.tensordot(matrix, weight, 1), projection, basis.action, basis.energy)
        self.put(positions, table @ matrix.T, positions, basis.action, basis.energy)
        self.put(f"{_VIT}.layer_norm.weight", gamma, f"{_VIT}.layer_norm.weight", basis.action)
        self.put(f"{_VIT}.layer_norm.bias", basis.write(beta), f"{_VIT}.layer_norm.bias", basis.action)
        if basis.matrix is not None:
            self._map_coarse_level(basis)
            self._map_middle_level(basis, final)
            self._map_fine_level(basis, final)

    def _map_coarse_level(self, basis: Basis):
        name = f"{_NECK}.2.proj1.weight"
        weight = self.read(name).flatten(1) @ basis.reader
        self.put(name, weight[:, :, None, None], name, basis.action, basis.energy)

    def _map_middle_level(self, basis: Basis, final: Stream):
        """Twice the resolution: a transposed convolution and a projection with nothing between them."""
        up, up_bias = self._pair(f"{_NECK}.1.scale_layers.0")  # (width, channels, 2, 2)
        down, down_bias = self._pair(f"{_NECK}.1.proj1")
        down = down.flatten(1)  # (fpn, channels)
        up = torch.einsum("wcij,wn->ncij", up, basis.reader)
        covariance = basis.write(basis.write(final.covariance).T)
        parts = self._project(basis, up, up_bias, down, covariance, basis.write(final.mean))
        self._put_level(f"{_NECK}.1.scale_layers.0", f"{_NECK}.1.proj1", parts, down_bias, basis)

    def _map_fine_level(self, basis: Basis, final: Stream):
        """Four times the resolution: a GELU between two transposed convolutions, then a projection."""
        first, first_bias = self._pair(f"{_NECK}.0.scale_layers.0")  # (width, middle, 2, 2)
        second, second_bias = self._pair(f"{_NECK}.0.scale_layers.2")  # (middle, channels, 2, 2)
        down, down_bias = self._pair(f"{_NECK}.0.proj1")
        down = down.flatten(1)  # (fpn, channels)
        taps = first.movedim(0, -1).flatten(1, 2)  # (middle, 4, width)
        mean = taps @ final.mean + first_bias[:, None]
        variance = ((taps @ final.covariance) * taps).sum(-1)
        mean, variance = (t.view(-1, 4) for t in activation_moments(mean.flatten(), variance.flatten(), "gelu"))
        variance = variance.mean(1) + mean.var(1, unbiased=False)
        mean = mean.mean(1)

        combined = torch.einsum("fc,mcij->fmij", down, second)
        scores = variance * combined.square().sum((0, 2, 3))
        name = f"{_NECK}.0.scale_layers.0"
        kept = scores.topk(self.shapes[f"{name}.bias"][0]).indices.sort().values
        removed = mean.clone()
        removed[kept] = 0
        # One bias serves four taps, so it gets what the removed channels add on average.
        down_bias = down_bias + torch.einsum("fmij,m->f", combined, removed) / 4
        first = torch.einsum("wmij,wn->nmij", first[:, kept], basis.reader)
        energy = (scores[kept].sum() / scores.sum()).item()
        for leaf, tensor in (("weight", first), ("bias", first_bias[kept])):
            self.put(f"{name}.{leaf}", tensor, f"{name}.{leaf}", basis.action, energy)
        parts = self._project(basis, second[kept], second_bias, down, torch.diag(variance[kept]), mean[kept])
        self._put_level(f"{_NECK}.0.scale_layers.2", f"{_NECK}.0.proj1", parts, down_bias, basis)

    def _project(
        self, basis: Basis, up: Tensor, up_bias: Tensor, down: Tensor, covariance: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """
        Narrows what lies between a transposed convolution and the 1x1 projection behind it to half the inputs: to
        its strongest channels, or, for a rotation, to the strongest directions of the output, which is exact if
        there are as many as the output has.

        Args:
            up: `(inputs, channels, 2, 2)`; its inputs have `covariance` and `mean`.
            up_bias: `(channels,)`.
            down: `(outputs, channels)`.

        Returns:
            Convolution and its bias, projection and what to add to its bias, share of energy kept.
        """
        width = len(up) // 2
        scores = up.square().sum((0, 2, 3)) * down.square().sum(0)
        if not basis.folds:
            kept = scores.topk(width).indices.sort().values
            energy = (scores[kept].sum() / scores.sum()).item()
            return up[:, kept], up_bias[kept], down[:, kept], down.new_zeros(len(down)), energy
        combined = torch.einsum("fc,icjk->fijk", down, up)
        taps = combined.flatten(2).movedim(2, 0)  # (4, outputs, inputs)
        moment = (taps @ covariance @ taps.mT).sum(0).double()
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        directions = vectors.flip(1)[:, :width].float()  # (outputs, at most width)
        energy = (values.flip(0)[:width].sum() / values.sum().clamp_min(1e-30)).item()
        lost = (taps @ mean).mean(0)
        lost = lost - directions @ (directions.T @ lost)
        # Channels beyond those directions start as channels of the source that the projection does not read yet.
        spare = scores.topk(width - directions.shape[1]).indices
        new_up = torch.cat([torch.einsum("fr,fijk->irjk", directions, combined), up[:, spare]], dim=1)
        new_up_bias = torch.cat([up_bias.new_zeros(directions.shape[1]), up_bias[spare]])
        new_down = torch.cat([directions, directions.new_zeros(len(down), len(spare))], dim=1)
        return new_up, new_up_bias, new_down, down @ up_bias + lost, energy

    def _put_level(self, convolution: str, projection: str, parts: tuple, bias: Tensor, basis: Basis):
        up, up_bias, down, more_bias, energy = parts
        self.put(f"{convolution}.weight", up, f"{convolution}.weight", basis.action, energy)
        self.put(f"{convolution}.bias", up_bias, f"{convolution}.bias", basis.action, energy)
        self.put(f"{projection}.weight", down[:, :, None, None], f"{projection}.weight", basis.action, energy)
        self.put(f"{projection}.bias", bias + more_bias, f"{projection}.bias", basis.action, energy)

    # text encoder: embeddings in front, the projection to the detector's width behind

    def _tokens(self) -> Stream:
        tokens = self.read(f"{_CLIP}.embeddings.token_embedding.weight")
        positions = self.read(f"{_CLIP}.embeddings.position_embedding.weight")
        means = tokens.mean(0), positions.mean(0)
        covariance = sum(
            table.T @ table / len(table) - torch.outer(mean, mean)
            for table, mean in zip((tokens, positions), means, strict=True)
        )
        return Stream(sum(means), covariance)

    def _text_ends(self, basis: Basis, final: Stream):
        for module in ("token_embedding", "position_embedding"):
            name = f"{_CLIP}.embeddings.{module}.weight"
            table = self.read(name)
            self.put(name, basis.write(table.T).T, name, basis.action, basis.energy)
        norm = self._pair(f"{_CLIP}.final_layer_norm")
        projection = basis.read(*self._pair("text_projection"), *norm)
        for module, pair in ((f"{_CLIP}.final_layer_norm", basis.norm(*norm)), ("text_projection", projection)):
            for leaf, tensor in zip(("weight", "bias"), pair, strict=True):
                self.put(f"{module}.{leaf}", tensor, f"{module}.{leaf}", basis.action, basis.energy)


def _source_name(name: str, layers: dict[str, list[int]]) -> str:
    """Name in the source of what the target calls `name`."""
    for prefix, kept in layers.items():
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if match:
            return f"{prefix}.{kept[int(match[1])]}.{name[match.end() :]}"
    return name


def _check_sizes(source: Sam3LiteConfig, target: Sam3LiteConfig):
    """Raises a ValueError where the target is not the smaller one, or has heads of another size."""
    grown, heads = [], []
    for label, tower in (("vision_config.backbone_config", _vision_tower), ("text_config", _text_tower)):
        old, new = tower(source), tower(target)
        sizes = {"hidden_size": "width", "intermediate_size": "mlp", "num_hidden_layers": "depth"}
        grown += [
            f"`{label}.{name}` from {getattr(old, size)} to {getattr(new, size)}"
            for name, size in sizes.items()
            if getattr(new, size) > getattr(old, size)
        ]
        if old.head_dim != new.head_dim:
            heads.append(
                f"`{label}` has heads of {new.head_dim} channels, the source of {old.head_dim}: heads are kept whole, "
                f"so set `num_attention_heads` to {new.width / old.head_dim:g}."
            )
    for part in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config"):
        old, new = getattr(source, part).num_layers, getattr(target, part).num_layers
        grown += [f"`{part}.num_layers` from {old} to {new}"] if new > old else []
    if grown:
        raise ValueError(
            f"A mapping makes a model smaller, but this one would grow: {', '.join(grown)}. Use other sizes, or "
            '`mapping="skip"`, which leaves what does not fit to random initialisation.'
        )
    if heads:
        raise ValueError(" ".join(heads))


def _check_vocabularies(checkpoint: Checkpoint, target: Sam3LiteConfig):
    """Raises a ValueError unless both sides have a text encoder, or the same fixed vocabulary."""
    if checkpoint.config.vocabulary == target.vocabulary:
        return
    if checkpoint.config.vocabulary is not None:
        raise ValueError(
            f"{checkpoint.label} has the fixed vocabulary {checkpoint.config.vocabulary} and no text encoder: give "
            "the model the same `vocabulary`, or the source its encoder with `restore_text_encoder`."
        )
    raise ValueError(
        f"{checkpoint.label} has a text encoder, and a model with a `vocabulary` has none: load it without, then call "
        "`freeze_vocabulary`."
    )


def map_checkpoint(
    checkpoint: Checkpoint,
    config: Sam3LiteConfig,
    shapes: dict[str, tuple[int, ...]],
    strategy: str = "auto",
    dtype: torch.dtype = torch.float32,
    ignore_mismatched_sizes: bool = False,
    vision_signals: TowerSignals | None = None,
    layers: dict[str, list[int]] | None = None,
) -> tuple[dict[str, Tensor], MappingReport]:
    """
    Parameters of a model from a checkpoint of other sizes, without data. Where the sizes agree they are copied.

    Args:
        checkpoint: the source.
        config: sizes of the model.
        shapes: name and shape of each of its parameters.
        strategy: `isometry` rotates the residual streams of ViT and text encoder into their strongest directions
            such that LayerNorm stays LayerNorm, and keeps the heads and neurons that carry most; `select` keeps
            channels, heads and neurons as they are; both keep evenly spread layers (windowed from windowed, global
            from global). `skip` copies what fits. `auto` is `isometry`.
        dtype: of the result.
        ignore_mismatched_sizes: leave tensors of sizes that no strategy can change (those of the detector) to
            initialisation.
        vision_signals: what passes through the source's ViT, if it was measured; see `sam3_hf.mapping.calibration`.
        layers: the layers to keep of some stacks, by their prefix (as in `MappingReport.layers`), instead of evenly
            spread ones.

    Returns:
        The parameters, without those to be initialised; and the account of all of them.

    Raises:
        ValueError: no such strategy, a model larger than the source, sizes that no strategy can change, or values
            beyond `dtype`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no mapping {strategy!r}: use one of {', '.join(STRATEGIES)}.")
    _check_vocabularies(checkpoint, config)
    strategy = "isometry" if strategy == "auto" else strategy
    mapper = Mapper(checkpoint, config, shapes, strategy, dtype, vision_signals, layers)
    mapper.run()
    if mapper.mismatched and strategy != "skip" and not ignore_mismatched_sizes:
        raise ValueError(
            f"{checkpoint.label}: {len(mapper.mismatched)} tensors have sizes that no mapping changes: "
            f"{'; '.join(mapper.mismatched[:4])}. Use the sizes of the source there, or pass "
            "`ignore_mismatched_sizes=True` to initialise them at random."
        )
    if set(mapper.report.totals) <= {"copied", "dropped"}:
        mapper.report.strategy = "copy"
    return mapper.state, mapper.report


__all__ = [
    "REPORT_FILE",
    "STRATEGIES",
    "MappingReport",
    "MappingRow",
    "layer_maps",
    "map_checkpoint",
]
