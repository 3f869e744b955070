"""The scores of benchmarks/tracking.py, without a model, and what tracking_memory.py measures."""

import json
import signal
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import common
import numpy as np
import pytest
import tracking
import tracking_memory

from sam3_hf.data.films import draw_film, film_phrases
from sam3_hf.tracking.films import Film
from sam3_hf.tracking.tracker import TrackedObject

LIBRARIES = ("av", "trackers")
pytestmark = pytest.mark.skipif(None in map(find_spec, LIBRARIES), reason="needs the extra `video`")


@pytest.fixture(scope="module")
def film():
    return list(draw_film(1, num_frames=12, num_objects=4))


def as_tracked(film, ids=lambda frame, number: number) -> list[list[TrackedObject]]:
    return [
        [TrackedObject(ids(frame, each.id), each.label, 1.0, each.box, None) for each in objects]
        for frame, (_, objects) in enumerate(film)
    ]


def test_the_truth_has_the_best_scores(film):
    scores = tracking.score([(film, as_tracked(film))])
    assert scores == {"MOTA": 1, "IDF1": 1, "HOTA": pytest.approx(1), "recall": 1, "precision": 1, "switches": 0}


def test_what_loses_ids_halfway_has_half_of_them_right(film):
    """Detections stay right: each object is switched once at most, and half of its frames are of one id."""
    scores = tracking.score([(film, as_tracked(film, lambda frame, number: number + 4 * (frame >= 6)))])
    assert scores["recall"] == scores["precision"] == 1 and 0 < scores["switches"] <= 4
    count = sum(len(objects) for _, objects in film)
    assert scores["MOTA"] == pytest.approx(1 - scores["switches"] / count)
    assert 0.5 <= scores["IDF1"] < 0.8 and 0.5 < scores["HOTA"] < 1


def test_another_concept_is_no_match(film):
    wrong = [[each._replace(label="red bolt") for each in own] for own in as_tracked(film)]
    assert tracking.score([(film, wrong)])["recall"] == 0


def test_each_film_is_asked_for_what_is_in_it(tmp_path, monkeypatch):
    asked = []

    def detect(frame, phrases):
        asked.append(phrases)
        return tracking.true_detections((frame[0], [each for each in frame[1] if each.label in phrases]), phrases)

    monkeypatch.setattr(tracking, "detectors", lambda *_: [("the truth of what is asked", detect)])
    # `reporting` takes SIGTERM, which is pytest's here.
    monkeypatch.setattr(common, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=signal.SIGTERM))
    options = ["--films", "2", "--frames", "40", "--image-size", "96", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["tracking.py", *options])
    tracking.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["precision"] == 1 and row["recall"] > 0.9
    assert asked == [film_phrases(tracking.SEED)] * 40 + [film_phrases(tracking.SEED + 1)] * 40
    assert asked[0] != asked[-1]


def test_the_recommended_small_model_is_among_those_compared(monkeypatch):
    presets = []

    def calibrate(standard, pictures, preset, **_):
        presets.append(preset)
        return standard

    monkeypatch.setattr(tracking, "calibrate_mapping", calibrate)
    arguments = SimpleNamespace(models=None, calibration_images=1, image_size=96)
    names = [name for name, _ in tracking.detectors(arguments, [film_phrases(1)])]
    assert names[1:] == ["tiny-standard", "tiny-plus, mapped and calibrated", "tiny, mapped and calibrated"]
    assert presets == ["tiny-plus", "tiny"]


def test_they_are_those_of_motmetrics(film):
    """A film with misses, false boxes and switches, scored by another library."""
    motmetrics = pytest.importorskip("motmetrics", reason="needs motmetrics, which is no dependency")
    rng = np.random.default_rng(0)
    tracked = [
        [each._replace(id=each.id + int(rng.integers(2))) for each in own if rng.random() < 0.8]
        + [TrackedObject(9, film_phrases(1)[0], 1.0, [0, 0, 9, 9], None)]
        for own in as_tracked(film)
    ]
    tracked = [list({each.id: each for each in own}.values()) for own in tracked]
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for (_, objects), own in zip(film, tracked, strict=True):
        distances = 1 - tracking.similarity(objects, own)
        accumulator.update(
            [each.id for each in objects],
            [each.id for each in own],
            np.where(distances > 0.5, np.nan, distances),
        )
    expected = motmetrics.metrics.create().compute(accumulator, metrics=["mota", "idf1"]).iloc[0]
    scores = tracking.score([(film, tracked)])
    assert scores["MOTA"] == pytest.approx(expected["mota"]) and scores["IDF1"] == pytest.approx(expected["idf1"])


def test_the_film_of_which_the_memory_is_measured_is_as_long_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking_memory, "DRAWN", 3)
    tracking_memory.write_film(tmp_path / "film.mp4", 7)
    frames = [frame.pixels for frame in Film(tmp_path / "film.mp4").frames(lambda number: True, None)]
    assert [frame.shape for frame in frames] == [(480, 640, 3)] * 7
    moved, same = (np.abs(frames[other].astype(int) - frames[0]).mean() for other in (1, 3))
    assert same < moved / 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_the_command_is_measured(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking_memory, "DRAWN", 2)
    tracking_memory.write_film(tmp_path / "film.mp4", 2)
    sent = []
    command = ["track", str(tmp_path / "film.mp4"), "--model", str(saved), "--output", str(tmp_path / "out")]
    tracking_memory.follow([*command, "--prompt", "cat"], SimpleNamespace(send=sent.append))
    assert (tmp_path / "out" / "tracks.json").exists()
    assert sent[0]["peak MB"] >= sent[0]["of these before loading"] > 10
