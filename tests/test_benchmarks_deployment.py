"""benchmarks/deployment.py: its rows, and that results add up. No test asks how long anything took."""

import argparse
import json
import math
import sys
from types import SimpleNamespace

import deployment
import deployment_scores
import pytest


def test_rows_are_read():
    assert deployment.read_row("stock-standard/pytorch-fp32") == ("stock-standard", "pytorch", "fp32")
    assert deployment.read_row("lite/onnx-int8-weights") == ("lite", "onnx", "int8-weights")


@pytest.mark.parametrize("text", ["lite", "lite/onnx", "lite/onnx-bf16", "lite/mnn-fp32", "/onnx-fp32"])
def test_what_is_no_row_is_said(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no MODEL/RUNTIME-PRECISION"):
        deployment.read_row(text)


def test_runs_are_added(tmp_path):
    for number in range(2):
        deployment.add_run(tmp_path / "new" / "out.json", {"rows": [number]})
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"runs": [{"rows": [0]}, {"rows": [1]}]}


@pytest.mark.parametrize(("seconds", "counts"), [(math.inf, [3, 3]), (-1, [1])])
def test_rounds_end_when_there_are_enough_or_the_time_is_up(monkeypatch, seconds, counts):
    monkeypatch.setattr(deployment, "ask", lambda worker, kind: (worker, kind))
    arguments = argparse.Namespace(warmup=1, rounds=3, seconds=seconds)
    found = deployment.take_turns(["first", "second"], arguments)
    assert [len(times) for times in found.values()] == counts
    assert found["model"][0] == [("first", "model"), ("second", "model")]


def test_the_table_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(arguments):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((arguments.image_size, arguments.prompts, arguments.threads, arguments.rows[-1]))
        return [{"row": deployment.name_of(row)} for row in arguments.rows]

    def run(minutes: float):
        options = ["--table", "--minutes", str(minutes), "--output", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["deployment.py", *options])
        deployment.main()

    monkeypatch.setattr(deployment, "measure", measure)
    monkeypatch.setattr(deployment, "environment", dict)
    with pytest.raises(KeyboardInterrupt):
        run(math.inf)
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 5
    run(-1)
    assert len(measured) == 5 and "67 of 72 rows at most are left" in capsys.readouterr().out
    measured.insert(0, None)
    run(math.inf)
    assert len(set(measured)) == 1 + 72
    run(math.inf)
    assert len(measured) == 1 + 72


def test_what_rows_of_scores_leave_in_float():
    def in_float(row: str, name: str) -> bool:
        node = SimpleNamespace(name=name, op_type="MatMul", input=["x", "y" if "matmul" in name else "weight"])
        graph = "masks" if name.startswith("mask") else "detector"
        predicate = deployment_scores.ways(["vision", "detector", "masks"])[row].get(graph)
        return predicate is None or predicate(node, {"weight"})

    names = ("dot_product_scoring.text_proj/MatMul", "mask_decoder.mask_embedder/MatMul", "mask_decoder/matmul")
    names += ("detr_encoder.layers.0.mlp.fc1/MatMul",)
    assert [in_float("onnx-int8", name) for name in names] == [True, True, True, False]
    assert [in_float("onnx-int8 with scoring", name) for name in names] == [False, True, True, False]
    assert [in_float("onnx-int8 with products of the mask head", name) for name in names] == [True, True, False, False]
    assert [in_float("onnx-int8 of masks alone", name) for name in names] == [True, True, True, True]
    assert "onnx-int8 with products of the mask head" not in deployment_scores.ways(["vision", "detector"])


def test_scores_are_compared_by_sets_of_pictures():
    sets = [[0.5, 0.4, 0.5], [0.55, 0.4, 0.5]]
    rows = {
        name: {"segm_AP": 0.5, "bbox_AP": 0.4, "sets": [{"segm_AP": value} for value in values]}
        for name, values in zip(("onnx-fp32", "onnx-int8"), sets, strict=True)
    }
    first, second = deployment_scores.compared(rows)
    assert first["mean of sets"] == 0 and second["segm_AP, % more than onnx-fp32"] == 0
    assert second["mean of sets"] == pytest.approx(10 / 3) and second["standard error"] == pytest.approx(10 / 3)
    assert second["deviation of a set"] == pytest.approx(10 / 3**0.5)


@pytest.mark.slow
def test_rows_are_compared_by_turns(tmp_path, monkeypatch):
    rows = ["stock-tiny/pytorch-fp32", "tiny/pytorch-fp32", "tiny/onnx-int8", "tiny/openvino-fp32"]
    options = ["--image-size", "96", "--prompts", "2", "--rounds", "2", "--folder", tmp_path / "work"]
    command = ["deployment.py", "--rows", *rows, *options, "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    deployment.main()
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [row["row"] for row in run["rows"]] == rows and run["settings"]["prompts"] == 2
    for row in run["rows"]:
        assert row["model s"] > 0 and row["end to end s"] > 0 and row["peak MB"] > 100
    assert run["rows"][0]["model, times as fast"] == 1 and run["rows"][0]["file MB"] is None
    assert run["rows"][2]["file MB"] < 0.5 * run["rows"][3]["file MB"]
