"""`sam3-lite track`: frames in, ids, boxes, masks and a film out; the same after an interruption."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from film_cases import FRAMES, cut_film, needs_av, needs_trackers
from PIL import Image

import sam3_hf
from sam3_hf import Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.prediction.run import fingerprint
from sam3_hf.reading import read_image
from sam3_hf.rle import decode_mask, encode_masks
from sam3_hf.tracking.output import id_mask
from sam3_hf.tracking.tracker import TrackedObject

PACKAGED = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"


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
