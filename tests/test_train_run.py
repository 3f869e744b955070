"""The training command itself, on generated pictures and a model of the smallest sizes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import micro_config, shake
from hub_stand_in import TOKEN, HubStandIn
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_cases import MICRO, SCRIPT, command, environment, train_in_two
from train_cases import train as train_with
from typer.testing import CliRunner

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.data.generated import write_dataset

MODULE = ["-m", "sam3_hf.training"]
COMMAND = ["-c", "from sam3_hf.cli import app; app(prog_name='sam3-lite')", "train"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--quiet"]
# The trainer, which sends itself and its data workers a signal after a step, as a terminal and a scheduler do.
SIGNALLED = """
import os, sys
from sam3_hf.training.loop import TrainingLoop
from sam3_hf.training.main import main

number, last = int(sys.argv.pop(1)), int(sys.argv.pop(1))
take_step = TrainingLoop.take_step

def take_step_and_signal(self, batches, stop):
    result = take_step(self, batches, stop)
    if self.step == last:
        os.killpg(0, number)
    return result

TrainingLoop.take_step = take_step_and_signal
sys.exit(main())
"""
PATIENCE = 900  # seconds, for what takes some on an idle machine
OWN = {"num_workers": 0, "batch_size": 2, "prediction_images": 2}  # of the settings


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=12, num_valid=3, image_size=64, num_concepts=3)


def train(folder: Path, data: Path, *flags: str, **settings):
    """Runs to the end; the finished process, with all that it wrote as `stdout`."""
    return train_with(folder, data, *flags, together=True, **{**OWN, **settings})


def start(folder: Path, data: Path, *flags: str, program: list[str] = SCRIPT, **settings) -> subprocess.Popen:
    output = (folder / "output.txt").open("w")
    return subprocess.Popen(
        [sys.executable, *command(folder, data, program, **{**OWN, **settings}), *flags],
        cwd=folder,
        env=environment(),
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def lines_of(folder: Path, kind: str) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, (text for text in lines if text.endswith("\n"))) if line["kind"] == kind]


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(lines_of(folder, "train")) < step:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline, "no such step"
        time.sleep(0.005)


def series(folder: Path) -> list[tuple]:
    """All that is deterministic, step by step; floats as they were written."""
    timings = ("images_per_second", "data_wait", "memory_gb")
    return [
        tuple((key, value) for key, value in line.items() if key not in timings) for line in lines_of(folder, "train")
    ]


INTERRUPTED = {"save_every_steps": 2, "ema_decay": 0.9, "num_workers": 1, "save_every_epochs": 1}
INTERRUPTED |= {"early_score_steps": 4}


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory) -> Path:
    """A run of 12 steps in 2 epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train(folder, data, **INTERRUPTED)
    assert finished.returncode == 0, finished.stdout
    return folder


def test_a_run_leaves_all_it_promises(whole_run):
    run = whole_run / "run"
    state = json.loads((run / "checkpoints" / "last" / "trainer_state.json").read_text())
    assert (state["step"], state["epoch"], state["images_per_step"]) == (12, 2.0, 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best",
        "epoch_1",
        "epoch_2",
        "frozen_text.safetensors",
        "last",
    ]
    assert [line["step"] for line in lines_of(whole_run, "train")] == list(range(1, 13))
    evaluations = lines_of(whole_run, "eval")
    assert [line["step"] for line in evaluations] == [6, 12]
    for name in ("bbox_AP", "segm_AP", "segm_AP50", "segm_cgF1", "IL_MCC", "loss"):
        assert isinstance(evaluations[-1][name], float)
    assert set(evaluations[-1]["segm_per_class"]) == {"red circle", "blue circle", "red square"}
    for epoch in (1, 2):
        pictures = sorted((run / "predictions" / f"epoch_{epoch}").iterdir())
        assert [path.name for path in pictures] == ["0000.png", "0001.png"]
        assert Image.open(pictures[0]).size[0] > 512  # prediction and truth side by side
    assert Image.open(run / "curves.png").size[0] > 500
    log = (run / "logs" / "train.log").read_text()
    assert "step 12/12" in log and "blue circle" in log and "segm_AP50" in log
    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    assert len(curves.Scalars("train/loss")) == 12 and len(curves.Scalars("eval/segm_AP")) == 2
    assert [event.step for event in curves.Scalars("early/loss")] == [0, 4, 8]
    assert [event.step for event in curves.Images("predictions/0001")] == [6, 12]
    assert any(name.startswith("eval_segm_per_class/AP/") for name in curves.Tags()["scalars"])


def test_final_model_is_half_precision_and_holds_the_average(whole_run):
    run = whole_run / "run"
    model = Sam3LiteModel.from_pretrained(run / "final")
    assert model.dtype == torch.float16
    assert "segm_AP50" in (run / "final" / "README.md").read_text()
    best = json.loads((run / "checkpoints" / "best" / "trainer_state.json").read_text())["best"]
    assert best["value"] == max(line["segm_AP"] for line in lines_of(whole_run, "eval"))

    expected = load_file(run / "checkpoints" / "best" / "ema.safetensors")
    expected |= load_file(run / "checkpoints" / "frozen_text.safetensors")
    found = model.state_dict()
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.half()), name

    processor = Sam3LiteProcessor.from_pretrained(run / "final")
    inputs = processor(images=Image.new("RGB", (50, 40)), text="red circle")
    with torch.no_grad():
        outputs = model.float().eval()(**inputs)
    assert outputs.pred_masks.shape[:2] == (1, MICRO["detr_decoder_config"]["num_queries"])


def test_the_final_model_scores_as_in_training(whole_run, data, tmp_path):
    """Up to the rounding of its weights to FP16; the card has the scores, and no licence of Meta's."""
    options = ["--model", whole_run / "run" / "final", "--data", data, "--output", tmp_path]
    result = CliRunner().invoke(app, ["evaluate", *map(str, options), "--workers", "0", "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "metrics.json").read_text())
    provenance = json.loads((whole_run / "run" / "final" / "provenance.json").read_text())
    expected = provenance["best"]["scores"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    for name in ("segm_AP", "bbox_AP50", "segm_cgF1", "IL_MCC"):
        assert found[name] == pytest.approx(expected[name], abs=0.02)
    assert provenance["arguments"]["epochs"] == 2 and provenance["dataset"]["training images"] == 12
    card = ModelCard.load(whole_run / "run" / "final" / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["segm_AP"] == round(expected["segm_AP"], 4) and card.data.license is None
    assert Image.open(whole_run / "run" / "final" / "example.png").size[0] > 512
    assert (whole_run / "run" / "final" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_pushed_at_the_end(data, tmp_path, monkeypatch):
    """A standard model is mapped, trained and pushed; while the Hub fails, the run's results stay and it says how."""
    standard = shake(Sam3LiteModel(micro_config(detr_decoder_layers=3)))
    standard.to_sam3().save_pretrained(tmp_path / "standard")
    flags = ["--push_to_hub", "true", "--hub_model_id", "me/mine", "--hub_private", "true", "--max_steps", "1"]
    flags += ["--hub_gated", "auto"]
    flags += ["--init", "standard", "--overwrite_output_dir"]
    with HubStandIn() as hub:  # whose address is read at import
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        hub.failures["POST .*/commit/"] = 403
        finished = train(tmp_path, data, *flags, fresh=True)
        assert finished.returncode == 0, finished.stdout
        assert "sam3-lite push run/final me/mine --private --gated auto" in finished.stdout
        assert len(hub.repositories["me/mine"].branches["main"]) == 1
        assert Sam3LiteModel.from_pretrained(tmp_path / "run" / "final").dtype == torch.float16
        hub.failures.clear()
        finished = train(tmp_path, data, *flags, fresh=True)
        assert finished.returncode == 0, finished.stdout
        repository = hub.repositories["me/mine"]
    assert repository.private and repository.gated == "auto" and len(repository.branches["main"]) == 2
    files = repository.branches["main"][-1].files
    assert {name: (tmp_path / "run" / "final" / name).read_bytes() for name in files if name != "README.md"} == {
        name: content for name, content in files.items() if name != "README.md"
    }
    assert {"mapping_report.json", "provenance.json", "metrics.jsonl", "example.png", "LICENSE"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license_name == "sam-license" and "started from `standard`" in card.text


def test_killed_twice_and_resumed_is_as_if_nothing_had_happened(whole_run, data, tmp_path):
    killed = train(tmp_path, data, program=["-c", SIGNALLED, str(int(signal.SIGKILL)), "3"], **INTERRUPTED)
    assert killed.returncode == -signal.SIGKILL
    assert len(lines_of(tmp_path, "train")) == 2
    program = ["-c", SIGNALLED, str(int(signal.SIGTERM)), "8"]
    stopped = train(tmp_path, data, "--resume", "auto", program=program, **INTERRUPTED)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "run the same command with --resume auto" in stopped.stdout
    last = json.loads((tmp_path / "run" / "checkpoints" / "last" / "trainer_state.json").read_text())["step"]
    assert last == 9  # the step that was in progress
    finished = train(tmp_path, data, "--resume", "auto", program=COMMAND, fresh=True, **INTERRUPTED)
    assert finished.returncode == 0, finished.stdout
    assert f"going on from run/checkpoints/last, step {last}" in finished.stdout
    assert series(tmp_path) == series(whole_run)
    for kind in ("eval", "early"):
        assert lines_of(tmp_path, kind) == lines_of(whole_run, kind)
    for name in ("final/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/ema.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole_run / "run" / name).read_bytes(), name


@pytest.mark.slow
def test_a_stop_during_an_evaluation_ends_it(data, tmp_path):
    """The epoch was saved before; the resumed run makes up for the evaluation and keeps its result."""
    valid = write_dataset(tmp_path / "many", num_train=1, num_valid=300, image_size=64, num_concepts=3) / "valid"
    flags = ["--data", str(data / "train" / "_annotations.coco.json")]
    settings = {"batch_size": 12, "epochs": 1, "eval_batch_size": 1, "prediction_images": 1}
    many, few = (["--validation_data", str(path / "_annotations.coco.json")] for path in (valid, data / "valid"))
    process = start(tmp_path, data, *flags, *many, **settings)
    picture = tmp_path / "run" / "predictions" / "epoch_1" / "0000.png"
    deadline = time.monotonic() + PATIENCE
    while not picture.exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.005)
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    last = tmp_path / "run" / "checkpoints" / "last" / "trainer_state.json"
    state = json.loads(last.read_text())
    assert (state["step"], state["evaluated"]) == (1, 0)
    assert not (tmp_path / "run" / "final").exists() and not lines_of(tmp_path, "eval")
    finished = train(tmp_path, data, "--resume", "auto", *flags, *few, **settings)
    assert finished.returncode == 0, finished.stdout
    state = json.loads(last.read_text())
    assert (state["evaluated"], state["best"]["step"]) == (1, 1)
    assert len(lines_of(tmp_path, "eval")) == 1
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_a_run_whose_launcher_is_killed_stops_and_goes_on_later(data, tmp_path):
    """Each step is an epoch: the run stops before an evaluation is due, which the resumed run makes up for."""
    settings = {"batch_size": 12, "epochs": 100, "save_every_epochs": 0, "prediction_images": 0}
    process = start(tmp_path, data, program=[*LAUNCH, *MODULE], **settings)
    try:
        wait_for_step(tmp_path, process, 2)
        process.terminate()  # the launcher alone
        assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
        log, deadline = tmp_path / "run" / "logs" / "train.log", time.monotonic() + PATIENCE
        while "run the same command with --resume auto" not in log.read_text():
            assert time.monotonic() < deadline, "the run went on without its launcher"
            time.sleep(0.05)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of them have ended
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "trainer_state.json").read_text())
    stopped = state["step"]
    assert (stopped, state["evaluated"]) == (len(lines_of(tmp_path, "train")), stopped - 1)
    finished = train(tmp_path, data, "--resume", "auto", "--max_steps", str(stopped + 1), **settings)
    assert finished.returncode == 0, finished.stdout
    assert [line["step"] for line in lines_of(tmp_path, "eval")] == list(range(1, stopped + 2))


@pytest.mark.slow
def test_predictions_that_are_not_finite_name_the_images(whole_run, data, tmp_path):
    final = shutil.copytree(whole_run / "run" / "final", tmp_path / "broken")
    weights = load_file(final / "model.safetensors")
    name = next(name for name in weights if name.startswith("detr_decoder.") and name.endswith("weight"))
    weights[name] = torch.full(weights[name].shape, 3e38)  # finite, as weights must be, but not what comes of them
    save_file(weights, final / "model.safetensors", metadata={"format": "pt"})
    flags = ["--init", str(final), "--negative_ratio", "0"]
    failed = train(tmp_path, data, *flags, model_overrides={}, batch_size=12)
    assert failed.returncode != 0
    message = failed.stdout.splitlines()[-1]
    assert message.startswith("Error: step 1 failed: predicted logits and boxes are not finite"), failed.stdout
    named = re.search(r"ids of the images: \[([\d, ]+)\]", message).group(1)
    coco = json.loads((data / "train" / "_annotations.coco.json").read_text())
    assert sorted(map(int, named.split(", "))) == sorted(image["id"] for image in coco["images"])
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


@pytest.mark.slow
def test_each_way_to_start_shows_its_own_usage():
    for program, name in ((COMMAND, "sam3-lite train"), (MODULE, "accelerate launch -m sam3_hf.training")):
        shown = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, timeout=PATIENCE)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"usage: {name} [CONFIG.yaml] [--flag value ...]")
        assert "--preset" in shown.stdout


def test_other_commands_do_without_the_libraries_of_the_trainer():
    """And `train` says what to install where they are missing."""
    code = """
import sys
sys.modules["tensorboard"] = None  # as if it were not installed
from sam3_hf.cli import app
print([name for name in ("sam3_hf.training", "sam3_hf.evaluation", "datasets") if name in sys.modules])
app(["train", "config.yaml"])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert finished.returncode == 2
    assert finished.stdout.strip() == "[]"
    (line,) = finished.stderr.splitlines()
    assert line == 'Error: tensorboard is not installed; training needs pip install "sam3-hf[train]".'


def test_a_run_is_not_overwritten_by_accident(whole_run, data):
    before = (whole_run / "run" / "metrics.jsonl").read_text()
    refused = train(whole_run, data)
    assert refused.returncode != 0
    assert "already holds a run: add --resume auto" in refused.stdout
    other = train(whole_run, data, "--resume", "auto", "--seed", "1", "--num_classes", "3")
    assert other.returncode == 2 and "unknown argument: --num_classes" in other.stdout
    assert (whole_run / "run" / "metrics.jsonl").read_text() == before


def test_two_processes_train_like_one(data, tmp_path):
    """The same images per step spread over two processes; without mask losses, which sample points at random."""
    settings = {"epochs": 1, "train_text_encoder": True, "mask_focal_loss_weight": 0.0, "mask_dice_loss_weight": 0.0}
    settings["early_score_steps"] = 1
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    finished = train(one, data, **settings, batch_size=4)
    assert finished.returncode == 0, finished.stdout
    finished = train_in_two(two, data, together=True, **{**OWN, **settings, "batch_size": 2})
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("steps in all") == 1  # only the main process speaks
    assert "2 per pass x 1 passes x 2 processes" in finished.stdout
    expected, found = series(one), series(two)
    assert len(found) == 3
    for mine, other in zip(found, expected, strict=True):
        assert dict(mine)["loss"] == pytest.approx(dict(other)["loss"], rel=1e-5)
    assert dict(found[0])["grad_norm"] == pytest.approx(dict(expected[0])["grad_norm"], rel=1e-5)
    for kind in ("early", "eval"):
        for mine, other in zip(lines_of(two, kind), lines_of(one, kind), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert [line["step"] for line in lines_of(two, "early")] == [0, 1, 2]
    per_class = lines_of(two, "eval")[0]["segm_per_class"]
    assert sum(values["pairs"] for values in per_class.values()) == 9  # 3 images x 3 concepts, each once
    assert (two / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_precision_accumulation_and_checkpointing_run_on_a_cpu(data, tmp_path):
    """FP16 falls back to float32, which is said once; the overflow counter stays at 0; bf16 really is bf16."""
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "batch_size": 1}
    finished = train(tmp_path, data, "--mixed_precision", "fp16", **settings)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("FP16 training needs a GPU") == 1
    whole = series(tmp_path)
    finished = train(tmp_path, data, "--overwrite_output_dir", max_steps=2, batch_size=2)
    assert finished.returncode == 0, finished.stdout
    for mine, other in zip(whole, series(tmp_path), strict=True):  # accumulated: normalised per pass, so only alike
        assert dict(mine)["loss"] == pytest.approx(dict(other)["loss"], rel=0.3)
        assert dict(mine)["overflows"] == 0
    finished = train(tmp_path, data, "--overwrite_output_dir", "--mixed_precision", "bf16", max_steps=1)
    assert finished.returncode == 0, finished.stdout
    assert dict(series(tmp_path)[0])["loss"] != dict(whole[0])["loss"]


def test_a_final_model_starts_the_next_run(whole_run, data, tmp_path):
    """Boxes only, from the exported weights, with another category map and image size; stops with a clear error."""
    coco = json.loads((data / "train" / "_annotations.coco.json").read_text())
    for annotation in coco["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    (tmp_path / "map.yaml").write_text("red circle: crimson disc\n")
    (tmp_path / "words.txt").write_text("elephant\n\nteapot\n")
    flags = ["--data", "boxes.json", "--validation_data", "boxes.json", "--image_folder", str(data / "train")]
    flags += [
        "--init",
        str(whole_run / "run" / "final"),
        "--category_map",
        "map.yaml",
        "--negative_words",
        "words.txt",
    ]
    flags += ["--box_prompt_probability", "0.5", "--max_steps", "1", "--image_size", "128"]
    finished = train(tmp_path, data, *flags, model_overrides={})
    assert finished.returncode == 0, finished.stdout
    evaluation = lines_of(tmp_path, "eval")[0]
    assert "segm_AP" not in evaluation and "crimson disc" in evaluation["bbox_per_class"]
    model = Sam3LiteModel.from_pretrained(tmp_path / "run" / "final")
    assert model.config.image_size == 128
    assert model.config.vision_config.backbone_config.hidden_size == 32
