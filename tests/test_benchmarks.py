"""The benchmarks run with the options of their users, at small sizes; no test asks how long anything took."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import common
import parts
import pytest
import torch
import warm
from changes import Change
from conftest import HUNG
from counting import flops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

PHASES = {"data", "text", "vision", "detector", "loss", "backward", "optimizer"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., dict]:
    """Runs a benchmark in this process, without a GPU; the JSON file that it wrote."""

    def run(script: str, *options: str) -> dict:
        output = tmp_path_factory.mktemp(script) / "out.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *options, "--output", str(output)])
            patch.setattr(torch.cuda, "is_available", lambda: False)
            # `reporting` takes SIGTERM, which is pytest's here.
            patch.setattr(common, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=signal.SIGTERM))
            importlib.import_module(script).main()
        return json.loads(output.read_text())

    return run


def counted(folder: Path, *runs: list[str]) -> tuple[list[list[dict]], str]:
    """
    The rows of each of the runs of counts.py, and what they printed. They have a process of their own, where the fake
    tensors stay that they leave in caches.
    """
    outputs = [folder / f"{number}.json" for number in range(len(runs))]
    code = "import counts, sys"
    for options, output in zip(runs, outputs, strict=True):
        code += f"\nsys.argv = {['counts.py', *options, '--output', str(output)]}\ncounts.main()"
    printed = in_a_process(code)
    return [json.loads(output.read_text())["rows"] for output in outputs], printed


def in_a_process(code: str) -> str:
    """What Python code that imports benchmarks prints."""
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HUNG)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def read_clock(monkeypatch, read: Callable[[], float]) -> None:
    """The benchmarks take the time from `read`, in seconds."""
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=read))


@pytest.fixture
def work_clock(monkeypatch):
    """A clock that an operation of a matrix product or convolution moves by a second, and nothing else."""
    with flops() as counter:
        read_clock(monkeypatch, counter.get_total_flops)
        yield


def test_train_step(run, monkeypatch):
    ticks = itertools.count()
    read_clock(monkeypatch, lambda: next(ticks))  # a second per reading: what is timed takes one
    models = ["stock-tiny-standard", "tiny"]
    options = ["--models", *models, "--batch-sizes", "1", "--prompts", "2", "--repeats", "1"]
    rows = run("train_step", *options, "--checkpointing", "off", "on")["rows"]
    assert [(row["model"], row["checkpointing"]) for row in rows] == [
        ("stock-tiny-standard", False),
        ("tiny", False),
        ("tiny", True),
    ]
    for row in rows:
        assert row["seconds"] == row["images/s"] == 1
        phases = {phase: row[phase] for phase in PHASES}
        assert phases.pop("detector") == 3  # five of the forward pass, which is read at the ends of two others
        assert set(phases.values()) == {1}


@pytest.mark.slow
def test_inference(run, work_clock):
    options = ["--prompts", "2", "--repeats", "1", "--stored-text", "--detections", "2"]
    record = run("inference", *options)
    rows = {row["model"]: row for row in record["rows"]}
    assert set(rows) == {"stock-tiny-standard", "tiny", "tiny, stored text"}
    assert record["ceiling_tflops"] == 1e-12  # an operation per second
    for row in rows.values():
        assert row["vision MFU"] == 1 and row["vision s"] == row["vision TFLOP"] * 1e12
        assert row["vision s"] < row["model s"] <= row["end to end p50 s"] == row["end to end p95 s"]
    assert rows["tiny, stored text"]["model s"] < rows["tiny"]["model s"]
    assert rows["stock-tiny-standard"]["model s"] > 2 * rows["stock-tiny-standard"]["vision s"]  # once per prompt
    assert rows["tiny"]["pipeline p50 s"] < rows["tiny"]["end to end p50 s"]  # masks of what is kept alone


@pytest.mark.slow
def test_scaling(run, work_clock):
    sizes = ["--image-sizes", "128", "--prompts", "1", "3", "--objects", "1", "--queries", "50", "100"]
    record = run("scaling", *sizes, "--repeats", "1", "--gpus", "2", "--links", "10")
    rows = {(row["axis"], row["value"]): row for row in record["rows"]}
    flops = {key: row.get("TFLOP") for key, row in rows.items()}
    assert flops["prompts", 3] > flops["prompts", 1] and flops["queries", 100] > flops["queries", 50]
    class_flops = (flops["prompts", 3] - flops["prompts", 1]) / 2 * 1e12
    assert record["class_over_vision"] == pytest.approx(class_flops / rows["prompts", 1]["vision s"])
    assert 0 < record["absent_class_over_vision"] < record["class_over_vision"] and record["complete"]
    (row,) = record["data_parallel"]
    assert row["exchange s"] == pytest.approx(row["gradient MB"] / 1e4)  # half of the gradients each way at n = 2
    assert 0 < row["efficiency, nothing overlapped"] <= row["efficiency, overlapped"] <= 1


def test_loader(run):
    options = ["--image-size", "96", "--batch-size", "2", "--batches", "2", "--generated-images", "4"]
    rows = run("loader", "generated", *options, "--workers", "0", "2")["rows"]
    assert [row["workers"] for row in rows] == [0, 2]
    assert rows[1]["images/s per process"] == pytest.approx(rows[1]["images/s"] / 2)


@pytest.mark.slow
def test_counts_of_inference(tmp_path):
    (rows,), printed = counted(tmp_path, ["inference", "--prompts", "1", "8", "--kept", "0", "5"])
    assert all(f"| {column} " in printed for column in rows[0])
    of = {(row["model"], row["prompts"]): row for row in rows if row["masks"] == "all"}
    stock, ours = (of[name, 8] for name in ("stock-tiny-standard", "tiny"))
    assert stock["TFLOP"] == pytest.approx(8 * of["stock-tiny-standard", 1]["TFLOP"])
    assert ours["vision TFLOP"] == of["tiny", 1]["vision TFLOP"]
    assert ours["stock / this"] == pytest.approx(stock["TFLOP"] / ours["TFLOP"])
    kept = {row["masks"]: row["TFLOP"] for row in rows if row["model"] == "tiny" and row["prompts"] == 8}
    assert kept[0] < kept[5] < kept["all"]


@pytest.mark.slow
def test_counts_of_training(tmp_path):
    options = ["training", "--models", "tiny", "--prompts", "2", "--precisions"]
    runs = [*options, "fp32"], [*options, "fp16", "--checkpointing", "off", "on"]
    ((whole,), (half, recomputed)), _ = counted(tmp_path, *runs)
    assert recomputed["GB per image"] < half["GB per image"] < whole["GB per image"]
    assert recomputed["TFLOP"] > half["TFLOP"] == whole["TFLOP"]
    assert half["images in 8 GB"] == 2 + (7 - half["GB"] - half["GB per image"]) // half["GB per image"]


@pytest.mark.slow
def test_counts_of_distillation(tmp_path):
    """The teacher is paid for beside the student; with a cache its vision encoder rests, but stays in memory."""
    sizes = ["--models", "tiny", "--prompts", "2", "--precisions", "fp16"]
    runs = ["distillation", *sizes], ["training", *sizes], ["inference", "--models", "tiny-standard", "--prompts", "2"]
    ((live, cached), (alone,), (teacher, *_)), _ = counted(tmp_path, *runs)
    assert (live["cached"], cached["cached"]) == (False, True)
    assert live["TFLOP"] - cached["TFLOP"] == pytest.approx(teacher["vision TFLOP"])
    assert cached["TFLOP"] > alone["TFLOP"] and cached["kernels"] < live["kernels"]
    assert cached["GB"] > alone["GB"] and live["GB"] >= cached["GB"]


@pytest.mark.slow
def test_counts_of_adapters(tmp_path):
    options = ["training", "--models", "tiny", "--prompts", "2", "--precisions", "fp16", "--rank", "4"]
    ((whole, detector, all_parts),) = counted(tmp_path, [*options, "--adapters", "none", "detector", "all"])[0]
    assert 0 < detector["GB per image"] < all_parts["GB per image"] < whole["GB per image"] * 1.5
    assert detector["GB"] < all_parts["GB"] and detector["TFLOP"] < all_parts["TFLOP"]
    assert "rank" not in whole and detector["rank"] == 4


def test_results_are_not_overwritten(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    output.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["counts.py", "class", "--models", "tiny", "--output", str(output)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("counts").main()
    assert capsys.readouterr().err.endswith(f"{output} exists already: choose another name, or delete it\n")
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
    result = warm.run(["-c", textwrap.dedent(script), "--output", output], tmp_path, dict(os.environ))
    assert result.returncode == 128 + signal.SIGTERM and "| 1.5 |" in result.stdout
    record = json.loads(output.read_text())
    assert record["rows"] == [{"seconds": 1.5}] and record["complete"] is False
    assert {"machine", "transformers", "date"} <= record["environment"].keys()
    assert record["environment"]["torch"] in result.stdout and record["environment"]["commit"] in result.stdout


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
def parts_rows(run) -> list[dict]:
    return run("parts", "--repeats", "1")["rows"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_counts_of_a_film(tmp_path):
    """The trunk is shared, the tracker pays for each object; masks of what is not found are not made here."""
    output = tmp_path / "rows.json"
    options = ["--models", "stock-small", "small", "--objects", "1", "3", "--image-size", "336"]
    arguments = ["video_counts.py", *options, "--output", str(output)]
    in_a_process(f"import sys, video_counts\nsys.argv = {arguments}\nvideo_counts.main()")
    stock, ours, _, more = json.loads(output.read_text())["rows"]
    assert ours["trunk TFLOP"] == more["trunk TFLOP"] <= stock["trunk TFLOP"]
    assert ours["detector TFLOP"] < stock["detector TFLOP"] and ours["tracker TFLOP"] == stock["tracker TFLOP"]
    assert more["tracker TFLOP"] == pytest.approx(3 * ours["tracker TFLOP"], rel=0.01)
    assert ours["stock / this"] == pytest.approx(stock["TFLOP"] / ours["TFLOP"])
