import json
import os
import re

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image
from typer.testing import CliRunner

from sam3_hf import Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.picture_files import find_pictures
from sam3_hf.rle import decode_mask


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them in a folder of the folder, and a text."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (30, 40), "b.jpg": (50, 20), "more/a.png": (25, 25)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def command(saved, tmp_path):
    """Runs the command with two prompts, keeping all detections, without worker processes."""

    def predict(*arguments, prompts=("cat", "red car"), threshold=0.0, output=tmp_path / "out"):
        words = [word for prompt in prompts for word in ("--prompt", prompt)]
        options = ["--model", saved, "--output", output, "--threshold", threshold, "--workers", 0]
        return run(*arguments, *options, *words)

    return predict


def record_of(folder, name) -> dict:
    return json.loads((folder / "predictions" / f"{name}.json").read_text())


def test_writes_what_the_pipeline_finds(command, pictures, saved, tmp_path):
    result = command(pictures, "--overlays", "--masks", "--batch-size", 2, "--max-detections", 6)
    assert result.exit_code == 0, result.output
    assert "3 pictures were new" in result.output
    out = tmp_path / "out"
    names = ["a.png", "b.jpg", "more/a.png"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json")) == sorted(
        ["coco_images.json", "coco_results.json", "settings.json", *(f"predictions/{name}.json" for name in names)]
    )
    pipe = Sam3LitePipeline.from_pretrained(saved, device="cpu")
    for name in names:
        expected = pipe(pictures / name, ["cat", "red car"], threshold=0.0, max_detections=6)
        record, size = record_of(out, name), Image.open(pictures / name).size
        assert (record["width"], record["height"]) == size
        rows = record["detections"]
        assert [row["label"] for row in rows] == expected.labels and len(rows) == 6
        assert np.allclose([row["box"] for row in rows], expected.boxes, atol=1e-3)
        assert np.allclose([row["score"] for row in rows], expected.scores, atol=1e-5)
        masks = [np.array(Image.open(path)) for path in sorted((out / "masks" / name).iterdir())]
        assert all(
            np.array_equal(mask, decode_mask(row["segmentation"])) for mask, row in zip(masks, rows, strict=True)
        )
        overlay = Image.open(out / "overlays" / f"{name}.png")
        scale = 512 / max(size)  # small pictures are enlarged
        plain = Image.open(pictures / name).convert("RGB").resize([round(scale * side) for side in size])
        overlay = overlay.crop((0, 0, *plain.size))  # without the legend
        assert np.abs(np.array(overlay, dtype=int) - np.array(plain)).mean() > 3


def test_coco_results_are_read_by_coco_tools(command, pictures, tmp_path):
    assert command(pictures).exit_code == 0
    out = tmp_path / "out"
    truth = COCO()
    truth.dataset = {**json.loads((out / "coco_images.json").read_text()), "annotations": []}
    truth.createIndex()
    results = truth.loadRes(str(out / "coco_results.json"))
    count = 0
    for image in truth.dataset["images"]:
        rows = record_of(out, image["file_name"])["detections"]
        annotations = results.loadAnns(results.getAnnIds(imgIds=[image["id"]]))
        names = [truth.cats[annotation["category_id"]]["name"] for annotation in annotations]
        assert names == [row["label"] for row in rows]
        assert [annotation["segmentation"] for annotation in annotations] == [row["segmentation"] for row in rows]
        count += len(rows)
    assert count > 0 and len(truth.dataset["images"]) == 3


def test_goes_on_where_it_stopped(command, pictures, tmp_path):
    assert command(pictures / "*.png").exit_code == 0
    out = tmp_path / "out"
    written = out / "predictions" / "a.png.json"
    before = written.stat().st_mtime_ns
    result = command(pictures)
    assert "2 pictures were new, 1 done before" in result.output
    assert written.stat().st_mtime_ns == before
    assert len(json.loads((out / "coco_images.json").read_text())["images"]) == 3

    image = Image.open(pictures / "a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(pictures / "a.png")
    os.utime(pictures / "a.png", ns=(1, 1))
    assert "1 pictures were new, 2 done before" in command(pictures).output  # the file is another one now
    assert written.stat().st_mtime_ns != before


def test_a_fixed_vocabulary_takes_its_words_and_leaves_no_trace_of_others(command, pictures, model, saved, tmp_path):
    model.freeze_vocabulary(["cat", "red car"], Sam3LiteProcessor.from_config(model.config)).save_pretrained(saved)
    result = command(pictures, prompts=["cat", "dog"])
    assert result.exit_code == 1 and "'dog': not in the fixed vocabulary" in result.output
    assert "'cat', 'red car'" in result.output and not (tmp_path / "out").exists()
    assert command(pictures, "--tile-size", 20, "--nms-iou", 0.5).exit_code == 0
    found = record_of(tmp_path / "out", "a.png")["detections"]
    assert {one["label"] for one in found} == {"cat", "red car"}


def test_outputs_that_are_missing_are_made(command, pictures, tmp_path):
    out = tmp_path / "out"
    assert "3 pictures were new" in command(pictures).output
    assert "3 pictures were new" in command(pictures, "--overlays", "--masks").output
    assert "0 pictures were new" in command(pictures, "--overlays", "--masks").output
    (out / "overlays" / "b.jpg.png").unlink()
    next((out / "masks" / "a.png").iterdir()).unlink()
    assert "2 pictures were new" in command(pictures, "--overlays", "--masks").output
    assert (out / "overlays" / "b.jpg.png").exists()


def test_other_settings_are_not_mixed(command, pictures, model, saved, tmp_path):
    assert command(pictures).exit_code == 0
    results = (tmp_path / "out" / "coco_results.json").read_bytes()
    for arguments, options, word in [
        ((), {"prompts": ["cat"]}, "prompts"),
        ((), {"threshold": 0.9}, "threshold"),
        (("--nms-iou", 0.5), {}, "nms_iou"),
        (("--tile-size", 20), {}, "tile_size"),
    ]:
        result = command(pictures, *arguments, **options)
        assert result.exit_code == 1 and word in result.output and "another --output" in result.output
    with torch.no_grad():
        model.text_projection.bias.add_(1)
    model.save_pretrained(saved)
    result = command(pictures)
    assert result.exit_code == 1 and "weights" in result.output
    assert (tmp_path / "out" / "coco_results.json").read_bytes() == results


def test_unreadable_pictures_are_listed_and_the_rest_is_finished(command, pictures, tmp_path):
    (pictures / "0.png").write_text("no picture")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    result = command(pictures, "--batch-size", 2)
    assert result.exit_code == 1
    assert "2 could not be read" in result.output and "0.png" in result.output and "cut.png" in result.output
    assert len(list((tmp_path / "out" / "predictions").rglob("*.json"))) == 3
    assert (tmp_path / "out" / "coco_results.json").exists()
    assert command(pictures / "a.png").exit_code == 0


def test_workers_give_the_same(command, pictures, tmp_path):
    assert command(pictures).exit_code == 0
    assert command(pictures, "--workers", 2, "--overlays", output=tmp_path / "second").exit_code == 0
    for name in ("a.png", "b.jpg", "more/a.png"):
        assert record_of(tmp_path / "out", name) == record_of(tmp_path / "second", name)


def test_nothing_of_the_user_is_overwritten(command, pictures, tmp_path):
    result = command(pictures, output=pictures)
    assert result.exit_code == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    result = command(pictures, output=tmp_path / "mine")
    assert result.exit_code == 1 and "not empty" in result.output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert command(pictures / "a.png").exit_code == 0
    result = command(pictures / "more" / "a.png")  # another picture of the same name
    assert result.exit_code == 1 and "another --output" in result.output


def test_errors_are_one_line(command, pictures, saved, tmp_path):
    for result, word in [
        (command(tmp_path / "missing"), "missing"),
        (command(pictures, threshold=2), "threshold"),
        (command(pictures, prompts=[""]), "text"),
        (run(pictures, "--model", tmp_path, "--prompt", "cat", "--output", tmp_path / "out"), "neither a config.json"),
    ]:
        assert result.exit_code == 1 and word in result.output and result.output.startswith("Error: ")
        assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_find_pictures(pictures, tmp_path):
    out = pictures / "out"
    (out / "overlays").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(out / "overlays" / "a.png")
    assert [picture.name for picture in find_pictures([str(pictures)], out)] == ["a.png", "b.jpg", "more/a.png"]
    found = find_pictures([str(pictures / "b.*"), str(pictures / "notes.txt")], out)
    assert [picture.name for picture in found] == ["b.jpg", "notes.txt"]
    with pytest.raises(ValueError, match="both be written as a.png"):
        find_pictures([str(pictures), str(pictures / "more")], out)


def test_where_nothing_passes_the_best_score_is_told(command, pictures, tmp_path):
    result = command(pictures, "--overlays", threshold=0.99)
    assert result.exit_code == 0 and "0 detections in 3 pictures" in result.output
    names = ("a.png", "b.jpg", "more/a.png")
    best = {name: record_of(tmp_path / "out", name)["best_scores"] for name in names}
    for prompt in ("cat", "red car"):
        name = max(names, key=lambda name: best[name][prompt])
        said = f"Nothing above --threshold 0.99 for '{prompt}': the best score is {best[name][prompt]:.2f}, in {name}."
        assert said in result.output
    assert "for 'cat'" in command(pictures, threshold=0.99).output  # also of what was done before
    low, *_, high = sorted(max(scores.values()) for scores in best.values())
    some = command(pictures, threshold=(low + high) / 2, output=tmp_path / "some").output
    assert "in 3 pictures" in some and re.search(
        r"in [12] pictures; their best scores: .*\.(png|jpg) 0\.\d\d \(", some
    )


def test_overlays_are_opened_on_a_display_alone(command, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    result = command(pictures, "--show")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert result.output.startswith("Error: --show needs a display, and DISPLAY") and result.output.count("\n") == 1
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "xdg-open, which is not installed" in command(pictures, "--show").output
    (tmp_path / "xdg-open").write_text("#!/bin/sh\n")
    (tmp_path / "xdg-open").chmod(0o755)
    opened = []
    monkeypatch.setattr("typer.launch", lambda path: opened.append(path) or 0)
    assert command(pictures, "--show").exit_code == 0
    names = ["a.png", "b.jpg", "more/a.png"]
    assert opened == [str(tmp_path / "out" / "overlays" / f"{name}.png") for name in names]
    monkeypatch.setattr("typer.launch", lambda path: 1)
    result = command(pictures, "--show")
    assert result.exit_code == 1 and "cannot be shown, no program opens it" in result.output
