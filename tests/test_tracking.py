"""`sam3-lite track`: frames in, ids, boxes, masks and a film out; the same after an interruption."""

import json
import shutil
import threading
import weakref
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import sam3_hf
from sam3_hf import Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data.films import draw_film, film_phrases
from sam3_hf.data.words import FILLS, SHAPES, TRAINED
from sam3_hf.prediction.detections import Detections
from sam3_hf.prediction.pipeline import PredictionSettings, Prompt
from sam3_hf.prediction.run import fingerprint
from sam3_hf.reading import read_image
from sam3_hf.rle import decode_mask, encode_masks
from sam3_hf.tracking.ahead import ahead
from sam3_hf.tracking.drawing import draw_objects
from sam3_hf.tracking.films import Film, Frame, open_source, upright
from sam3_hf.tracking.log import DetectionLog, FoundFrame
from sam3_hf.tracking.output import TrackFolder, id_mask
from sam3_hf.tracking.run import Span, track
from sam3_hf.tracking.tracker import TrackedObject, Tracker, TrackingSettings

FRAMES = 10
PACKAGED = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"needs {library}, of the extra `video`")


needs_av, needs_trackers = needs("av"), needs("trackers")


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


# ---------------------------------------------------------------------------------------------- films


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [picture for picture, _ in draw_film(5, num_frames=FRAMES, image_size=64, num_objects=3)]


@pytest.fixture(scope="module")
def film(frames, tmp_path_factory):
    from sam3_hf.tracking.drawing import FilmWriter

    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    writer = FilmWriter(path, 15)
    for frame in frames:
        writer.add(Image.fromarray(frame))
    writer.close()
    return path


def cut_film(frames, path, name: str):
    """A film in a container that is readable from its start, without its last third."""
    import av

    whole = path / f"whole.{name}"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=15, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in [*frames] * 4:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    cut = path / f"cut.{name}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    return whole, cut


@needs_av
def test_the_wanted_frames_of_a_film_are_read(film, frames):
    source = Film(film)
    assert (source.rate, source.length, source.live) == (15, FRAMES, False)
    read = list(source.frames(Span(1, None, 3).has, 8))
    assert [frame.number for frame in read] == [1, 4, 7] and source.faults == []
    assert [frame.time for frame in read] == pytest.approx([1 / 15, 4 / 15, 7 / 15])
    for frame in read:
        assert frame.pixels.shape == (48, 64, 3)
        assert np.abs(frame.pixels.astype(int) - frames[frame.number]).mean() < 6
    assert Span(1, 8, 3).size(source.length) == 3 and Span(1, None, 3).size(source.length) == 3


@needs_av
@pytest.mark.parametrize("name", ["avi", "mkv"])
def test_a_film_without_its_end_gives_what_is_there_and_says_so(frames, tmp_path, name):
    whole, cut = cut_film(frames, tmp_path, name)
    source = Film(whole)
    assert len(list(source.frames(Span().has, None))) == 4 * FRAMES and source.faults == []
    source = Film(cut)
    read = list(source.frames(Span().has, None))
    assert FRAMES < len(read) < 4 * FRAMES
    assert len(source.faults) == 1 and f"{cut}: its end is missing: {len(read)}" in source.faults[0]
    assert list(source.frames(Span().has, 3))[-1].number == 2


def test_a_film_that_is_stored_turned_is_set_upright():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(upright(pixels, 90)[:, 0], pixels[0, ::-1])  # counterclockwise
    assert np.array_equal(upright(pixels, -90), upright(pixels, 270))
    assert np.array_equal(upright(pixels, 0), pixels)


@needs_av
def test_a_film_that_says_that_it_is_turned_is_set_upright(film, tmp_path):
    import av
    from av.bitstream import BitStreamFilterContext

    path = tmp_path / "turned.mp4"
    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        turn = "h264_metadata=display_orientation=insert:rotate=90"  # counterclockwise
        turned = BitStreamFilterContext(turn, source.streams.video[0], stream)
        for packet in source.demux(video=0):
            for changed in turned.filter(packet if packet.size else None):
                changed.stream = stream
                target.mux(changed)
    (before,), (after,) = (list(Film(name).frames(Span().has, 1)) for name in (film, path))
    assert np.array_equal(after.pixels, np.rot90(before.pixels))


@needs_av
def test_pictures_of_a_folder_come_by_their_numbers(frames, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (10, 9, 2):
        Image.fromarray(frames[number - 2]).save(folder / f"frame{number}.png")
    (folder / "frame3.png").write_bytes(b"none")
    source = open_source(str(folder), tmp_path / "out")
    read = list(source.frames(Span().has, None))
    assert [frame.number for frame in read] == [0, 2, 3] and source.length == 4
    assert all(np.array_equal(frame.pixels, frames[i]) for frame, i in zip(read, (0, 7, 8), strict=True))
    assert len(source.faults) == 1 and "frame3.png" in source.faults[0]


@needs_av
def test_a_camera_is_what_a_number_means(film, monkeypatch):
    import sam3_hf.tracking.films as films

    monkeypatch.setattr(films, "camera_address", lambda index: (str(film), None))
    source = open_source("0", film.parent)
    assert source.live and source.record == {"camera": 0}
    assert [frame.number for frame in source.frames(Span().has, 4)] == [0, 1, 2, 3]
    monkeypatch.setattr(films, "camera_address", lambda index: ("/dev/none", "v4l2"))
    with pytest.raises(OSError, match="camera 7 cannot be opened"):
        open_source("7", film.parent)


class Unplugged:
    """A container of a camera whose third frame arrives damaged, and that is gone after so many packets."""

    def __init__(self, container, packets: int):
        self._container, self._left, self.streams = container, packets, container.streams

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def demux(self, stream):
        import av

        def damaged():
            raise av.error.InvalidDataError(1, "damaged")

        for number, packet in enumerate(islice(self._container.demux(stream), self._left)):
            yield SimpleNamespace(decode=damaged) if number == 2 else packet
        raise av.error.OSError(19, "No such device")


@needs_av
def test_a_camera_that_fails_gave_what_it_gave_and_says_so(frames, tmp_path, monkeypatch):
    import sam3_hf.tracking.films as films

    whole, _ = cut_film(frames, tmp_path, "avi")
    opened = films._opened
    monkeypatch.setattr(films, "_opened", lambda address, kind, name: Unplugged(opened(str(whole), None, name), 8))
    source = open_source("3", tmp_path / "out")
    assert [frame.number for frame in source.frames(Span().has, None)] == [*range(7)]
    assert source.faults == ["camera 3 gave 7 frames and then failed (No such device)."]


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(saved, film, tmp_path):
    """Runs the command with a model of random weights, which finds something everywhere."""

    def follow(*arguments, source=film, model=saved, output=tmp_path / "out"):
        options = ["--threshold", 0.01, "--low-threshold", 0, "--nms-iou", 1, "--max-objects", 3, "--batch-size", 2]
        prompts = ["--prompt", "cat", "--prompt", "red car"]
        return run("track", source, "--model", model, "--output", output, *options, *prompts, *arguments)

    return follow


def frames_of(folder) -> list[dict]:
    return json.loads((folder / "tracks.json").read_text())["frames"]


def contents(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_av
@needs_trackers
def test_writes_tracks_boxes_masks_and_a_film(command, tmp_path):
    import av

    result = command("--masks", "--start", 1, "--every", 2)
    assert result.exit_code == 0, result.output
    assert "5/5" in result.stderr and "frame" in result.stderr  # the progress bar
    out = tmp_path / "out"
    names = {"settings.json", "detections.jsonl", "tracks.json", "tracks.txt", "overlay.mp4"}
    numbers = [1, 3, 5, 7, 9]
    assert set(contents(out)) == names | {f"masks/{number:06d}.png" for number in numbers}
    tracks = json.loads((out / "tracks.json").read_text())
    assert tracks["film"]["rate"] == 15 and (tracks["film"]["width"], tracks["film"]["height"]) == (64, 48)
    assert [frame["frame"] for frame in tracks["frames"]] == numbers
    lines = [line.split(",") for line in (out / "tracks.txt").read_text().splitlines()]
    rows = [(frame, each) for frame in tracks["frames"] for each in frame["objects"]]
    assert len(lines) == len(rows) > 4 and {each["label"] for _, each in rows} <= {"cat", "red car"}
    for line, (frame, each) in zip(lines, rows, strict=True):
        left, top, right, bottom = each["box"]
        assert [int(line[0]), int(line[1])] == [frame["frame"] + 1, each["id"]] and line[7:] == ["-1"] * 3
        assert [float(side) for side in line[2:6]] == pytest.approx([left, top, right - left, bottom - top], abs=0.01)
    frame = tracks["frames"][-1]
    ids = np.array(Image.open(out / "masks" / "000009.png"))
    best = max(frame["objects"], key=lambda each: each["score"])
    assert (ids[decode_mask(best["segmentation"])] == best["id"]).all()
    assert set(np.unique(ids)) <= {0, *(each["id"] for each in frame["objects"])}
    with av.open(str(out / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 7.5
        assert [image.width for image in container.decode(stream)] == [512] * 5


@needs_av
@needs_trackers
@pytest.mark.parametrize(
    ("options", "batches"), [([], 5), (["--start", 1, "--end", 9, "--every", 2, "--max-objects", 2], 2)]
)
def test_goes_on_where_it_stopped_with_the_result_of_one_run(command, tmp_path, monkeypatch, options, batches):
    assert command("--masks", *options, output=tmp_path / "once").exit_code == 0
    detect, calls = Sam3LitePipeline.detect, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == batches:
            raise KeyboardInterrupt
        return detect(self, *arguments)

    monkeypatch.setattr(Sam3LitePipeline, "detect", counted)
    assert command("--masks", *options).exit_code != 0
    assert set(contents(tmp_path / "out")) == {"settings.json", "detections.jsonl"}
    with (tmp_path / "out" / "detections.jsonl").open("a") as file:
        file.write('{"frame": 6, "ti')
    for _ in range(2):  # the second time nothing is left to do
        result = command("--masks", *options)
        assert result.exit_code == 0, result.output
        assert len(calls) == batches + 1  # the others were there
        assert contents(tmp_path / "out") == contents(tmp_path / "once")

    other = command("--masks", *options, "--every", 3)
    assert other.exit_code == 1 and "every was " in other.output and " and is 3" in other.output


@needs_av
@needs_trackers
def test_a_picture_that_can_be_read_only_later_is_not_taken_for_another(command, frames, tmp_path, monkeypatch):
    import sam3_hf.tracking.films as films

    (tmp_path / "frames").mkdir()
    for number in range(4):
        Image.fromarray(frames[number]).save(tmp_path / "frames" / f"{number}.png")

    def read(path):
        if path.name == "1.png":
            raise OSError(f"{path}: the network is down")
        return read_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(films, "read_image", read)
        assert command("--end", 4, source=tmp_path / "frames").exit_code == 1
    assert [frame["frame"] for frame in frames_of(tmp_path / "out")] == [0, 2, 3]
    again = command("--end", 4, source=tmp_path / "frames")
    assert again.exit_code == 1 and "found in frame 2, and now the film reads otherwise" in again.stderr


def test_an_id_that_a_picture_cannot_hold_is_named():
    rle = encode_masks(np.ones((1, 2, 2), dtype=bool))[0]
    objects = [TrackedObject(number, "cat", 0.9, [0, 0, 2, 2], rle) for number in (65535, 65536)]
    assert (id_mask(objects[:1], 2, 2) == 65535).all()
    with pytest.raises(ValueError, match="leave --masks out"):
        id_mask(objects, 2, 2)


@needs_av
@needs_trackers
def test_frames_and_objects_are_as_many_as_asked(command, tmp_path):
    assert command("--start", 2, "--end", 7, output=tmp_path / "three").exit_code == 0
    assert command("--start", 2, "--end", 7, "--max-objects", 1, output=tmp_path / "one").exit_code == 0
    three, one = (
        [json.loads(line) for line in (tmp_path / name / "detections.jsonl").read_text().splitlines()]
        for name in ("three", "one")
    )
    assert [found["frame"] for found in one] == [frame["frame"] for frame in frames_of(tmp_path / "one")]
    assert [found["frame"] for found in three] == [found["frame"] for found in one] == [2, 3, 4, 5, 6]
    assert [len(found["scores"]) for found in three] == [3] * 5
    assert [found["scores"] for found in one] == [[max(found["scores"])] for found in three]
    assert all(len(frame["objects"]) <= 1 for frame in frames_of(tmp_path / "one"))


@needs_av
@needs_trackers
def test_a_fixed_vocabulary_is_followed_as_the_words_are(command, model, tmp_path):
    processor = Sam3LiteProcessor.from_config(model.config)
    model.freeze_vocabulary(["red car", "cat"], processor).save_pretrained(tmp_path / "fixed")
    processor.save_pretrained(tmp_path / "fixed")
    unknown = command("--prompt", "dog", model=tmp_path / "fixed")
    assert unknown.exit_code == 1 and "'dog': not in the fixed vocabulary" in unknown.output
    assert not (tmp_path / "out").exists()
    for name, chosen in (("words", {}), ("out", {"model": tmp_path / "fixed"})):
        result = command(output=tmp_path / name, **chosen)
        assert result.exit_code == 0, result.output
    words, fixed = (frames_of(tmp_path / name) for name in ("words", "out"))
    assert sum(len(frame["objects"]) for frame in fixed) > FRAMES
    for one, two in zip(words, fixed, strict=True):
        for name in ("id", "label"):
            assert [each[name] for each in one["objects"]] == [each[name] for each in two["objects"]]
        boxes, others = (np.array([each["box"] for each in frame["objects"]]) for frame in (one, two))
        assert np.allclose(boxes, others, atol=0.01)


@needs_av
@needs_trackers
def test_a_model_of_boxes_alone_is_followed_without_masks(command, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "boxes")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "boxes" / "config.json").write_text(json.dumps({**config, "mask_supervision": False}))
    refused = command("--masks", model=tmp_path / "boxes")
    assert refused.exit_code == 1 and "leave --masks out" in refused.output and not (tmp_path / "out").exists()
    assert command(output=tmp_path / "masks").exit_code == 0
    result = command(model=tmp_path / "boxes")
    assert result.exit_code == 0 and "it gives boxes, and no masks" in result.stderr
    expected, found = frames_of(tmp_path / "masks"), frames_of(tmp_path / "out")
    assert sum(len(frame["objects"]) for frame in found) > FRAMES
    for frame in expected:
        for each in frame["objects"]:
            each["segmentation"] = None
    assert found == expected
    for name in ("tracks.txt", "overlay.mp4"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@needs_av
@needs_trackers
def test_pictures_of_a_folder_are_followed_and_those_that_are_broken_named(command, frames, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(4):
        Image.fromarray(frames[number]).save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "frames" / "2.png").write_bytes(b"none")
    result = command(source=tmp_path / "frames")
    assert result.exit_code == 1 and "2.png" in result.stderr
    assert [frame["frame"] for frame in frames_of(tmp_path / "out")] == [0, 1, 3]


@needs_av
@needs_trackers
def test_a_truncated_film_gives_what_was_readable_and_status_1(command, frames, tmp_path):
    cut = cut_film(frames, tmp_path, "avi")[1]
    result = command(source=cut)
    assert result.exit_code == 1 and "its end is missing" in result.stderr
    assert FRAMES < len(frames_of(tmp_path / "out")) < 4 * FRAMES


@needs_av
@needs_trackers
def test_a_camera_is_followed_until_it_is_stopped(command, film, tmp_path, monkeypatch):
    import sam3_hf.tracking.films as films

    monkeypatch.setattr(films, "camera_address", lambda index: (str(film), None))
    detect, calls = Sam3LitePipeline.detect, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return detect(self, *arguments)

    monkeypatch.setattr(Sam3LitePipeline, "detect", stopped)
    result = command(source="0")
    assert result.exit_code == 0, result.output
    assert len(frames_of(tmp_path / "out")) == 4
    again = command(source="0")
    assert again.exit_code == 1 and "choose another --output" in again.stderr


@needs_av
@needs_trackers
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("none.mp4", [], "none.mp4 is no file"),
        ("text.mp4", [], "it is damaged, without its end, or no film"),
        (None, ["--start", 5, "--end", 5], "--end 5 must be above --start 5"),
        (None, ["--start", 99], "clip.mp4 has no frame 99"),
        (None, ["--low-threshold", 0.5], "`low_threshold`=0.5"),
    ],
)
def test_errors_are_one_line(command, film, tmp_path, source, options, message):
    (tmp_path / "text.mp4").write_text("no film")
    result = command(*options, source=film if source is None else tmp_path / source)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert result.exit_code == 1 and len(errors) == 1 and message in errors[0], result.output


@needs_av
@needs_trackers
def test_a_standard_checkpoint_is_followed_at_the_sizes_of_a_preset(command, tmp_path):
    result = command("--preset", "tiny-plus", "--end", 2, model=PACKAGED)
    assert result.exit_code == 0, result.output
    assert len(frames_of(tmp_path / "out")) == 2
    weights = json.loads((tmp_path / "out" / "settings.json").read_text())["weights"]
    assert weights == fingerprint(Sam3LitePipeline.from_pretrained(PACKAGED, preset="tiny-plus").model)
    other = command("--end", 2, model=PACKAGED)
    assert other.exit_code == 1 and "weights was" in other.stderr
    unknown = command("--preset", "tiny-plus-plus", model=PACKAGED)
    assert unknown.exit_code == 1 and "There is no preset 'tiny-plus-plus'" in unknown.stderr


@needs_av
def test_without_a_model_a_line_says_what_to_give(film, tmp_path):
    result = run("track", film, "--prompt", "cat", "--output", tmp_path / "out")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: --model is missing") and "--preset lite-plus" in line


@needs_av
@needs_trackers
@pytest.mark.parametrize("mistyped", [["--start", FRAMES], ["--start", 99, "--masks"]])
def test_what_was_mistyped_leaves_nothing_that_stands_in_the_way(command, tmp_path, mistyped):
    assert command(*mistyped).exit_code == 1
    assert not (tmp_path / "out").exists()
    result = command("--start", FRAMES - 1)
    assert result.exit_code == 0, result.output
    assert [frame["frame"] for frame in frames_of(tmp_path / "out")] == [FRAMES - 1]


@needs_av
@needs_trackers
def test_what_stopped_before_its_first_result_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Sam3LitePipeline, "detect", interrupted)
        assert command().exit_code != 0
    assert not (tmp_path / "out").exists()
    assert command("--every", 5).exit_code == 0


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
