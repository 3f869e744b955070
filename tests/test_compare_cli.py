"""`sam3-lite compare`."""

import json

import numpy as np
import pytest
import torch
from conftest import micro_config, run, shake
from PIL import Image

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.commands.compare import table
from sam3_hf.data.generated import write_dataset
from sam3_hf.evaluation import prediction_row
from sam3_hf.evaluation.compare import agreement


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=1, num_valid=5, image_size=64, num_concepts=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model at another resolution."""
    torch.manual_seed(1)
    model = shake(Sam3LiteModel(micro_config(image_size=96)), seed=1).eval()
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(folder)
    return folder


def test_two_models_have_the_scores_that_evaluate_gives_each(saved, other, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sam3_hf.evaluation.compare.DRAWN_SCORE", 0.0)
    out = tmp_path / "out"
    result = run(
        "compare", saved, other, "--data", data, "--output", out, "--pictures", 3, "--batch-size", 2, "--workers", 0
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "comparison.json").read_text())
    assert [one["model"] for one in found["models"]] == [str(saved), str(other)]
    for one in found["models"]:
        result_of_one = run("evaluate", "--model", one["model"], "--data", data, "--output", tmp_path, "--workers", 0)
        assert result_of_one.exit_code == 0, result_of_one.output
        scores = json.loads((tmp_path / "metrics.json").read_text())
        for name in ("segm_AP", "bbox_AP", "segm_cgF1", "IL_MCC"):
            assert one["scores"][name] == pytest.approx(scores[name], rel=1e-4), name
        assert one["seconds_per_image"] > 0 and one["precision"] == "fp32"
        size = sum(
            path.stat().st_size for path in (saved if one is found["models"][0] else other).glob("*.safetensors")
        )
        assert one["bytes"] == size and 0.5e6 < one["parameters"] < 2e6
    differences = [entry["by_a_alone"] + entry["by_b_alone"] for entry in found["pictures"]]
    assert len(differences) == 3 and differences == sorted(differences, reverse=True)
    for entry in found["pictures"]:
        assert np.asarray(Image.open(out / entry["picture"])).std() > 10
    for start in ("A: ", "B: ", "masks AP ", "boxes cgF1", "parameters, M", "size, MB", "time per image, ms", "red "):
        assert any(line.startswith(start) for line in result.stdout.splitlines()), start
    assert all(entry["file_name"] in result.output for entry in found["pictures"])


def test_a_model_does_not_differ_from_itself(saved, data, tmp_path):
    result = run("compare", saved, saved, "--data", data, "--output", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["pictures"] == [] and found["models"][0]["scores"] == found["models"][1]["scores"]
    assert "differ most" not in result.output and "+0.000" in result.output


def test_the_table_tells_revisions_apart():
    scores = {"bbox_AP": 0.5, "bbox_per_class": {"cat": {"AP": 0.5}}}
    one = {"model": "me/model", "precision": "fp32", "parameters": None, "bytes": 1, "seconds_per_image": 1}
    models = [{**one, "scores": scores, "revision": revision} for revision in ("main", "v2")]
    found = {"models": models, "images": 1, "concepts": 1, "data": "data", "split": "test", "device": "cpu"}
    assert table(found | {"pictures": []}).splitlines()[:2] == ["A: me/model, fp32", "B: me/model@v2, fp32"]


def test_agreement_by_hand():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    first = prediction_row(1, 0, boxes, [0.9, 0.8, 0.2])
    moved = prediction_row(1, 0, [[2, 0, 12, 10], [26, 0, 36, 10], [40, 0, 50, 10]], [0.9, 0.8, 0.4])
    nothing = prediction_row(1, 0, [], [])
    assert agreement(first, first, with_masks=False) == (2, 0, 0)
    assert agreement(first, moved, with_masks=False) == (1, 1, 2)  # 8 of 12 pixels, 4 of 16, and what is below 0.3
    assert agreement(first, nothing, with_masks=False) == (0, 2, 0)
    masks = np.zeros((2, 12, 60), bool)
    masks[0, :10, :10], masks[1, :10, 20:30] = True, True
    same = prediction_row(1, 0, boxes[:2], [0.9, 0.8], masks)
    assert agreement(same, prediction_row(1, 0, boxes[:1], [0.5], masks[:1]), with_masks=True) == (1, 1, 0)


def test_errors_are_one_line(saved, data, tmp_path):
    model = Sam3LiteModel.from_pretrained(saved)
    model.freeze_vocabulary(["red circle"], Sam3LiteProcessor.from_config(model.config))
    model.save_pretrained(tmp_path / "fixed")
    for arguments, message in (
        ((saved, tmp_path / "fixed", "--data", data), f"{tmp_path / 'fixed'}: 'blue circle': not in the fixed"),
        ((saved, tmp_path / "nowhere", "--data", data), "nowhere"),
        ((saved, saved, "--data", data, "--split", "test"), "no split test: --split takes train, validation"),
    ):
        result = run("compare", *arguments)
        assert result.exit_code == 1 and message in result.output, result.output
        assert result.output.strip().splitlines()[-1].startswith("Error: ")
