"""Words from one checkpoint, eyes from another."""

import copy
from collections.abc import Iterator

from torch import Tensor

from .checkpoint import Checkpoint

_TEXT = ("text_encoder.", "text_projection.")


class JoinedCheckpoint(Checkpoint):
    """
    A checkpoint with the text encoder and text projection of another one: both project into the same channels.

    Args:
        eyes: gives everything else.
        words: gives these two.

    Raises:
        ValueError: one of them has no text encoder, or they project to different widths.
    """

    def __init__(self, eyes: Checkpoint, words: Checkpoint):
        if words.config.vocabulary is not None:
            raise ValueError(
                f"{words.label} has a fixed vocabulary and no text encoder: take words from another model."
            )
        if eyes.config.vocabulary is not None:
            raise ValueError(
                f"{eyes.label} has a fixed vocabulary in the place of a text encoder: give it its own back with "
                "`restore_text_encoder` before it gets another one."
            )
        widths = [part.config.detr_encoder_config.hidden_size for part in (eyes, words)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{words.label} projects its text to {widths[1]} channels, {eyes.label} needs {widths[0]}."
            )
        self.label, self.is_lite, self.text_source = eyes.label, eyes.is_lite, words.label
        self._eyes, self._words, self.unknown, self.video_config = eyes, words, eyes.unknown, eyes.video_config
        self._stored = {name: eyes._stored[name] for name in eyes if not name.startswith(_TEXT)}
        self._stored |= {name: words._stored[name] for name in words if name.startswith(_TEXT)}
        replaced = [eyes._stored[name].name for name in eyes if name.startswith(_TEXT)]
        self.dropped = dict.fromkeys(replaced, f"replaced by that of {words.label}") | eyes.dropped
        self.config = copy.deepcopy(eyes.config)
        self.config.text_config = copy.deepcopy(words.config.text_config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner(name).shape(name)

    def stored_shape(self, stored_name: str) -> tuple[int, ...]:
        return self._eyes.stored_shape(stored_name)

    def read(self, name: str) -> Tensor:
        return self._owner(name).read(name)

    def note(self, name: str) -> str:
        return f"from {self.text_source}" if name.startswith(_TEXT) else ""

    @property
    def size(self) -> int:
        return self._eyes.size

    def _owner(self, name: str) -> Checkpoint:
        return self._words if name.startswith(_TEXT) else self._eyes


__all__ = ["JoinedCheckpoint"]
