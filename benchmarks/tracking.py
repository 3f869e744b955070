"""
How well models follow things through drawn films, by detection: MOTA, IDF1 and HOTA by the library `trackers`.

    python benchmarks/tracking.py --films 8
    python benchmarks/tracking.py --films 8 --models runs/final

Each film is asked for its own four phrases, a fill and a shape that training combined. Without --models the models are
the packaged tiny-standard, and a tiny-plus and a tiny that are mapped from it and fitted to composed pictures
(`calibrate_mapping`: no labels, no training). The first row has the truth for detections, and so what the tracker
alone loses. Boxes of two phrases never match.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from common import parser, reporting
from distillation import PACKAGED

from sam3_hf import Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data.composed import write_composed
from sam3_hf.data.films import RATE, FilmObject, draw_film, film_phrases
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.prediction.detections import Detections
from sam3_hf.tracking.tracker import TrackedObject, Tracker, TrackingSettings

SEED = 50_000  # of the films, plus their number
LOWEST = TrackingSettings.low_threshold

Frame = tuple[np.ndarray, list[FilmObject]]
Detect = Callable[[Frame, list[str]], Detections]  # what is found of these phrases


def main():
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", help="folders or Hub ids, the one to compare with first")
    options.add_argument("--films", type=int, default=8)
    options.add_argument("--frames", type=int, default=60, help="of each film")
    options.add_argument("--objects", type=int, default=5, help="of each film")
    options.add_argument("--image-size", type=int, default=144)
    thresholds = [TrackingSettings.threshold]
    options.add_argument("--thresholds", type=float, nargs="+", default=thresholds, help="scores that begin a track")
    options.add_argument("--calibration-images", type=int, default=128, help="that tiny-plus and tiny are fitted to")
    arguments = options.parse_args()
    with reporting(arguments) as (rows, more):
        more["metrics"] = "trackers.eval"
        seeds = range(SEED, SEED + arguments.films)
        films = [list(draw_film(seed, arguments.frames, arguments.image_size, arguments.objects)) for seed in seeds]
        asked = [film_phrases(seed) for seed in seeds]
        for name, detect in detectors(arguments, asked):
            found = [[detect(frame, phrases) for frame in film] for film, phrases in zip(films, asked, strict=True)]
            for threshold in arguments.thresholds:
                tracked = [follow(own, threshold) for own in found]
                rows.append({"model": name, "threshold": threshold, **score(list(zip(films, tracked, strict=True)))})


def detectors(arguments: argparse.Namespace, asked: Sequence[list[str]]) -> Iterator[tuple[str, Detect]]:
    yield "the truth as detections", true_detections
    if arguments.models:
        for name in arguments.models:
            yield name, detector(Sam3LitePipeline.from_pretrained(name))
        return
    standard = Sam3LiteModel.from_pretrained(PACKAGED, preset="same", dtype=torch.float32)
    processor = Sam3LiteProcessor.from_pretrained(PACKAGED)
    yield "tiny-standard", detector(Sam3LitePipeline(standard, processor))
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_composed(folder, {"train": arguments.calibration_images}, arguments.image_size, SEED)
        prompts = sorted({phrase for phrases in asked for phrase in phrases})
        for preset in ("tiny-plus", "tiny"):
            lite = calibrate_mapping(standard, pictures / "train", preset=preset, prompts=prompts, search_depth=False)
            yield f"{preset}, mapped and calibrated", detector(Sam3LitePipeline(lite, processor))


def detector(pipe: Sam3LitePipeline) -> Detect:
    return lambda frame, asked: pipe(frame[0], asked, threshold=LOWEST)


def true_detections(frame: Frame, asked: list[str]) -> Detections:
    picture, objects = frame
    boxes = torch.tensor([each.box for each in objects], dtype=torch.float32).reshape(-1, 4)
    labels = [each.label for each in objects]
    return Detections(boxes, torch.ones(len(objects)), labels, None, picture.shape[:2], asked)


def follow(found: Sequence[Detections], threshold: float) -> list[list[TrackedObject]]:
    tracker = Tracker(TrackingSettings(threshold, LOWEST), RATE)
    return [tracker.update(one) for one in found]


def score(films: Sequence[tuple[Sequence[Frame], list[list[TrackedObject]]]]) -> dict[str, float]:
    """MOTA, IDF1 and HOTA of all films together, at an IoU of 0.5 but for HOTA, and what makes them up."""
    from trackers import eval as metrics

    every = [inputs(film, tracked) for film, tracked in films]
    clear = metrics.aggregate_clear_metrics([metrics.compute_clear_metrics(*one) for one in every])
    identity = metrics.aggregate_identity_metrics([metrics.compute_identity_metrics(*one) for one in every])
    hota = metrics.aggregate_hota_metrics([metrics.compute_hota_metrics(*one) for one in every])
    names = {"CLR_Re": "recall", "CLR_Pr": "precision", "IDSW": "switches"}
    return {
        "MOTA": clear["MOTA"],
        "IDF1": identity["IDF1"],
        "HOTA": hota["HOTA"],
        **{new: clear[name] for name, new in names.items()},
    }


def inputs(film: Sequence[Frame], tracked: list[list[TrackedObject]]) -> tuple[list, list, list]:
    """True ids, ids and similarities of each frame, as the metrics take them: ids count from 0."""
    true_ids = [np.array([each.id - 1 for each in objects], dtype=int) for _, objects in film]
    ids = [np.array([each.id - 1 for each in own], dtype=int) for own in tracked]
    return true_ids, ids, [similarity(objects, own) for (_, objects), own in zip(film, tracked, strict=True)]


def similarity(objects: Sequence[FilmObject], tracked: Sequence[TrackedObject]) -> np.ndarray:
    """(objects, tracked) IoU of boxes, 0 where labels differ."""
    from trackers.eval import box_iou

    boxes = [np.array([each.box for each in own], dtype=float).reshape(-1, 4) for own in (objects, tracked)]
    labels = [np.array([each.label for each in own], dtype=str) for own in (objects, tracked)]
    return box_iou(*boxes) * (labels[0][:, None] == labels[1][None])


if __name__ == "__main__":
    main()
