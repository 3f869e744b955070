"""What `sam3-lite track` is made of: drawn films, frames made ahead, what is kept for a resume, the tracker."""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from film_cases import needs_av, needs_trackers

from sam3_hf.data.films import draw_film, film_phrases
from sam3_hf.data.words import FILLS, SHAPES, TRAINED
from sam3_hf.prediction.detections import Detections
from sam3_hf.prediction.pipeline import PredictionSettings, Prompt
from sam3_hf.rle import decode_mask, encode_masks
from sam3_hf.tracking.ahead import ahead
from sam3_hf.tracking.drawing import draw_objects
from sam3_hf.tracking.films import Frame
from sam3_hf.tracking.log import DetectionLog, FoundFrame
from sam3_hf.tracking.output import TrackFolder
from sam3_hf.tracking.run import Span, track
from sam3_hf.tracking.tracker import TrackedObject, Tracker, TrackingSettings


def found_in(objects, prompts, score=0.9) -> Detections:
    """The truth of a frame of a drawn film, as if a model had found it."""
    masks = np.stack([each.mask for each in objects]) if objects else []
    return Detections(
        boxes=torch.tensor([each.box for each in objects], dtype=torch.float32).reshape(-1, 4),
        scores=torch.full((len(objects),), score),
        labels=[each.label for each in objects],
        rle=encode_masks(masks),
        size=(96, 128),
        prompts=prompts,
        best={prompt: 0.05 for prompt in prompts},
    )


# --------------------------------------------------------------------------------------------------- drawn films


def test_a_drawn_film_follows_from_its_seed_and_shows_what_its_truth_says():
    first, again, other = (list(draw_film(seed, num_frames=8, num_objects=4)) for seed in (3, 3, 4))
    assert all(np.array_equal(one[0], two[0]) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])
    for picture, objects in first:
        assert picture.shape == (96, 128, 3) and picture.dtype == np.uint8
        assert sum(each.mask.astype(int) for each in objects).max(initial=0) <= 1
        for each in objects:
            left, top, right, bottom = each.box
            assert each.mask[top:bottom, left:right].sum() == each.mask.sum() > 0
    colours = [picture[each.mask].mean(axis=0) for picture, objects in first for each in objects if each.id == 4]
    assert np.ptp(colours, axis=0).max() < 40  # an object keeps its paint


def test_the_ground_stays_and_noise_does_not():
    before, after = (picture.astype(float) for picture, _ in draw_film(2, num_frames=2, num_objects=0))
    assert np.abs(before - after).mean() > 1
    coarse = [picture.reshape(12, 8, 16, 8, 3).mean(axis=(1, 3)) for picture in (before, after)]  # free of noise
    assert np.abs(coarse[0] - coarse[1]).mean() < coarse[0].std() / 5


def test_objects_of_drawn_films_are_pairs_of_the_composed_world():
    for seed in range(12):
        pairs = [tuple(phrase.split()) for phrase in film_phrases(seed)]
        assert len(set(pairs)) == 4 and set(pairs) <= set(TRAINED)
        for pair in pairs:  # each word of it comes twice
            assert sum(fill == pair[0] for fill, _ in pairs) == sum(shape == pair[1] for _, shape in pairs) == 2
        for _, objects in draw_film(seed, num_frames=3):
            assert all(each.label == film_phrases(seed)[(each.id - 1) % 4] for each in objects)
    words = {word for seed in range(100) for phrase in film_phrases(seed) for word in phrase.split()}
    assert words == {*FILLS, *SHAPES}


def test_objects_of_drawn_films_come_go_and_come_back():
    seen = {}
    for number, (_, objects) in enumerate(draw_film(0, num_frames=24, num_objects=4)):
        for each in objects:
            seen.setdefault(each.id, []).append(number)
    assert seen[1][0] > 0 and seen[1][-1] < 23  # crosses
    gap = max(np.diff(seen[3]))
    assert seen[3][0] == 0 and seen[3][-1] == 23 and gap > 3  # leaves and comes back
    assert len(seen[4]) > 16


def test_a_film_of_nothing_is_named():
    with pytest.raises(ValueError, match="48 pixels"):
        next(draw_film(0, image_size=20))


# ---------------------------------------------------------------------------------------------- decoded ahead


def test_items_come_in_order_and_no_more_than_asked_are_made_ahead():
    made, room = [], threading.Semaphore(0)

    def items():
        for item in range(50):
            made.append(item)
            room.release()
            yield item

    taken = ahead(items(), 3)
    assert next(taken) == 0
    for _ in range(5):  # the one taken, three that wait, and one that waits for room
        room.acquire()
    assert not room.acquire(timeout=0.05) and len(made) == 5
    assert list(taken) == list(range(1, 50))


def test_an_error_while_making_is_raised_where_it_is_asked_for():
    def items():
        yield 1
        raise OSError("torn")

    taken = ahead(items(), 2)
    assert next(taken) == 1
    with pytest.raises(OSError, match="torn"):
        next(taken)


def test_closing_early_ends_the_thread_and_closes_what_makes_the_items():
    closed, before = [], threading.active_count()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    taken = ahead(items(), 2)
    next(taken)
    taken.close()
    assert closed == [True] and threading.active_count() == before


# ---------------------------------------------------------------------------------------------- detections kept


def log_of(tmp_path, group=2):
    return DetectionLog(tmp_path / "log", film_phrases(1), group)


def test_detections_are_read_back_to_the_last_bit(tmp_path):
    log, prompts = log_of(tmp_path), film_phrases(1)
    frames = [
        FoundFrame(number, number / 3, found_in(objects, prompts, score=0.1 + number / 7))
        for number, (_, objects) in enumerate(draw_film(1, num_frames=4))
    ]
    log.add(frames[:2])
    log.add(frames[2:])
    back = log_of(tmp_path)
    assert back.count == 4
    for one, two in zip(frames, back, strict=True):
        assert (one.number, one.time) == (two.number, two.time)
        assert torch.equal(one.found.boxes, two.found.boxes) and torch.equal(one.found.scores, two.found.scores)
        for name in ("labels", "rle", "size", "prompts", "best"):
            assert getattr(one.found, name) == getattr(two.found, name)


@pytest.mark.parametrize("cut", [1, 30])
def test_what_a_kill_left_half_written_goes_with_its_group(tmp_path, cut):
    log = log_of(tmp_path)
    frames = [FoundFrame(number, 0.0, found_in([], film_phrases(1))) for number in range(6)]
    log.add(frames)
    path = tmp_path / "log"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert log_of(tmp_path).count == 4
    assert len(path.read_bytes().splitlines()) == 4


# ---------------------------------------------------------------------------------------------- the tracker


@needs_trackers
def test_an_object_keeps_its_id_where_it_meets_others():
    prompts, ids = film_phrases(0), {}
    tracker = Tracker(TrackingSettings(lost_seconds=0.5), rate=15)
    for number, (_, objects) in enumerate(draw_film(0, num_frames=30, num_objects=4)):
        tracked = tracker.update(found_in(objects, prompts))
        assert len({each.id for each in tracked}) == len(tracked)
        for each in tracked:
            true = next(one for one in objects if one.box == [round(side) for side in each.box])
            assert each.label == true.label and np.array_equal(decode_mask(each.rle), true.mask)
            ids.setdefault(true.id, []).append((number, each.id))
    assert len({own for _, own in ids[1]}) == len({own for _, own in ids[4]}) == 1
    assert len({own for _, own in ids[3]}) == 2  # gone for longer than half a second, it is another one
    assert sorted({own for seen in ids.values() for _, own in seen}) == list(range(1, 6))


@needs_trackers
def test_low_scores_go_on_with_a_track_and_begin_none():
    objects = next(draw_film(0, num_frames=4, num_objects=4))[1][:1]
    label, counts = objects[0].label, []
    tracker = Tracker(TrackingSettings(threshold=0.5, low_threshold=0.1), rate=15)
    for score in (0.2, 0.2, 0.2, 0.9, 0.9, 0.2, 0.2):
        counts.append(len(tracker.update(found_in(objects, [label], score))))
    assert counts == [0, 0, 0, 0, 1, 1, 1]


def test_thresholds_out_of_order_are_named():
    with pytest.raises(ValueError, match="low_threshold"):
        TrackingSettings(threshold=0.2, low_threshold=0.3)


# ---------------------------------------------------------------------------------------------- drawing


def test_an_object_keeps_its_colour_whoever_else_is_there():
    picture = np.zeros((600, 600, 3), dtype=np.uint8)

    def upper_half(*objects):
        objects = [TrackedObject(number, "cat", 0.9, [50, top, 250, top + 150], None) for number, top in objects]
        return np.asarray(draw_objects(picture, objects, picture.shape[:2]))[:300]

    alone = upper_half((3, 100))
    assert np.array_equal(alone, upper_half((1, 400), (3, 100), (20, 420)))
    assert not np.array_equal(alone, upper_half((4, 100)))
    assert not np.array_equal(upper_half((30, 100)), upper_half((31, 100)))  # beyond the palette


# ---------------------------------------------------------------------------------------------- memory


class Watched:
    """A film of black frames, a model that finds one thing in each, and how many of both were alive at once."""

    live, name, rate, record = False, "a film", 15.0, {}

    def __init__(self, length: int):
        self.length, self.faults, self.most = length, [], {}
        self._made = {"frames": [], "detections": []}
        self.processor = SimpleNamespace(image_processor=lambda pixels, return_tensors: {"pixel_values": pixels[None]})

    def frames(self, wanted, end):
        for number in range(self.length):
            pixels = np.zeros((48, 64, 3), dtype=np.uint8)
            self._made["frames"].append(weakref.ref(pixels))
            yield Frame(number, number / self.rate, pixels)

    def detect(self, prepared, *_):
        for name, made in self._made.items():
            self.most[name] = max(self.most.get(name, 0), sum(one() is not None for one in [*made]))
        rle = encode_masks(np.ones((1, 48, 64), dtype=bool))
        box, score = torch.tensor([[0.0, 0.0, 64.0, 48.0]]), torch.tensor([0.9])
        found = [Detections(box, score, ["cat"], rle, (48, 64), ["cat"], {"cat": 0.9}) for _ in prepared]
        self._made["detections"] += map(weakref.ref, found)
        return found


@needs_av
@needs_trackers
@pytest.mark.parametrize("batch_size", [1, 3])
def test_memory_holds_a_few_frames_whatever_the_length_of_the_film(tmp_path, batch_size):
    film = Watched(20 * batch_size)
    followed = track(
        film,
        film,
        TrackFolder(tmp_path / "out", {"prompts": ["cat"]}, masks=False),
        prompts=[Prompt("cat")],
        text={},
        settings=PredictionSettings(),
        tracking=TrackingSettings(),
        span=Span(),
        batch_size=batch_size,
    )
    assert followed.frames == film.length and followed.objects == {"cat": {1}}
    # those that wait, the batch, the one that is being made, and the last one that was written
    assert 1 < film.most["frames"] <= 3 * batch_size + 2
    assert film.most["detections"] <= batch_size + 1
