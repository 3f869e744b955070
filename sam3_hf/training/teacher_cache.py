"""Feature pyramids of a teacher on disk, so that it looks at each picture once."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from pathlib import Path

import psutil
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_file
from ..modeling_sam3_lite import Sam3LiteModel
from ..outputs_sam3_lite import Sam3LiteVisionOutput
from .checksums import bytes_of, module_checksum

logger = logging.getLogger(__name__)

LEVELS = 3
CHECKSUM = "checksum"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class PyramidCache:
    """
    The vision encoder of a teacher, with a memory on disk: one file per picture, in the dtype that the encoder
    computes in, so that nothing is rounded.

    A file is named after the pixels that the teacher is shown, in a folder named after the teacher's vision encoder,
    the input size and the dtype. Several processes and runs may fill it at the same time.

    Attributes:
        root, pictures: as given.
        folder: of the files of this teacher, in `root`.
        picture_bytes, form: what a picture takes there, and in which form, as text.
    """

    def __init__(self, root: str | Path, model: Sam3LiteModel, pictures: int):
        """
        Args:
            root: for the folders of all teachers.
            model: on its device and in its precision.
            pictures: different ones that it will be asked for.

        Raises:
            OSError: the folder cannot be made.
        """
        self.root, self.model, self.pictures, self._is_full = Path(root), model, pictures, False
        backbone = model.config.vision_config.backbone_config
        side, dtype = backbone.image_size // backbone.patch_size, str(model.dtype).removeprefix("torch.")
        self.picture_bytes = model.config.vision_config.fpn_hidden_size * (16 + 4 + 1) * side**2 * model.dtype.itemsize
        self.form = f"{dtype}, {model.config.image_size} px"
        teacher = module_checksum(model.vision_encoder, model.config.vision_config.to_dict())
        self.folder = self.root / f"{teacher}-{model.config.image_size}px-{dtype}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, pixels: Tensor) -> Sam3LiteVisionOutput:
        """
        What `Sam3LiteModel.get_vision_features` says of a batch, as far as the detector reads it.

        Where a picture is new, all of the batch pass through the encoder, as they would without a cache: in batches of
        another size, float32 is rounded otherwise.

        Args:
            pixels: (images, 3, size, size) float32 on the CPU, as the loader delivers them.
        """
        names = [xxhash.xxh3_128_hexdigest(image.contiguous().numpy()) for image in pixels]
        held = self._read_all(names)
        device = self.model.device
        if held is not None:
            levels = (torch.stack(level).to(device, non_blocking=True) for level in zip(*held, strict=True))
            return Sam3LiteVisionOutput(fpn_hidden_states=tuple(level.permute(0, 3, 1, 2) for level in levels))
        features = self.model.get_vision_features(pixels.to(device, non_blocking=True).to(self.model.dtype))
        # The encoder's maps are channels-last, and must come back so: convolutions round otherwise in another layout.
        levels = [level.permute(0, 2, 3, 1).cpu() for level in features.fpn_hidden_states]
        for name, *own in zip(names, *levels, strict=True):
            if not self._path(name).is_file():
                self._keep(name, [level.contiguous() for level in own])
        return features

    def _read_all(self, names: list[str]) -> list[list[Tensor]] | None:
        """The levels of each picture, `(h, w, hidden)`; None if one is not there."""
        held = []
        for name in names:
            levels = self._read(name)
            if levels is None:
                return None
            held.append(levels)
        return held

    def _read(self, name: str) -> list[Tensor] | None:
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                levels = [file.get_tensor(f"level_{number}") for number in range(LEVELS)]
                expected = (file.metadata() or {}).get(CHECKSUM)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            fault = str(error)
        else:
            if expected == self._checksum(name, levels):
                return levels
            fault = "it does not match its checksum"
        logger.warning("teacher_cache: %s is damaged and made again: %s", path, fault)
        path.unlink(missing_ok=True)
        return None

    def _keep(self, name: str, levels: list[Tensor]) -> None:
        if self._is_full or not all(level.isfinite().all() for level in levels):
            return
        tensors = {f"level_{number}": level for number, level in enumerate(levels)}
        try:
            write_file(self._path(name), save(tensors, {CHECKSUM: self._checksum(name, levels)}), mark=_own_mark())
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            self._is_full = True
            logger.warning(
                "teacher_cache: no space is left for %s; going on without keeping further pictures", self.folder
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _checksum(self, name: str, levels: list[Tensor]) -> str:
        """Of the levels, and of where they belong."""
        digest = xxhash.xxh3_128(f"{self.folder.name}/{name}".encode())
        for level in levels:
            digest.update(bytes_of(level))
        return digest.hexdigest()

    def lacking_bytes(self) -> int:
        """What it will grow by until it holds all pictures; files of other pictures count as theirs."""
        return max(self.pictures - sum(1 for _ in self.folder.glob("*.safetensors")), 0) * self.picture_bytes

    def prepare(self) -> None:
        """
        Removes what processes left half written that are no more, and says what the cache will take; for one process.

        Raises:
            OSError: the disk has no space for it.
        """
        for partial in self.folder.glob(".*.partial"):
            if _is_abandoned(partial):
                partial.unlink(missing_ok=True)
        lacking, free = self.lacking_bytes() / 2**30, shutil.disk_usage(self.folder).free / 2**30
        logger.info(
            "teacher_cache %s: %d pictures x %.2f MiB (%s) = %.2f GiB, of which %.2f GiB are to be written; %.2f GiB "
            "are free",
            self.root,
            self.pictures,
            self.picture_bytes / 2**20,
            self.form,
            self.pictures * self.picture_bytes / 2**30,
            lacking,
            free,
        )
        if lacking > free:
            raise OSError(
                f"teacher_cache {self.root}: {lacking:.2f} GiB are needed for {self.pictures} pictures, and "
                f"{free:.2f} GiB are free on this disk: make space, choose another folder, or leave it out"
            )


def _own_mark() -> str:
    """What tells apart the files that processes are writing."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_abandoned(partial: Path) -> bool:
    _, here, process = partial.name.removesuffix(".partial").rpartition(f".{socket.gethostname()}-")
    return bool(here) and process.isdigit() and not psutil.pid_exists(int(process))
