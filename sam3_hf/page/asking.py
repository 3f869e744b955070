"""What the page asks models, and what they answer: once for every threshold."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoints import refuse_training_checkpoint
from ..errors import EXPECTED, model_errors, one_line
from ..exporting.model import ExportedModel, precision_of
from ..plain_text import with_revision
from ..prediction.detections import Detections
from ..prediction.pipeline import Prompt, Sam3LitePipeline
from .phrases import MAX_PHRASES, split_phrases
from .pictures import Picture

logger = logging.getLogger(__name__)

LOWEST_SCORE = 0.05  # where the slider starts: all above it are computed
MAX_DETECTIONS = 100
MAX_BOXES = 32
DRAWN_BOXES = "drawn boxes"  # the label of what is shown by boxes and has no phrase


@dataclass
class Answer:
    """
    Args:
        model: its name.
        picture: that was looked at.
        found: all above `LOWEST_SCORE`; None after an error.
        seconds: that the model took.
        computed: by what, as "cpu, fp32".
        error: one line.
    """

    model: str
    picture: Picture
    found: Detections | None = None
    seconds: float = 0.0
    computed: str = ""
    error: str | None = None

    def above(self, threshold: float) -> Detections:
        """
        What the pipeline finds with this threshold. Suppression lets better detections remove worse ones, so that
        what stays above a higher threshold is the same whether the worse are left out before or after it.
        """
        return self.found.select(np.flatnonzero(self.found.scores.numpy() > threshold).tolist())


class Finder:
    """
    A model behind the page.

    Args:
        model: as it was asked for; its last two parts are its name in the page.
        pipe: of it.
        revision: of a model of the Hub; if it is not `main`, the name has it as well.
    """

    def __init__(self, model: str, pipe: Sam3LitePipeline, revision: str = "main"):
        name = "/".join(re.split(r"[/\\]+", model.rstrip("/\\"))[-2:])
        self.name = with_revision(name, model, revision)
        self.pipe = pipe
        self.vocabulary: list[str] | None = pipe.model.config.vocabulary

    @classmethod
    def open(cls, model: str, device: str | None = None, dtype: str | None = None, revision: str = "main") -> Finder:
        """
        Loads a model, and runs it once: what the first run prepares does not count as time of a picture.

        Args:
            model: as [`Sam3LitePipeline.from_pretrained`] takes it; exports as well.

        Raises:
            ValueError, OSError, ImportError: it cannot be loaded.
        """
        with model_errors(model):
            refuse_training_checkpoint(model)
            pipe = Sam3LitePipeline.from_pretrained(model, device=device, dtype=dtype, revision=revision)
            finder = cls(model, pipe, revision)
            grey = np.full((64, 64, 3), 128, dtype=np.uint8)
            pipe(grey, (finder.vocabulary or ["object"])[0], threshold=LOWEST_SCORE)
        return finder

    @property
    def computed(self) -> str:
        model = self.pipe.model
        device = model.runs_on if isinstance(model, ExportedModel) else model.device.type
        return f"{device}, {precision_of(model)}"

    def ask(self, picture: Picture, pixels, prompts: Sequence[Prompt]) -> Answer:
        """
        Args:
            pixels: `(3, height, width)` uint8 of the picture.

        Returns:
            What was found, or the error of the model.
        """
        start = time.perf_counter()
        try:
            found = self.pipe(pixels, prompts, threshold=LOWEST_SCORE, max_detections=MAX_DETECTIONS)
        except Exception as error:
            return Answer(self.name, picture, error=as_line(error))
        return Answer(self.name, picture, found, time.perf_counter() - start, self.computed)


def ask(
    finders: Sequence[Finder], picture: Picture | None, phrases: str, drawn: list | None, of: str | None
) -> list[Answer]:
    """
    Asks each model the same.

    Args:
        phrases, drawn, of: see [`read_prompts`].

    Raises:
        ValueError: there is no picture, or the prompts cannot be.
        OSError: the picture cannot be read.
    """
    if picture is None:
        raise ValueError("There is no picture: upload one, or take an example.")
    prompts = read_prompts(phrases, drawn, of, picture.size)
    pixels = picture.read()
    return [finder.ask(picture, pixels, prompts) for finder in finders]


def read_prompts(phrases: str, drawn: list | None, of: str | None, size: tuple[int, int]) -> list[Prompt]:
    """
    Args:
        phrases: as they were typed, see [`split_phrases`].
        drawn: of boxes as the page draws them: `{"box": [left, top, right, bottom] in [0, 1], "positive": bool}`.
        of: the phrase that the boxes belong to. Default: they are a prompt of their own.
        size: height and width of the picture in pixels.

    Raises:
        ValueError: there is nothing to look for, or more than the page takes.
    """
    words = split_phrases(phrases)
    if len(words) > MAX_PHRASES:
        raise ValueError(f"{len(words)} phrases: the page takes {MAX_PHRASES} at once, leave some out.")
    boxes, negative = read_boxes(drawn, size)
    prompts = [Prompt(word, boxes, negative, label=word) if word == of else Prompt(word, label=word) for word in words]
    if of in words or not (boxes or negative):
        if not prompts:
            raise ValueError("Type a phrase, or draw a box around an example of what to look for.")
        return prompts
    if not boxes:
        raise ValueError("Boxes of what it is not need a phrase, or a box around an example of what it is.")
    return [*prompts, Prompt(boxes=boxes, negative_boxes=negative, label=DRAWN_BOXES)]


def read_boxes(drawn: list | None, size: tuple[int, int]) -> tuple[list[list[float]], list[list[float]]]:
    """
    Returns:
        Positive and negative boxes, xyxy in pixels.

    Raises:
        ValueError: there are too many, or one is none.
    """
    drawn = drawn or []
    height, width = size
    if len(drawn) > MAX_BOXES:
        raise ValueError(f"{len(drawn)} boxes: the page takes {MAX_BOXES}, remove some.")
    kinds = {True: [], False: []}
    for entry in drawn:
        try:
            sides, positive = [float(side) for side in entry["box"]], bool(entry["positive"])
            left, top, right, bottom = sides
        except (KeyError, TypeError, ValueError):
            raise ValueError("A box of the page is none: remove it, and draw it again.") from None
        if not all(math.isfinite(side) and 0 <= side <= 1 for side in sides):
            raise ValueError("A box is outside of the picture: remove it, and draw it again.")
        kinds[positive].append([left * width, top * height, right * width, bottom * height])
    return kinds[True], kinds[False]


def as_line(error: Exception) -> str:
    """An error in one line for whoever looks at the page; one that nobody expects is logged with its traceback."""
    if not isinstance(error, EXPECTED):
        logger.error("the page could not answer", exc_info=error)
    return one_line(error, memory_option="picture, or fewer phrases")
