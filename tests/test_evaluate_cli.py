"""`sam3-lite evaluate`, and the curves and counts that it draws."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from conftest import micro_config, shake
from evaluation_cases import CASES, random_pairs
from PIL import Image
from typer.testing import CliRunner

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.commands.evaluate import COLUMNS, table
from sam3_hf.commands.scoring import load_split
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.generated import write_dataset
from sam3_hf.evaluation import CocoAP, loop, prediction_row, reference_row
from sam3_hf.evaluation.curves import Confusion, PrecisionRecall
from sam3_hf.evaluation.loop import Pictures, evaluate
from sam3_hf.evaluation.plots import plot_confusion, plot_precision_recall
from sam3_hf.processing_sam3_lite import tokenize
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.data import load_data

NAMES = {0: "cat", 1: "dog"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=2, num_valid=5, image_size=64, num_concepts=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    shake(Sam3LiteModel(micro_config())).save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def square(left: int, top: int) -> list[int]:
    return [left, top, left + 10, top + 10]


def test_confusion_counted_by_hand(tmp_path):
    """Image 1: a cat found twice, a cat taken for a dog, a dog missed. Image 2: a crowd of cats, and a stray dog."""
    metric = Confusion(("bbox",), NAMES, cache_dir=tmp_path)
    cats, dogs = [square(0, 0), square(20, 0)], [square(0, 40)]
    metric.add_batch(
        predictions=[
            prediction_row(1, 0, [square(0, 0), square(1, 0), square(40, 40)], [0.9, 0.8, 0.4]),
            prediction_row(1, 1, [square(20, 1), square(3, 40), square(6, 40)], [0.9, 0.3, 0.9]),
            prediction_row(2, 0, [square(10, 10)], [0.9]),
            prediction_row(2, 1, [square(10, 10)], [0.5]),
        ],
        references=[
            reference_row(1, 0, cats),
            reference_row(1, 1, dogs),
            reference_row(2, 0, [[0, 0, 40, 40]], iscrowd=[1]),
            reference_row(2, 1, []),
        ],
    )
    result = metric.compute()["bbox_confusion"]
    assert result == {
        "concepts": ["cat", "dog"],
        "counts": [
            [1, 1, 1],  # one cat found, one found as a dog and missed as a cat
            [0, 0, 1],  # the dog missed: the detections on it are too weak or too far off
            [1, 2, 0],  # a cat found twice; dogs beside the dog and in the crowd of cats
        ],
    }


def test_precision_over_recall_by_hand(tmp_path):
    """Best first: a hit, a miss, a hit of two objects."""
    metric = PrecisionRecall(("bbox",), NAMES, cache_dir=tmp_path)
    boxes = [square(0, 0), square(0, 40), square(20, 0)]
    metric.add(
        prediction=prediction_row(1, 0, boxes, [0.9, 0.8, 0.7]),
        reference=reference_row(1, 0, [square(0, 0), square(20, 0)]),
    )
    metric.add(prediction=prediction_row(1, 1, [], []), reference=reference_row(1, 1, []))
    curves = metric.compute()["bbox_precision_recall"]
    assert set(curves["precision"]) == {"cat"}  # there is no dog to find
    assert np.allclose(curves["recall"], np.linspace(0, 1, 101))
    assert np.allclose(curves["precision"]["cat"], [1.0] * 51 + [2 / 3] * 50)


@pytest.mark.parametrize("case", ["mixed", "crowded", "tied", "perfect", "nothing_confident"])
def test_curves_and_counts_agree_with_the_scores(case, tmp_path):
    metrics = [kind(cache_dir=tmp_path) for kind in (CocoAP, PrecisionRecall, Confusion)]
    rows = []
    for pair in random_pairs(**CASES[case]):
        ids = pair["image_id"], pair["category"]
        columns = [list(column) for column in zip(*pair["objects"], strict=True)] or [[], [], []]
        masks = np.stack(columns[1]) if columns[1] else np.zeros((0, 40, 56))
        reference = reference_row(*ids, columns[0], masks, columns[2])
        columns = [list(column) for column in zip(*pair["detections"], strict=True)] or [[], [], []]
        masks = np.stack(columns[1]) if columns[1] else np.zeros((0, 40, 56))
        rows.append((prediction_row(*ids, columns[0], columns[2], masks), reference))
    for metric in metrics:
        metric.add_batch(predictions=[row for row, _ in rows], references=[row for _, row in rows])
    coco, curves, confusion = (metric.compute() for metric in metrics)
    for kind in ("bbox", "segm"):
        for name, values in curves[f"{kind}_precision_recall"]["precision"].items():
            assert np.mean(values) == pytest.approx(coco[f"{kind}_per_class"][name]["AP50"])
    counts = np.array(confusion["segm_confusion"]["counts"])
    for index, name in enumerate(confusion["segm_confusion"]["concepts"]):
        assert counts[index, [index, -1]].sum() == coco["segm_per_class"][name]["objects"]
        own = [pair for pair in rows if str(pair[0]["category"]) == name]
        detections = sum(score >= 0.5 for row, _ in own for score in row["scores"])
        if any(1 in row["iscrowd"] for _, row in own):  # some detections may lie there
            assert counts[:, index].sum() <= detections
        else:
            assert counts[:, index].sum() == detections


def test_the_command_gives_the_scores_of_training(folder, data, tmp_path, monkeypatch, caplog):
    result = run("--model", folder, "--data", data, "--output", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 0, result.output
    model = Sam3LiteModel.from_pretrained(folder)
    processor = Sam3LiteProcessor.from_config(model.config)
    dataset = EvalDataset(load_dataset_splits(data)["validation"], 64)
    set_seed(0)
    text, pictures = partial(tokenize, processor.tokenizer), Pictures(tmp_path / "pictures", 2)
    monkeypatch.setattr(loop, "DRAWN_SCORE", 1.5)
    with caplog.at_level("INFO"):
        expected = evaluate(Accelerator(), model, processor, text, dataset, batch_size=4, pictures=pictures)
    said = (
        r"2 of the pictures drawn show objects, and nothing with a score of 1.5; their best scores: 0000.png 0\.\d+ \("
    )
    assert re.search(said, caplog.text) and len(list(pictures.folder.iterdir())) == 2
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["split"], found["images"], found["precision"]) == ("validation", 5, "fp32")
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["segm_per_class"].keys() == {"red circle", "blue circle", "red square"}
    table = result.output.splitlines()
    for name in ("red circle", "blue circle", "red square", "all"):
        assert sum(line.startswith(name) for line in table) == 2  # masks, boxes
    objects = sum(row["objects"] for row in found["segm_per_class"].values())
    assert [line.split()[-1] for line in table if line.startswith("all")] == [str(objects)] * 2
    for name in ("precision_recall.png", "confusion.png"):
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 5  # something is drawn


def test_another_split_and_boxes_alone(folder, data, tmp_path):
    coco = json.loads((data / "train" / "_annotations.coco.json").read_text())
    for annotation in coco["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    (tmp_path / "map.yaml").write_text("red circle: crimson disc\n")
    options = ["--image-folder", data / "train", "--category-map", tmp_path / "map.yaml", "--workers", 0]
    result = run(
        "--model", folder, "--data", tmp_path / "boxes.json", "--split", "train", "--output", tmp_path, *options
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert "segm_AP" not in found and found["images"] == 2 and "crimson disc" in found["bbox_per_class"]
    assert (tmp_path / "confusion.png").exists() and "masks" not in result.output


def test_without_a_validation_split_what_training_held_out_is_scored(folder, tmp_path):
    data = write_dataset(tmp_path / "data", num_train=8, num_valid=2, image_size=64, num_concepts=2)
    shutil.rmtree(data / "valid")
    options = ("--model", folder, "--data", data, "--workers", 0)
    result = run(*options)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "--split takes train, or give --validation-split 0.1 (and --seed), as training was" in result.output
    flags = ["--data", str(data), "--validation_split", "0.25", "--seed", "3"]
    _, held_out = load_data(Accelerator(), parse_arguments(flags), 64)
    rows = load_split(str(data), "validation", None, None, 0.25, 3)
    assert rows["file_name"] == held_out.rows["file_name"] and len(rows) == 2
    rest = load_split(str(data), "train", None, None, 0.25, 3)
    assert set(rest["file_name"]).isdisjoint(rows["file_name"]) and len(rest) == 6
    result = run(*options, "--validation_split", 0.25, "--seed", 3, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 2
    assert "--validation-split 1 must be above 0" in run(*options, "--validation-split", 1).output


def test_nothing_is_held_out_beside_a_validation_split(folder, data):
    result = run("--model", folder, "--data", data, "--validation-split", 0.1)
    assert result.exit_code == 1 and "has a validation split, training holds nothing out: leave" in result.output


def test_a_fixed_vocabulary(folder, data, tmp_path):
    """The same scores with the words that it has, and one line about those that it lacks."""
    words = ["red square", "blue circle", "red circle"]
    for name, classes in (("whole", None), ("all", words), ("some", words[:2])):
        model = Sam3LiteModel.from_pretrained(folder)
        processor = Sam3LiteProcessor.from_config(model.config)
        if classes is not None:
            model.freeze_vocabulary(classes, processor)
        model.save_pretrained(tmp_path / name)
        result = run("--model", tmp_path / name, "--data", data, "--output", tmp_path / name, "--workers", 0)
        if name == "some":
            assert result.exit_code == 1 and "Error: 'red circle': not in the fixed vocabulary" in result.output
            assert "'red square', 'blue circle'" in result.output
        else:
            assert result.exit_code == 0, result.output
    whole, frozen = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "all"))
    assert frozen["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert frozen["segm_per_class"].keys() == whole["segm_per_class"].keys()


def test_errors_are_one_line(folder, data, tmp_path):
    for arguments, message in (
        (["--model", folder, "--data", data, "--split", "test"], "no split test: --split takes train, validation"),
        (["--model", folder, "--data", tmp_path / "nowhere"], "nowhere"),
        (["--model", tmp_path, "--data", data], str(tmp_path)),
        (["--model", folder, "--data", data, "--output", folder / "config.json"], "no folder that can be written"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.output and "Traceback" not in result.output
        assert result.output.strip().splitlines()[-1].startswith("Error: ")


def test_pictures_of_many_concepts(tmp_path):
    names = [f"concept {number}" for number in range(60)]
    counts = np.eye(61, dtype=int) * 5
    plot_confusion({"concepts": names, "counts": counts.tolist()}, "many", tmp_path / "confusion.png")
    curves = {"recall": [0, 0.5, 1], "precision": {name: [1, 0.5, 0] for name in names}}
    plot_precision_recall(curves, "many", tmp_path / "curves.png")
    plot_precision_recall({"recall": [0, 1], "precision": {}}, "none", tmp_path / "none.png")
    assert all(max(Image.open(path).size) <= 2000 for path in tmp_path.glob("*.png"))


def test_a_concept_has_one_row_whatever_its_name():
    row = dict.fromkeys(COLUMNS, 0.25) | {"objects": 3, "pairs": 2, "positive_pairs": 1}
    about = {"model": "me/model", "data": "data", "split": "test", "images": 2}
    lines = table({**about, "bbox_per_class": {"cat": row, "two\nlines\x1b": row}, "bbox_AP": -1.0}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["boxes", "cat", "two", "all"] and "two lines  " in lines[4]
    assert len(set(map(len, lines[2:]))) == 1 and lines[-1].split()[1:] == ["-"] * 7 + ["6"]
