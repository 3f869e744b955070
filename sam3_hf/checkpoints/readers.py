"""Tensors of files and of models in memory, by the names that they have there, read one at a time."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Bytes to read from a file before it is mapped anew: pages that were read stay in memory as long as their mapping.
MAX_MAPPED = 64 * 2**20


class SafetensorsFiles:
    """Tensors of one or several safetensors files, read one at a time."""

    def __init__(self, paths: Iterable[str]):
        """
        Raises:
            OSError: a file is missing, truncated or no safetensors file.
        """
        self._handles = {}
        self._paths = {name: path for path in paths for name in self._open(path).keys()}
        self._mapped = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    @property
    def paths(self) -> set[str]:
        return set(self._paths.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._paths[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        if self._mapped > MAX_MAPPED:
            self._handles, self._mapped = {}, 0
        tensor = self._open(self._paths[name]).get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor

    def _open(self, path: str):
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, FileNotFoundError) as error:
                raise OSError(
                    f"{path} cannot be read ({error}): it is missing, truncated or no safetensors file. "
                    "Download it again."
                ) from error
        return self._handles[path]


class PickledTensors:
    """Tensors of a file written by `torch.save`: a state dict, or one under `model` in a training checkpoint."""

    def __init__(self, path: str):
        """
        Raises:
            OSError: the file is truncated or not written by `torch.save`.
            ValueError: the file holds something else than tensors in dicts, or objects that only code could restore.
        """
        self._path = path
        self._tensors = self._load()
        self._mapped = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def paths(self) -> set[str]:
        return {self._path}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        if self._mapped > MAX_MAPPED:
            self._tensors, self._mapped = self._load(), 0
        self._mapped += self._tensors[name].nbytes
        return self._tensors[name]

    def _load(self) -> dict[str, Tensor]:
        content = _load_pickled(self._path)
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise ValueError(f"{self._path} holds a {type(content).__name__}, not a dict of tensors.")
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


class LoadedTensors:
    """Tensors of a model in memory, read onto the CPU as those of files are."""

    def __init__(self, model: nn.Module):
        self._tensors = model.state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def paths(self) -> set[str]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


def _load_pickled(path: str):
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise OSError(f"{path} is truncated: the end of the archive is missing. Download it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        unsupported = re.search(r"Unsupported (?:global: GLOBAL|class|type) (\S+)", str(error))
        if unsupported is None:
            raise OSError(f"{path} cannot be read: it is truncated or no PyTorch file.") from error
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values, and restoring `{unsupported[1]}` would "
            "run code. Save its weights alone: `torch.save({'model': state_dict}, path)`."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(f"{path} cannot be read ({error}): it is truncated or no PyTorch file.") from error


__all__ = ["LoadedTensors", "PickledTensors", "SafetensorsFiles"]
