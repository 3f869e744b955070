"""Tensors on their way from a checkpoint to a model, and the account of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..vocabulary_sam3_lite import INTEGER_BUFFERS
from .report import MappingReport


def _is_integer(name: str) -> bool:
    """Whether a tensor holds integers, whatever the precision of the model."""
    return name in INTEGER_BUFFERS or name.endswith(".num_batches_tracked")


class Transfer:
    """
    Reads the tensors of a source, takes those of a target, and notes in a report what became of each.

    Args:
        checkpoint: the source.
        shapes: name and shape of every parameter of the target.
        strategy: its name in the report.
        dtype: of the target.
    """

    def __init__(self, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], strategy: str, dtype: torch.dtype):
        self.checkpoint, self.shapes, self.dtype = checkpoint, shapes, dtype
        self.state: dict[str, Tensor] = {}
        # Allocated before any temporary tensor, lest they end up between and fragment the memory.
        self._results = {
            name: torch.empty(shape, dtype=torch.long if _is_integer(name) else dtype)
            for name, shape in shapes.items()
        }
        self.report = MappingReport(
            checkpoint.label, strategy, source_is_lite=checkpoint.is_lite, text_source=checkpoint.text_source
        )
        self._used: set[str] = set()

    def read(self, name: str) -> Tensor:
        """
        A source tensor in float32.

        Raises:
            ValueError: the source lacks it.
        """
        if name not in self.checkpoint:
            raise ValueError(f"{self.checkpoint.label} lacks `{name}`, without which its sizes cannot be changed.")
        self._used.add(name)
        return self.checkpoint.read(name).float()

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a module of the source."""
        return self.read(f"{module}.weight"), self.read(f"{module}.bias")

    def put(self, name: str, tensor: Tensor, source: str, action: str, energy: float | None = None, reason: str = ""):
        """
        Stores a target tensor that comes from the source tensor `source`; see [`MappingRow`].

        Raises:
            ValueError: its shape is not that of the target, or a value is not finite or beyond the dtype.
        """
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            raise ValueError(f"`{name}` was mapped to {tuple(tensor.shape)}, the model has {self.shapes[name]}.")
        result = self._results.pop(name).copy_(tensor)
        if not result.isfinite().all():
            raise ValueError(f"`{source}` does not fit into {self.dtype} or is not finite: use another `dtype`.")
        self.state[name] = result
        self._used.add(source)
        reason = reason or self.checkpoint.note(source)
        self.report.add(name, action, self.checkpoint.shape(source), tuple(tensor.shape), energy, reason)

    def put_pair(
        self, module: str, pair: tuple[Tensor, Tensor], source: str, action: str, energy: float | None = None
    ):
        """Stores weight and bias of a target module that come from the source module `source`."""
        for leaf, tensor in zip(("weight", "bias"), pair, strict=True):
            self.put(f"{module}.{leaf}", tensor, f"{source}.{leaf}", action, energy)

    def initialize(self, name: str, source: str):
        """Leaves a target tensor to random initialisation: the source tensor is not there, or of another size."""
        if source not in self.checkpoint:
            self.report.add(name, "initialized", None, self.shapes[name], reason="not in the source")
            return
        self._used.add(source)
        self.report.add(name, "initialized", self.checkpoint.shape(source), self.shapes[name], reason="sizes differ")

    def forget_reads(self, prefix: str):
        """Takes the source tensors under a prefix as unread: what was read for an estimate alone is still dropped."""
        self._used -= {name for name in self._used if name.startswith(prefix)}

    def drop_rest(self):
        """Accounts for what the target has no use for."""
        for name in self.checkpoint:
            if name not in self._used:
                self.report.add(name, "dropped", self.checkpoint.shape(name), None, reason="not in the smaller model")
        for name, reason in self.checkpoint.dropped.items():
            self.report.add(name, "dropped", self.checkpoint.stored_shape(name), None, reason=reason)
        for name in self.checkpoint.unknown:
            self.report.add(name, "dropped", self.checkpoint.stored_shape(name), None, reason="unknown name")


__all__ = ["Transfer"]
