"""Short clips in the page: what phrases name is followed through one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..plain_text import plain
from ..prediction.pipeline import PredictionSettings
from ..tracking.films import Film
from ..tracking.output import Followed, TrackFolder
from ..tracking.run import Span, track
from ..tracking.tracker import TrackingSettings, check_tracker
from ..visualization import score_text
from .asking import MAX_DETECTIONS, Finder, read_prompts
from .phrases import split_phrases
from .pictures import MAX_PIXELS

MAX_FRAMES = 300  # of a clip that are looked at: whoever asks waits for them
BATCH = 4  # frames at once


def follow_clip(
    finder: Finder, clip: Path | None, phrases: str, threshold: float, folder: Path, max_pixels: int = MAX_PIXELS
) -> tuple[Path, str]:
    """
    Follows what phrases name through the first `MAX_FRAMES` frames of a film.

    Args:
        phrases: as they were typed, see [`split_phrases`].
        threshold: lowest score that begins a track.
        folder: to write to.
        max_pixels: most pixels of a frame.

    Returns:
        The film with what was followed drawn in, and what it was, as HTML.

    Raises:
        ValueError: there is no clip, no phrase, or one that the model does not know.
        OSError: the clip cannot be read, or its frames are too large; the message has its name without its folder.
        ImportError: PyAV or `trackers` is not installed.
    """
    if clip is None:
        raise ValueError("There is no clip: upload one.")
    words = split_phrases(phrases)
    if not words:
        raise ValueError("Type a phrase: what is to be followed.")
    prompts = read_prompts(phrases, None, None, (1, 1))
    check_tracker()
    try:
        film = Film(clip)
    except OSError as error:
        raise OSError(str(error).replace(str(clip), clip.name)) from error
    if film.pixels > max_pixels:
        raise OSError(f"{clip.name} has frames of {film.pixels:,} pixels, more than {max_pixels:,}: make it smaller.")
    film.name = clip.name
    tracking = TrackingSettings(threshold, min(threshold, TrackingSettings.low_threshold))
    followed = track(
        finder.pipe,
        film,
        TrackFolder(folder, {"prompts": words}, masks=False),
        prompts=prompts,
        text=finder.pipe.text_features(words),
        settings=PredictionSettings(tracking.low_threshold, max_detections=MAX_DETECTIONS),
        tracking=tracking,
        span=Span(end=MAX_FRAMES),
        batch_size=BATCH,
    )
    return folder / "overlay.mp4", _described(followed, words, film.faults)


def _described(followed: Followed, words: Sequence[str], faults: Sequence[str]) -> str:
    rows = []
    for word in words:
        count, (best, number) = len(followed.objects.get(word, ())), followed.best.get(word, (0.0, 0))
        said = f"{count} followed" if count else f"none, best score {score_text(best)} in frame {number}"
        rows.append(f"<li><span>{escape(plain(word))}</span><small>{said}</small></li>")
    wrong = "".join(f'<p class="sam3-error" role="alert">{escape(plain(fault, 500))}</p>' for fault in faults)
    return f'<p>{followed.frames} frames</p><ul class="sam3-legend">{"".join(rows)}</ul>{wrong}'
