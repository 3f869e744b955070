"""Checksums of files, tensors and models. XXH3 reads 4 GB/s on one core, SHA-256 an eighth of that."""

import json
import os
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from ..version import __version__

BLOCK = 1 << 22  # bytes
OF_NO_ACCOUNT = ("transformers_version", "dtype", "_name_or_path")  # in which configurations of one model may differ


class FileSums:
    """Checksums of files that this process wrote; those with several names, and unchanged ones, are read once."""

    def __init__(self):
        self._known = {}

    def of_folder(self, folder: Path, leave_out: str) -> dict[str, str]:
        """
        {path relative to the folder: checksum} of all its files, in alphabetical order.

        Args:
            leave_out: name of a file in it that is not meant.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        known, sums = {}, {}
        for name, path in names.items():
            if name != leave_out:
                about = os.stat(path)
                key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
                known[key] = sums[name] = self._known.get(key) or checksum(path)
        self._known = known
        return sums


def checksum(path: Path) -> str:
    """128 bits as hexadecimal digits, as `xxh128sum` prints them."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_checksum(text: str) -> str:
    """The same of a text in UTF-8."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def first_difference(folder: Path, sums: dict[str, str]) -> str | None:
    """What is wrong with the first file that is not as it was when its checksum was taken; `None` if all are."""
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if checksum(path) != expected:
            return f"{name} does not match its checksum"
    return None


def module_checksum(module: nn.Module, config: dict) -> str:
    """
    Of what a part of a model computes: its weights, their dtype, its configuration and the version of this package.

    Args:
        config: as `to_dict` gives it.
    """
    digest = xxhash.xxh3_128(json.dumps([__version__, _settings(config)], sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor.cpu()))
    return digest.hexdigest()


def _settings(config: dict) -> dict:
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in OF_NO_ACCOUNT
    }


def bytes_of(tensor: Tensor):
    """Those of a tensor on the CPU, which may be of a dtype that numpy does not know, as an array."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
