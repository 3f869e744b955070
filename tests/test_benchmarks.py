"""The benchmarks run as their users run them, at sizes that take seconds."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import parts
import pytest
import torch
from changes import Change

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

PHASES = {"data", "text", "vision", "detector", "loss", "backward", "optimizer"}


def run(script: str, output: Path, *options: str) -> tuple[dict, str]:
    """The JSON file of a benchmark and what it printed."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *options, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads(output.read_text())
    assert record["environment"]["torch"] in result.stdout and record["environment"]["commit"] in result.stdout
    assert {"machine", "transformers", "date"} <= record["environment"].keys()
    assert all(f"| {column} " in result.stdout for column in record["rows"][0])
    return record, result.stdout


def test_train_step(tmp_path):
    models = ["stock-tiny-standard", "tiny"]
    options = ["--models", *models, "--batch-sizes", "1", "--prompts", "2", "--repeats", "1"]
    record, _ = run("train_step", tmp_path / "out.json", *options, "--checkpointing", "off", "on")
    rows = record["rows"]
    assert [(row["model"], row["checkpointing"]) for row in rows] == [
        ("stock-tiny-standard", False),
        ("tiny", False),
        ("tiny", True),
    ]
    for row in rows:
        assert PHASES <= row.keys()
        assert row["images/s"] == pytest.approx(1 / row["seconds"])
        assert all(row[phase] > 0 for phase in PHASES)


def test_inference(tmp_path):
    options = ["--prompts", "2", "--repeats", "1", "--stored-text", "--detections", "2"]
    record, _ = run("inference", tmp_path / "out.json", *options)
    rows = {row["model"]: row for row in record["rows"]}
    assert set(rows) == {"stock-tiny-standard", "tiny", "tiny, stored text"}
    for row in rows.values():
        assert row["model s"] > 0 and 0 < row["end to end p50 s"] <= row["end to end p95 s"]
        assert 0 < row["vision MFU"] < 1


def test_scaling(tmp_path):
    sizes = ["--image-sizes", "128", "--prompts", "1", "3", "--objects", "1", "--queries", "50", "100"]
    record, _ = run("scaling", tmp_path / "out.json", *sizes, "--repeats", "1", "--gpus", "2", "--links", "10")
    flops = {(row["axis"], row["value"]): row.get("TFLOP") for row in record["rows"]}
    assert flops["prompts", 3] > flops["prompts", 1] and flops["queries", 100] > flops["queries", 50]
    assert record["absent_class_over_vision"] > 0 < record["class_over_vision"] and record["complete"]
    (row,) = record["data_parallel"]
    assert row["exchange s"] == pytest.approx(row["gradient MB"] / 1e4)  # half of the gradients each way at n = 2
    assert 0 < row["efficiency, nothing overlapped"] <= row["efficiency, overlapped"] <= 1


def test_loader(tmp_path):
    options = ["--image-size", "96", "--batch-size", "2", "--batches", "2", "--generated-images", "4"]
    record, _ = run("loader", tmp_path / "out.json", "generated", *options, "--workers", "0", "2")
    assert [row["workers"] for row in record["rows"]] == [0, 2]
    assert record["rows"][1]["images/s per process"] == pytest.approx(record["rows"][1]["images/s"] / 2)


def test_counts_of_inference_and_training(tmp_path):
    record, _ = run("counts", tmp_path / "inference.json", "inference", "--prompts", "1", "8", "--kept", "0", "5")
    of = {(row["model"], row["prompts"]): row for row in record["rows"] if row["masks"] == "all"}
    stock, ours = (of[name, 8] for name in ("stock-tiny-standard", "tiny"))
    assert stock["TFLOP"] == pytest.approx(8 * of["stock-tiny-standard", 1]["TFLOP"])
    assert ours["vision TFLOP"] == of["tiny", 1]["vision TFLOP"]
    assert ours["stock / this"] == pytest.approx(stock["TFLOP"] / ours["TFLOP"])
    kept = {row["masks"]: row["TFLOP"] for row in record["rows"] if row["model"] == "tiny" and row["prompts"] == 8}
    assert kept[0] < kept[5] < kept["all"]

    options = ["training", "--models", "tiny", "--precisions", "fp32", "fp16", "--prompts", "2"]
    record, _ = run("counts", tmp_path / "training.json", *options, "--checkpointing", "off", "on")
    memory = {(row["precision"], row["checkpointing"]): row["GB per image"] for row in record["rows"]}
    assert memory["fp16", True] < memory["fp16", False] < memory["fp32", False]


def test_results_are_not_overwritten(tmp_path):
    output = tmp_path / "out.json"
    output.write_text("{}")
    command = [sys.executable, str(BENCHMARKS / "counts.py"), "class", "--models", "tiny", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "exists already" in result.stderr
    assert output.read_text() == "{}"


def test_rows_are_kept_where_a_benchmark_is_ended_early(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from common import parser, reporting

        with reporting(parser("test").parse_args()) as (rows, _):
            rows.append({{"seconds": 1.5}})
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    """
    output = tmp_path / "out.json"
    command = [sys.executable, "-c", textwrap.dedent(script), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 128 + signal.SIGTERM and "| 1.5 |" in result.stdout
    record = json.loads(output.read_text())
    assert record["rows"] == [{"seconds": 1.5}] and record["complete"] is False


def test_the_gpu_script_keeps_to_ten_minutes_and_knows_its_stages(tmp_path):
    script = (BENCHMARKS / "gpu_all.sh").read_text()
    seconds = sum(int(line.split()[1]) for line in script.splitlines() if line.strip().startswith("bench "))
    assert seconds <= 600
    result = subprocess.run(["bash", BENCHMARKS / "gpu_all.sh", tmp_path, "typo"], capture_output=True, text=True)
    assert result.returncode == 1 and "no such stage: typo" in result.stderr


def test_the_benchmarks_take_the_options_of_the_gpu_script(tmp_path, monkeypatch, capsys):
    """Each with one option more, so that it ends where options are read, and with the name of that option alone."""
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$CALLS"\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(recorder), "CALLS": str(tmp_path / "calls")}
    subprocess.run(["bash", BENCHMARKS / "gpu_all.sh", tmp_path / "results"], env=environment, check=True)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert {Path(script).stem for script, *_ in calls} == {"inference", "train_step", "scaling", "loader", "parts"}
    for script, *options in calls:
        monkeypatch.setattr(sys, "argv", [script, *options, "--no-such-option"])
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(Path(script).stem).main()
        assert capsys.readouterr().err.endswith("error: unrecognized arguments: --no-such-option\n"), options


@pytest.fixture(scope="module")
def parts_rows(tmp_path_factory) -> list[dict]:
    return run("parts", tmp_path_factory.mktemp("parts") / "out.json", "--repeats", "1")[0]["rows"]


def test_parts_compute_what_stock_does(parts_rows):
    names = (
        "ViT, neck, vision encoder, text encoder: padding, text encoder: each, DETR encoder, DETR decoder, sub-pixel, "
    )
    names += "pixel decoder, masks: projection, masks of, loss, post-processing"
    for name in names.split(", "):
        passes = {(row["pass"], row["precision"]) for row in parts_rows if row["change"].startswith(name)}
        precisions = {"fp32"} if name in ("loss", "post-processing") else {"fp32", "bf16"}
        once = name.startswith(("text", "masks: ", "post"))
        assert passes == {(p, n) for p in ("forward", "forward + backward")[: 1 if once else 2] for n in precisions}
    for row in parts_rows:
        assert 0 <= row["difference"] <= row["tolerance"] < 1
        assert (row["gradients"] is None) == (row["kept"] is None) == (row["pass"] == "forward")
        assert row["gradients"] is None or 0 <= row["gradients"] <= row["tolerance"]
        assert row["time"] == pytest.approx(row["stock s"] / row["our s"])


def test_parts_save_what_they_claim(parts_rows):
    claimed = set()
    for row in parts_rows:
        claims = row["claims"].split(", ") if row["claims"] else []
        assert all(row[claim] > 1 for claim in claims), row
        claimed |= {row["change"]} if claims else set()
    assert claimed == {row["change"] for row in parts_rows}
    of = {row["change"].split(":")[0]: row for row in parts_rows if row["pass"] == "forward"}
    assert of["vision encoder once per image"]["FLOP"] == pytest.approx(4, rel=0.01)  # prompts
    assert of["sub-pixel convolution of an upsampled map"]["FLOP"] == 9 / 4
    assert of["masks of 5 matched queries instead of all"]["FLOP"] > 50 / 5


def test_a_change_is_counted_and_compared():
    """The stock way takes a matrix product that nothing reads; figures by hand."""
    first, second = torch.randn(8, 16), torch.randn(16, 4, requires_grad=True)

    def product(times: int, scale: float) -> list[torch.Tensor]:
        results = [first @ second for _ in range(times)]
        return [results[0] * results[1] * scale]

    def ways(scale: float) -> list[parts.Way]:
        change = Change("two for three", lambda: product(3, 1), lambda: product(2, scale), inputs=(second,))
        return [parts.Way(way, change, None, "fp32", training=True) for way in (change.stock, change.ours)]

    stock, ours = (way.count() for way in ways(1))
    flop, size, result = 2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4), 4 * 8 * 4
    assert stock.numbers["FLOP"] - ours.numbers["FLOP"] == flop
    assert stock.numbers["bytes"] - ours.numbers["bytes"] == size + result
    assert stock.numbers["kernels"] - ours.numbers["kernels"] == 1
    assert ours.numbers["kept"] == 3 * result  # two matrix products, and the output
    assert parts.gradient_difference(ours.gradients, stock.gradients) == 0
    wrong = ways(1.5)[1].count()
    assert parts.difference(wrong.outputs[0], stock.outputs[0]) == pytest.approx(0.5)
    assert parts.gradient_difference(wrong.gradients, stock.gradients) == pytest.approx(0.5)


def test_masks_differ_by_their_pixels():
    stock = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    assert parts.difference(stock.bool(), stock) == 0
    assert parts.difference(torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]]), stock) == 0.5


@pytest.mark.parametrize("found", [{"difference": 0.2}, {"gradients": 0.2}, {"difference": float("nan")}])
def test_parts_tell_what_is_not_equal(found):
    row = {"change": "ViT", "pass": "forward", "precision": "fp32", "difference": 0.0, "gradients": 0.0}
    row["tolerance"] = 0.1
    assert parts.mistakes([row]) == [] and parts.mistakes([{**row, "gradients": None}]) == []
    (line,) = parts.mistakes([{**row, **found}])
    assert line.startswith("ViT (forward, fp32): outputs differ by")
