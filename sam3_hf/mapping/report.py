"""Account of a mapping: what became of every tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import write_file

REPORT_FILE = "mapping_report.json"


@dataclass
class MappingRow:
    """
    What became of a group of tensors that differ in layer index and in weight or bias only.

    Args:
        group: name without `weight` and `bias`, layer indices as `*`.
        action: `copied`, `rotated`, `selected`, `refit` (fitted to images or phrases), `extended` (copied, and new
            queries as in an untrained model), `initialized` (at random, as an untrained model) or `dropped`.
        tensors, parameters: how many, in the target; in the source if dropped.
        source_shape, target_shape: of a weight, if there is one; `None` where it is not on that side.
        energy: share of the estimated signal that is kept, mean over the group; `None` where nothing is lost.
        reason: why a group was initialised or dropped; how much of it is new; where it comes from, if from elsewhere.
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
        calibration: what a mapping that is fitted to images or phrases measured.
        source_is_lite: whether the source was a lite model, and not one of SAM 3 itself.
        text_source: where the text encoder comes from, if from another checkpoint.
    """

    source: str
    strategy: str
    layers: dict[str, list[int]] = field(default_factory=dict)
    rows: list[MappingRow] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)
    source_is_lite: bool = False
    text_source: str | None = None

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
        """One sentence, and one of how near a text encoder came that was fitted to phrases."""
        parts = [f"{total['tensors']} {action}" for action, total in self.totals.items()]
        words = f", with the text encoder of {self.text_source}," if self.text_source else ""
        return (
            f"Weights of {self.source}{words} were mapped by `{self.strategy}`: {', '.join(parts)} tensors. "
            f"{self._text_sentence()}`print(model.mapping_report)` shows them."
        )

    def _text_sentence(self) -> str:
        text = self.calibration.get("text")
        if text is None:
            return ""
        return (
            f"The smaller text encoder was fitted to {text['phrases_fitted']} phrases: cosine of its features to the "
            f"larger one's {text['cosine']:.3f} on {text['phrases_held_out']} others "
            f"({text['cosine_before_fit']:.3f} before the fit). "
        )

    def to_json(self) -> str:
        """The report as JSON text: source, strategy, layers, totals, rows."""
        content = {
            "source": self.source,
            "source_is_lite": self.source_is_lite,
            "text_source": self.text_source,
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


__all__ = ["REPORT_FILE", "MappingReport", "MappingRow"]
