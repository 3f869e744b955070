"""A film through the pipeline and the tracker into a folder."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..prediction.pipeline import PredictionSettings, PreparedImage, Prompt, Sam3LitePipeline
from .ahead import ahead
from .drawing import reduced
from .films import Source
from .log import DetectionLog, FoundFrame
from .output import Followed, TrackFolder
from .tracker import Tracker, TrackingSettings


class Span(NamedTuple):
    """Which frames of a film are looked at: from `start` on every so many, before `end`."""

    start: int = 0
    end: int | None = None
    every: int = 1

    def has(self, number: int) -> bool:
        return number >= self.start and (number - self.start) % self.every == 0

    def size(self, length: int | None) -> int | None:
        """How many these are of a film of so many frames."""
        ends = [end for end in (self.end, length) if end is not None]
        return len(range(self.start, min(ends), self.every)) if ends else None


class Sample(NamedTuple):
    """A frame on its way to the pipeline, prepared unless it was looked at before, and its picture for the overlay."""

    number: int
    time: float
    image: PreparedImage | None
    small: np.ndarray


def track(
    pipe: Sam3LitePipeline,
    source: Source,
    folder: TrackFolder,
    *,
    prompts: list[Prompt],
    text: dict[str, tuple[torch.Tensor, torch.Tensor]],
    settings: PredictionSettings,
    tracking: TrackingSettings,
    span: Span,
    batch_size: int,
) -> Followed:
    """
    Follows what the prompts name. Of what an earlier run detected the tracks are made again, without the model, so
    that the result is that of one run. Memory does not depend on the length of the film. A camera is followed until
    Ctrl-C.

    Args:
        text: from [`~Sam3LitePipeline.text_features`], of all phrases in `prompts`.
        settings: of detections; their threshold is `tracking.low_threshold`.
        batch_size: frames at once; twice as many are decoded ahead.

    Raises:
        ValueError: there are no frames, or others than in an earlier run.
    """
    log = folder.log(batch_size)
    rate = source.rate / span.every
    tracker = Tracker(tracking, rate)
    before = log.count
    samples = ahead(_samples(source, span, before, settings, pipe.processor.image_processor), 2 * batch_size)
    film = {"source": source.record, "rate": source.rate, "every": span.every}
    bar = tqdm(total=span.size(source.length), initial=before, unit="frame")
    with bar, closing(samples), ExitStack() as stack:
        writer = None
        try:
            for count, (frame, small) in enumerate(
                _detected(pipe, samples, log, folder, prompts, text, settings, batch_size), start=1
            ):
                if writer is None:  # until there is something to write
                    writer = stack.enter_context(folder.writer(film, rate))
                writer.add(frame, tracker.update(frame.found), small)
                bar.update(count > before)
        except KeyboardInterrupt:
            if not source.live:
                raise
        if writer is None or not writer.followed.frames:
            raise ValueError(source.faults[0] if source.faults else f"{source.name} has no frame {span.start}.")
    return writer.followed


def _samples(
    source: Source, span: Span, before: int, settings: PredictionSettings, image_processor
) -> Generator[Sample, None, None]:
    for count, frame in enumerate(source.frames(span.has, span.end)):
        prepared = None if count < before else settings.prepare(frame.pixels, image_processor)
        yield Sample(frame.number, frame.time, prepared, reduced(frame.pixels))


def _detected(
    pipe: Sam3LitePipeline,
    samples: Iterator[Sample],
    log: DetectionLog,
    folder: TrackFolder,
    prompts: list[Prompt],
    text: dict,
    settings: PredictionSettings,
    batch_size: int,
) -> Iterator[tuple[FoundFrame, np.ndarray]]:
    """The detections of each frame, from the log as far as it has them, and its picture."""
    for frame in log:
        sample = next(samples, None)
        if sample is None or sample.number != frame.number:
            raise ValueError(
                f"{folder.folder} has what was found in frame {frame.number}, and now the film reads otherwise up to "
                "there: choose another --output, or remove this one."
            )
        yield frame, sample.small
    while batch := list(islice(samples, batch_size)):
        images = [sample.image for sample in batch]
        results = pipe.detect(images, [prompts] * len(batch), text, settings, batch_size)
        frames = [FoundFrame(sample.number, sample.time, found) for sample, found in zip(batch, results, strict=True)]
        folder.start()
        log.add(frames)
        yield from ((frame, sample.small) for frame, sample in zip(frames, batch, strict=True))
