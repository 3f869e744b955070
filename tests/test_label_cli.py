import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shake
from PIL import Image
from test_conversion import native_config, native_file
from train_cases import train
from typer.testing import CliRunner

from sam3_hf import Prompt, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.data import concept_names, load_dataset_splits, segmentation_of
from sam3_hf.prediction.output_folder import PredictionFolder
from sam3_hf.rle import decode_mask, encode_segmentation

PROMPTS = ("cat", "red car")


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Ten pictures, three of them in a folder of the folder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(10):
        pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index > 6 else "") / f"{index}.png")
    return folder


@pytest.fixture
def label(saved, tmp_path):
    """Runs the command with two prompts, without worker processes; 20 detections per picture if nothing is said."""

    def run(*arguments, output=tmp_path / "out", prompts=PROMPTS, threshold=0.0, model=saved):
        words = [word for prompt in prompts for word in ("--prompt", prompt)]
        options = [] if threshold is None else ["--threshold", threshold]
        options += ["--model", model, "--output", output, "--mask-threshold", 0.4]
        options += ["--workers", 0, *words]  # of random weights, most masks are empty at 0.5
        limit = [] if "--max-detections" in arguments else ["--max-detections", 20]
        return CliRunner().invoke(app, ["label", *map(str, [*arguments, *options, *limit])])

    return run


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder: contents of files, targets of links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def coco(folder: Path, split: str) -> dict:
    return json.loads((folder / split / "_annotations.coco.json").read_text())


def names(folder: Path, split: str) -> set[str]:
    return {image["file_name"] for image in coco(folder, split)["images"]}


def test_writes_what_the_pipeline_finds_as_a_dataset(label, pictures, saved, tmp_path):
    result = label(pictures, "--overlays", "--batch-size", 1)  # as the pipeline below: to the last bit
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    pipe = Sam3LitePipeline.from_pretrained(saved, device="cpu")
    splits, images = load_dataset_splits(out), 0
    for split, short in (("train", "train"), ("validation", "valid")):
        content, rows = coco(out, short), splits[split]
        assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "red car"}]
        assert concept_names(rows) == list(PROMPTS)
        for image, row in zip(content["images"], rows, strict=True):
            own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            found = pipe(
                pictures / image["file_name"], list(PROMPTS), threshold=0.0, max_detections=20, mask_threshold=0.4
            )
            assert {one["score"] for one in own} <= set(found.scores.tolist())
            assert [one["bbox"] for one in own] == [item["bbox"] for item in row["objects"]]
            for one, item in zip(own, row["objects"], strict=True):
                place = found.scores.tolist().index(one["score"])
                assert PROMPTS[one["category_id"] - 1] == found.labels[place] == PROMPTS[item["category"]]
                assert segmentation_of(item) == one["segmentation"] == found.rle[place]
                assert one["area"] == decode_mask(one["segmentation"]).sum()
            assert (out / "overlays" / f"{image['file_name']}.png").is_file()
        assert splits[split].num_rows == len(content["images"]) > 0
        assert [one["id"] for one in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
        images += len(content["images"])
    assert images == 10 and len(coco(out, "train")["annotations"]) > 10
    assert "10 pictures were new, 0 done before" in result.output
    assert os.readlink(out / "train" / "1.png") == str(pictures / "1.png")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["model"] == str(saved) and settings["threshold"] == 0 and settings["nms_iou"] == 0.7
    assert settings["versions"]["torch"] == torch.__version__ and len(settings["weights"]) == 64


@pytest.mark.slow
def test_what_is_labelled_trains_with_no_further_step(label, pictures, tmp_path):
    assert label(pictures).exit_code == 0
    finished = train(tmp_path, tmp_path / "out", max_steps=2, num_workers=0)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_native_checkpoint_labels(label, pictures, tmp_path):
    torch.manual_seed(0)
    torch.save(native_file(shake(Sam3LiteModel(native_config()))), tmp_path / "sam3.pt")
    assert label(pictures, model=tmp_path / "sam3.pt").exit_code == 0
    assert coco(tmp_path / "out", "train")["images"]


def test_pictures_without_detections_stay_as_negatives(label, pictures, tmp_path):
    result = label(pictures, threshold=1.0)
    assert result.exit_code == 0 and "(9 without annotations), 0 annotations" in result.output, result.output
    splits = load_dataset_splits(tmp_path / "out")
    assert splits["train"].num_rows + splits["validation"].num_rows == 10
    assert not any(splits["train"]["objects"])


def test_polygons(label, pictures, tmp_path):
    assert label(pictures).exit_code == 0
    assert label(pictures, "--masks", "polygon", output=tmp_path / "polygons").exit_code == 0
    masks, polygons = coco(tmp_path / "out", "train"), coco(tmp_path / "polygons", "train")
    sizes = {image["id"]: (image["height"], image["width"]) for image in masks["images"]}
    for one, other in zip(masks["annotations"], polygons["annotations"], strict=True):
        pixels = decode_mask(one.pop("segmentation"))
        filled = decode_mask(encode_segmentation(other.pop("segmentation"), *sizes[one["image_id"]]))
        assert one == other and (filled | pixels == filled).all()  # holes are filled
    assert len(load_dataset_splits(tmp_path / "polygons")["train"]) == len(polygons["images"])


def test_the_split_goes_by_seed_and_name_alone(label, pictures, tmp_path):
    assert label(pictures / "*.png").exit_code == 0
    first = {split: names(tmp_path / "out", split) for split in ("train", "valid")}
    assert all(first.values()) and len(first["train"] | first["valid"]) == 7
    assert label(pictures).exit_code == 0
    second = {split: names(tmp_path / "out", split) for split in ("train", "valid")}
    assert all(first[split] == {name for name in second[split] if "/" not in name} for split in first)
    assert label(pictures, "--seed", 1, "--valid-share", 0.5, output=tmp_path / "half").exit_code == 0
    assert names(tmp_path / "half", "valid") != second["valid"]
    result = label(pictures, "--valid-share", 0, output=tmp_path / "all")
    assert result.exit_code == 0 and "which training needs" not in result.output
    assert len(names(tmp_path / "all", "train")) == 10 and not (tmp_path / "all" / "valid").exists()


def test_a_split_without_pictures_is_said(label, pictures, tmp_path):
    result = label(pictures / "0.png")
    assert result.exit_code == 0 and "No picture fell to train/" in result.output
    assert not (tmp_path / "out" / "train").exists() and names(tmp_path / "out", "valid") == {"0.png"}


@pytest.mark.parametrize("images", ["link", "copy", "refer"])
def test_pictures_are_linked_copied_or_referred_to(label, pictures, images, tmp_path):
    (pictures / "images").mkdir()  # of the name of the link to their folder
    Image.new("RGB", (9, 9)).save(pictures / "images" / "0.png")
    out = tmp_path / "out"
    assert label(pictures, "--images", images).exit_code == 0
    written = tree(out)
    assert "0 pictures were new, 11 done before" in label(pictures, "--images", images).output
    assert tree(out) == written
    found = {}
    for split in load_dataset_splits(out).values():
        for name, image in zip(split["file_name"], split["image"], strict=True):
            path = Path(image["path"])
            found[name.removeprefix("images/") if images == "refer" else name] = path
            assert path.is_relative_to(out) and path.is_symlink() == (images == "link")
    assert len(found) == 11
    for name, path in found.items():
        assert path.read_bytes() == (pictures / name).read_bytes()
    assert len([path for path in out.rglob("*") if path.is_symlink()]) == {"link": 11, "copy": 0, "refer": 2}[images]


def test_goes_on_where_it_stopped(label, pictures, tmp_path, monkeypatch):
    assert label(pictures, "--batch-size", 4, output=tmp_path / "whole").exit_code == 0
    write, count = PredictionFolder.write, 0

    def stop_at_the_sixth(self, *arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionFolder, "write", stop_at_the_sixth)
        assert label(pictures, "--batch-size", 4).exit_code != 0
    assert not list((tmp_path / "out").rglob("_annotations.coco.json"))
    result = label(pictures, "--batch-size", 4)
    assert "5 pictures were new, 5 done before" in result.output, result.output
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_other_settings_are_not_mixed(label, pictures, tmp_path):
    assert label(pictures).exit_code == 0
    for arguments in (["--masks", "polygon"], ["--images", "copy"], ["--seed", 1], ["--phrase-threshold", "cat=0.9"]):
        result = label(pictures, *arguments)
        assert result.exit_code == 1 and "another --output" in result.output
        assert arguments[0].lstrip("-").replace("-", "_") in result.output


def test_a_damaged_picture_and_odd_names_are_listed_and_the_rest_is_finished(label, pictures, tmp_path):
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    for name in ("a\\b.png", "c:d.png", os.fsdecode(b"\xff.png")):
        shutil.copy(pictures / "0.png", pictures / name)
    result = label(pictures, "--batch-size", 2)
    assert result.exit_code == 1 and "4 could not be read or written" in result.output
    assert all(word in result.output for word in ("cut.png", "c:d.png", "rename it"))
    assert len(names(tmp_path / "out", "train") | names(tmp_path / "out", "valid")) == 10
    load_dataset_splits(tmp_path / "out")


def test_a_picture_that_is_gone_is_left_out_of_a_later_run(label, pictures, tmp_path):
    assert label(pictures).exit_code == 0
    (pictures / "3.png").unlink()
    result = label(pictures)
    assert result.exit_code == 1 and "1 earlier labels are left out" in result.output and "3.png" in result.output
    assert len(names(tmp_path / "out", "train") | names(tmp_path / "out", "valid")) == 9


def test_each_phrase_has_its_threshold(label, pictures, saved, tmp_path):
    pipe = Sam3LitePipeline.from_pretrained(saved, device="cpu")
    everything = pipe(pictures / "0.png", list(PROMPTS), threshold=0.0, nms_iou=None)
    own = sorted(score for score, word in zip(everything.scores, everything.labels, strict=True) if word == "cat")
    limit = float(own[5] + own[6]) / 2
    settings = ("--nms-iou", 1, "--max-detections", 1000)
    assert label(pictures, *settings, "--phrase-threshold", f"cat={limit:.9f}").exit_code == 0
    record = json.loads((tmp_path / "out" / "predictions" / "0.png.json").read_text())
    for word, threshold in (("cat", limit), ("red car", 0)):
        expected = [score for score, label in zip(everything.scores, everything.labels, strict=True) if label == word]
        expected = [float(score) for score in expected if score > threshold]
        found = [row["score"] for row in record["detections"] if row["label"] == word]
        assert np.allclose(found, expected, atol=1e-6) and found
    prompts = [Prompt("cat", threshold=limit), "red car"]
    again = pipe(pictures / "0.png", prompts, threshold=0.0, nms_iou=None, max_detections=3)
    scores = [score for score, word in zip(again.scores.tolist(), again.labels, strict=True) if word == "cat"]
    assert len(again) == 3 and all(score > limit for score in scores)


def test_labels_are_what_scores_above_one_half(label, pictures, saved, model, tmp_path):
    with torch.no_grad():  # scores on both sides
        model.detr_decoder.presence_head.layer3.bias.fill_(10)
        model.dot_product_scoring.query_proj.weight.mul_(4)
    model.save_pretrained(saved)
    options = ("--nms-iou", 1, "--max-detections", 1000)
    assert label(pictures, *options, threshold=None).exit_code == 0
    pipe = Sam3LitePipeline.from_pretrained(saved, device="cpu")
    scores = pipe(pictures / "0.png", list(PROMPTS), threshold=0.0, nms_iou=None).scores
    record = json.loads((tmp_path / "out" / "predictions" / "0.png.json").read_text())
    found = [row["score"] for row in record["detections"]]
    assert np.allclose(sorted(found), sorted(scores[scores >= 0.5].tolist()), atol=1e-6)
    assert found and ((scores > 0.3) & (scores < 0.5)).any()


def test_errors_are_one_line(label, pictures, tmp_path):
    for result, word in [
        (label(pictures, prompts=["cat", "Cat"]), "'cat' and 'Cat' are one phrase"),
        (label(pictures, "--phrase-threshold", "dog=0.4"), "one of the prompts"),
        (label(pictures, "--phrase-threshold", "cat=high"), "'high' is no number"),
        (label(pictures, "--phrase-threshold", "cat=2"), "outside of 0..1"),
        (label(pictures, "--valid-share", 1), "--valid-share"),
        (label(pictures, prompts=[" "]), "text"),
        (label(tmp_path / "missing"), "missing"),
    ]:
        assert result.exit_code == 1 and word in result.output and result.output.startswith("Error: "), result.output
        assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_masks_labels_boxes(label, pictures, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "mask_supervision": False}))
    result = label(pictures)
    assert result.exit_code == 0 and "it gives boxes, and no masks" in result.output
    annotations = coco(tmp_path / "out", "train")["annotations"]
    assert annotations and not any("segmentation" in one for one in annotations)
    assert all(one["area"] == one["bbox"][2] * one["bbox"][3] > 0 for one in annotations)
    assert load_dataset_splits(tmp_path / "out")["train"].num_rows == 9


def test_what_training_would_refuse_is_left_out_and_counted(label, pictures, tmp_path, monkeypatch):
    from sam3_hf.data import checks

    result = label(pictures)
    kept = sum(len(coco(tmp_path / "out", split)["annotations"]) for split in ("train", "valid"))
    monkeypatch.setattr(checks, "LEAST_OVERLAP", 0.9)
    shutil.rmtree(tmp_path / "out")
    result = label(pictures)
    left = sum(len(coco(tmp_path / "out", split)["annotations"]) for split in ("train", "valid"))
    assert (
        left < kept and "as training would refuse them" in result.output and "mask far from its box" in result.output
    )
