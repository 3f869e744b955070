"""benchmarks/deployment.py: its rows, and that results add up. No test asks how long anything took."""

import argparse
import json
import sys

import deployment
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
