"""A SAM 3 checkpoint of any origin: its sizes, and its tensors under one set of names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..configuration_sam3_lite import Sam3LiteConfig
from ..configuration_video_sam3_lite import Sam3LiteVideoConfig
from ..vocabulary_sam3_lite import BUFFERS
from .configs import config_from_shapes
from .names import CLIP, DROPPED, LITE_TEXT_LAYERS, LITE_TEXT_NAMES, UNREAD, Stored, from_native, to_native
from .readers import LoadedTensors, PickledTensors, SafetensorsFiles

# A source that holds a smaller share of the tensors it should is refused.
MIN_IDENTIFIED = 0.9
# Prefixes under which the detector's tensors are found.
_PREFIXES = ("", "detector_model.", "detector.", "module.", "module.detector.", "model.", "model.detector.")


class Checkpoint:
    """
    A SAM 3 checkpoint of any origin: its sizes as a [`Sam3LiteConfig`], and its tensors under Transformers' names.

    Args:
        label: what to call it in messages.
        files: the tensors as stored.
        config: sizes, if the checkpoint says them; otherwise they are inferred from the shapes.
        is_lite: whether it was saved by [`Sam3LiteModel`].

    Raises:
        ValueError: no tensor of SAM 3 was recognised; the message shows what the file holds.
    """

    text_source: str | None = None  # where its words come from, if not from where all else does
    video_config: Sam3LiteVideoConfig | None = None  # of the whole, if it has a tracker

    def __init__(
        self,
        label: str,
        files: SafetensorsFiles | PickledTensors | LoadedTensors,
        config: Sam3LiteConfig | None = None,
        is_lite: bool = False,
    ):
        self.label, self.is_lite, self._files = label, is_lite, files
        self._stored, self.dropped, self.unknown = _identify(files)
        if not self._stored:
            raise ValueError(
                f"{label} holds no tensor of SAM 3. It has {len(list(files))} tensors, such as "
                f"{_examples([*self.unknown, *self.dropped])}{_guess(self.unknown)}."
            )
        self.config = config or self._infer_config()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        return stored.shape(self._files.shape(stored.name))

    def stored_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a tensor of the file, under the name that it has there."""
        return self._files.shape(stored_name)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, possibly mapped from the file: copy it before keeping it."""
        return self._read_stored(self._stored[name])

    def _read_stored(self, stored: Stored) -> Tensor:
        try:
            return stored.take(self._files.read(stored.name))
        except SafetensorError as error:
            raise OSError(f"{self.label}: `{stored.name}` cannot be read ({error}).") from error

    def note(self, name: str) -> str:
        """What a report should say of a tensor beside what became of it."""
        return ""

    def config_at(self, preset: str, **sizes) -> Sam3LiteConfig:
        """Its configuration at the sizes of a preset, see [`~Sam3LiteConfig.at_preset`]."""
        return self.config.at_preset(preset, **sizes)

    @property
    def size(self) -> int:
        """Bytes of the files that its tensors are in."""
        return sum(os.path.getsize(path) for path in self._files.paths)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the first tensor."""
        return self.read(next(iter(self._stored))).dtype

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """
        Compares the checkpoint with the parameters that a model of its sizes has.

        Returns:
            Names of the parameters that it lacks.

        Raises:
            ValueError: it lacks more than a tenth, or a tensor has another shape than its config says.
        """
        missing = [name for name in expected if name not in self]
        if len(missing) > (1 - MIN_IDENTIFIED) * len(expected):
            raise ValueError(
                f"{self.label} is no complete SAM 3 checkpoint: {len(expected) - len(missing)} of {len(expected)} "
                f"tensors were recognised; missing are {len(missing)}, such as {_examples(missing)}. "
                f"{self.unknown_names()}."
            )
        for name, shape in expected.items():
            if name in self and self.shape(name) != tuple(shape):
                raise ValueError(
                    f"{self.label}: `{self._stored[name].name}` has shape {self.shape(name)}, its configuration says "
                    f"{tuple(shape)}."
                )
        return missing

    def unknown_names(self) -> str:
        """How many tensors of the file have names that mean nothing here, for a message."""
        examples = f", such as {_examples(self.unknown)}" if self.unknown else ""
        return f"{len(self.unknown)} tensors have unknown names{examples}{_guess(self.unknown)}"

    def _infer_config(self) -> Sam3LiteConfig:
        table = re.compile(r".*blocks\.\d+\.attn\.freqs_cis")
        tables = {name: self._files.shape(name) for name in self.dropped if table.fullmatch(name)}
        try:
            return config_from_shapes({name: self.shape(name) for name in self}, tables)
        except KeyError as error:
            raise ValueError(
                f"{self.label} is no complete SAM 3 checkpoint: {len(self._stored)} tensors were recognised, but "
                f"{error} is missing. {self.unknown_names()}."
            ) from error


def _identify(files: Iterable[str]) -> tuple[dict[str, Stored], dict[str, str], list[str]]:
    """
    Sorts stored names, for the likeliest prefix.

    Returns:
        The recognised ones under Transformers' names; those left behind, with the reason; the unknown ones.
    """
    names = list(files)
    best: dict[str, Stored] = {}
    for prefix in _PREFIXES:
        found: dict[str, Stored] = {}
        lite_text = any(name.startswith(f"{prefix}{LITE_TEXT_LAYERS}.") for name in names)
        for name in names:
            if name.startswith(prefix):
                found.update(_recognize(name, name[len(prefix) :], lite_text))
        if len(found) > len(best):
            best = found
    dropped = {
        stored.name: "read by nothing" for name, stored in best.items() if any(re.match(p, name) for p in UNREAD)
    }
    best = {name: stored for name, stored in best.items() if stored.name not in dropped}
    used = {stored.name for stored in best.values()}
    unknown = []
    for name in names:
        reason = next((reason for pattern, reason in DROPPED if re.match(pattern, name)), None)
        if reason is not None:
            dropped[name] = reason
        elif name not in used and name not in dropped:
            unknown.append(name)
    return best, dropped, unknown


def _recognize(name: str, bare: str, lite_text: bool) -> dict[str, Stored]:
    if lite_text and LITE_TEXT_NAMES.fullmatch(bare):
        return {bare: Stored(name)}
    # Some versions of Transformers save the text encoder without the name of its inner module.
    bare = re.sub(r"^text_encoder\.(?=embeddings|encoder|final_layer_norm)", f"{CLIP}.", bare)
    if to_native(bare) is not None or bare in BUFFERS:
        return {bare: Stored(name)}
    return {target: Stored(name, stored.form, stored.part) for target, stored in from_native(bare).items()}


def _examples(names: list[str], count: int = 4) -> str:
    return ", ".join(f"`{name}`" for name in names[:count])


def _guess(names: list[str]) -> str:
    """What a foreign checkpoint probably is, from names that only it has."""
    foreign = {
        r".*language_backbone\.(projector|encoder\.embedding_layer)\.": "a file of EfficientSAM3 with SAM3-LiteText's "
        "text encoder: take it as Transformers has it, such as vil-uob/sam3-litetext-s0",
        r"(model\.)?(sam_mask_decoder|memory_attention|image_encoder\.trunk)\.": "a SAM 2 checkpoint",
        r"(image_encoder\.blocks|mask_decoder\.transformer|vision_encoder\.layers)\.": "a SAM checkpoint",
        r"(model\.)?(layers\.\d+\.self_attn|embed_tokens|h\.\d+\.attn)\b|lm_head\.": "a language model",
    }
    for pattern, kind in foreign.items():
        if any(re.match(pattern, name) for name in names):
            return f"; it looks like {kind}"
    return ""


__all__ = ["Checkpoint"]
