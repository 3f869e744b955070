"""Weights of a SAM 3 model for a smaller one, without data: selection, or rotation into a narrower residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig
from ..detr_sam3_lite import untrained_queries
from .basis import Basis, rotation, selection
from .depth import layer_maps, source_name
from .ends import map_text_ends, map_vision_ends, text_entry, vision_entry
from .report import MappingReport
from .signals import LayerSignals, Stream, TowerSignals, through_layer
from .towers import Tower, has_clip, text_tower, vision_tower
from .transfer import Transfer

STRATEGIES = ("auto", "isometry", "select", "skip")
_PER_QUERY = ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight")


class Mapper:
    """
    Computes the parameters of a target model from a checkpoint, one tensor at a time.

    Args:
        checkpoint: the source.
        config: sizes of the target.
        shapes: name and shape of every parameter of the target that is wanted.
        strategy: `isometry`, `select` or `skip`.
        dtype: of the result. All sums are computed in float32.
        vision_signals, text_signals: measured ones of the source's towers; estimated from its weights by default.
        layers: the layers to keep of some stacks, by their prefix; evenly spread by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Sam3LiteConfig,
        shapes: dict[str, tuple[int, ...]],
        strategy: str,
        *,
        dtype: torch.dtype,
        vision_signals: TowerSignals | None = None,
        text_signals: TowerSignals | None = None,
        layers: dict[str, list[int]] | None = None,
    ):
        self.checkpoint, self.config, self.strategy = checkpoint, config, strategy
        self.vision_signals, self.text_signals, self.layers = vision_signals, text_signals, layers or {}
        self.transfer = Transfer(checkpoint, shapes, strategy, dtype)
        self.mismatched: list[str] = []  # tensors left to initialisation because their sizes differ

    def run(self) -> tuple[dict[str, Tensor], MappingReport]:
        """Maps everything; see [`map_checkpoint`]."""
        transfer, layers = self.transfer, {}
        if self.strategy != "skip":
            layers = layer_maps(self.checkpoint.config, self.config) | self.layers
            self._map_tower(vision_tower, layers, self.vision_signals, vision_entry, map_vision_ends)
            if has_clip(self.config):
                self._map_tower(text_tower, layers, self.text_signals, text_entry, map_text_ends)
        transfer.report.layers = layers
        for name in transfer.shapes:
            if name not in transfer.state:
                self._copy(name, source_name(name, layers))
        transfer.drop_rest()
        if set(transfer.report.totals) <= {"copied", "dropped"}:
            transfer.report.strategy = "copy"
        return transfer.state, transfer.report

    def _copy(self, name: str, source: str):
        """Copies a tensor. Of queries those that the target has room for; where it has more, new ones follow them."""
        if source not in self.checkpoint:
            self.transfer.initialize(name, source)
            return
        have, want = self.checkpoint.shape(source), tuple(self.transfer.shapes[name])
        if have == want:
            self.transfer.put(name, self.checkpoint.read(source), source, "copied")
        elif name in _PER_QUERY and self.strategy != "skip" and have[1:] == want[1:] and have[0] > want[0]:
            self.transfer.put(name, self.checkpoint.read(source)[: want[0]], source, "selected")
        elif name in _PER_QUERY and self.strategy != "skip" and have[1:] == want[1:]:
            old = self.checkpoint.read(source).float()
            new = untrained_queries(name.split(".")[1], old.new_empty(want[0] - have[0], *have[1:]))
            reason = f"{len(new)} of {want[0]} as before training"
            self.transfer.put(name, torch.cat([old, new]), source, "extended", reason=reason)
        else:
            self.mismatched.append(f"{name}: {have} in the source, {want} in the model")
            self.transfer.initialize(name, source)

    def _map_tower(
        self,
        tower: Callable[[Sam3LiteConfig], Tower],
        layers: dict[str, list[int]],
        signals: TowerSignals | None,
        entry: Callable[[Transfer], Stream],
        map_ends: Callable[[Transfer, Basis, Stream], None],
    ):
        """
        Args:
            tower: names and sizes of it.
            layers: the source layers to keep, by the prefix of the stack.
            signals: measured ones; estimated from the weights if there are none.
            entry: estimates the stream in front of the first layer.
            map_ends: maps what is in front of the tower and behind it.
        """
        old, new = tower(self.checkpoint.config), tower(self.config)
        if not self._narrows(old, new):
            return
        if signals is None:
            signals = self._estimate_signals(old, entry(self.transfer))
        basis = self._basis(signals.moment, new.width)
        for j, i in enumerate(layers[old.prefix]):
            self._map_layer(old, new, i, j, signals.layers[i], basis)
        map_ends(self.transfer, basis, signals.final)

    def _narrows(self, old: Tower, new: Tower) -> bool:
        """Whether the target has this tower, and in another width: layers alone are copied."""
        wanted = any(name.startswith(new.prefix) for name in self.transfer.shapes)
        return wanted and (old.width, old.mlp) != (new.width, new.mlp)

    def _estimate_signals(self, tower: Tower, stream: Stream) -> TowerSignals:
        """Follows the stream through the source's weights."""
        layers = []
        moment = torch.zeros_like(stream.covariance)
        for i in range(tower.depth):
            moment += stream.normalized().moment
            stream, signals = through_layer(
                stream, lambda leaf, i=i: self.transfer.read(f"{tower.prefix}.{i}.{leaf}"), tower
            )
            layers.append(signals)
        moment += stream.normalized().moment
        self.transfer.forget_reads(tower.prefix)
        return TowerSignals(moment, layers, stream)

    def _basis(self, moment: Tensor, width: int) -> Basis:
        if len(moment) == width:
            return Basis()
        return rotation(moment, width) if self.strategy == "isometry" else selection(moment, width)

    def _map_layer(self, old: Tower, new: Tower, i: int, j: int, signals: LayerSignals, basis: Basis):
        """Layer `j` of the target from layer `i` of the source."""
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
        source, target, put_pair = f"{old.prefix}.{i}", f"{new.prefix}.{j}", self.transfer.put_pair
        for norm, linears in readers.items():
            affine = self.transfer.pair(f"{source}.{norm}")
            for name, rows in linears.items():
                weight, bias = self.transfer.pair(f"{source}.{name}")
                mapped = basis.read(weight[rows], bias[rows], *affine)
                action = "selected" if basis.matrix is None and len(rows) < len(weight) else basis.action
                put_pair(f"{target}.{name}", mapped, f"{source}.{name}", action, basis.energy)
            put_pair(f"{target}.{norm}", basis.norm(*affine), f"{source}.{norm}", basis.action)
        for name, (columns, mean, energy) in writers.items():
            weight, bias = self.transfer.pair(f"{source}.{name}")
            removed = mean.clone()
            removed[columns] = 0  # what the removed heads or neurons add on average goes into the bias
            mapped = (basis.write(weight[:, columns]), basis.write(bias + weight @ removed))
            action = "selected" if basis.matrix is None and len(columns) < weight.shape[1] else basis.action
            kept = energy.item() if action != "copied" else None
            put_pair(f"{target}.{name}", mapped, f"{source}.{name}", action, kept)


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
    *,
    dtype: torch.dtype = torch.float32,
    ignore_mismatched_sizes: bool = False,
    vision_signals: TowerSignals | None = None,
    text_signals: TowerSignals | None = None,
    layers: dict[str, list[int]] | None = None,
) -> tuple[dict[str, Tensor], MappingReport]:
    """
    Parameters of a model from a checkpoint of other sizes, without data. Where the sizes agree they are copied.

    Args:
        checkpoint: the source.
        config: sizes of the model.
        shapes: name and shape of each of its parameters; or of those that are wanted.
        strategy: `isometry` rotates the residual streams of ViT and text encoder into their strongest directions
            such that LayerNorm stays LayerNorm, and keeps the heads and neurons that carry most; `select` keeps
            channels, heads and neurons as they are; both keep evenly spread layers (windowed from windowed, global
            from global). `skip` copies what fits. `auto` is `isometry`.
        dtype: of the result.
        ignore_mismatched_sizes: leave tensors of sizes that no strategy can change (those of the detector) to
            initialisation.
        vision_signals: what passes through the source's ViT, if it was measured; see `sam3_hf.mapping.calibration`.
        text_signals: the same of its text encoder; see [`map_with_phrases`].
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
    signals = {"vision_signals": vision_signals, "text_signals": text_signals}
    mapper = Mapper(checkpoint, config, shapes, strategy, dtype=dtype, layers=layers, **signals)
    state, report = mapper.run()
    if mapper.mismatched and strategy != "skip" and not ignore_mismatched_sizes:
        raise ValueError(
            f"{checkpoint.label}: {len(mapper.mismatched)} tensors have sizes that no mapping changes: "
            f"{'; '.join(mapper.mismatched[:4])}. Use the sizes of the source there, or pass "
            "`ignore_mismatched_sizes=True` to initialise them at random."
        )
    return state, report


__all__ = ["STRATEGIES", "Mapper", "map_checkpoint"]
