"""The scores of benchmarks/tracking.py, without a model."""

from importlib.util import find_spec

import numpy as np
import pytest
import tracking

from sam3_hf.data.films import draw_film
from sam3_hf.tracking.tracker import TrackedObject

pytestmark = pytest.mark.skipif(find_spec("trackers") is None, reason="needs trackers, of the extra `video`")


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
    wrong = [[each._replace(label="yellow star") for each in own] for own in as_tracked(film)]
    assert tracking.score([(film, wrong)])["recall"] == 0


def test_they_are_those_of_motmetrics(film):
    """A film with misses, false boxes and switches, scored by another library."""
    motmetrics = pytest.importorskip("motmetrics", reason="needs motmetrics, which is no dependency")
    rng = np.random.default_rng(0)
    tracked = [
        [each._replace(id=each.id + int(rng.integers(2))) for each in own if rng.random() < 0.8]
        + [TrackedObject(9, "red circle", 1.0, [0, 0, 9, 9], None)]
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
