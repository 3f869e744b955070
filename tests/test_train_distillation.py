"""The trainer with a teacher, as a process of its own."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import micro_config, shake
from safetensors.torch import load_file, save_file
from train_cases import SCRIPT, TORCHRUN, error_of, launcher, state_of, train

from sam3_hf import Sam3LiteModel
from sam3_hf.data.generated import write_dataset

SETTINGS = {
    "teacher": "teacher",
    "max_steps": 8,
    "batch_size": 2,
    "feature_steps": 0.25,
    "save_every_steps": 3,
    "num_workers": 0,
    "eval_every_epochs": 9,
}
KILLED = """
import signal
from sam3_hf.training.loop import TrainingLoop

take_step = TrainingLoop.take_step

def take_step_and_die(self, batches, stop):
    result = take_step(self, batches, stop)
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

TrainingLoop.take_step = take_step_and_die
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=16, num_valid=2, image_size=64, num_concepts=3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a standard teacher, twice as wide and with a decoder layer more, that sees what it is asked for."""
    torch.manual_seed(0)
    sizes = {"vision_hidden_size": 64, "vision_num_attention_heads": 4, "detr_encoder_layers": 1}
    model = shake(Sam3LiteModel(micro_config(**sizes, detr_decoder_layers=3)))
    with torch.no_grad():
        model.detr_decoder.presence_head.layer3.bias.fill_(2.0)
    model.to_sam3().save_pretrained(tmp_path / "teacher")
    return tmp_path


def make_sure(weights: Path) -> None:
    """Lets a teacher find things, with the highest scores, so that there is something to retain."""
    tensors = load_file(weights)
    for name in ("query_proj", "text_proj"):
        tensors[f"dot_product_scoring.{name}.bias"].fill_(2.0)
    save_file(tensors, weights, {"format": "pt"})


def steps_of(folder: Path, run: str = "run") -> list[dict]:
    """Lines of the training steps, without what depends on the clock."""
    lines = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "data_wait", "memory_gb")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == "train"]


def test_killed_and_resumed_is_as_if_nothing_had_happened(folder, data):
    """With accumulation, averaged weights and labels; the mapping is accounted for, the teacher in no checkpoint."""
    settings = {**SETTINGS, "gradient_accumulation_steps": 2, "ema_decay": 0.9, "label_loss_weight": 0.5}
    (folder / "retain.txt").write_text("teapot\nred circle\nsmall dog\n")
    settings |= {"retain_phrases": "retain.txt", "retain_share": 0.5}
    make_sure(folder / "teacher" / "model.safetensors")
    finished = train(folder, data, **settings, output_dir="whole")
    assert finished.returncode == 0, finished.stderr
    killed = train(folder, data, program=launcher(folder, KILLED), **settings)
    assert killed.returncode == -signal.SIGKILL and len(steps_of(folder)) == 4
    finished = train(folder, data, "--resume", "auto", fresh=True, **settings)
    assert finished.returncode == 0, finished.stderr
    assert "going on from run/checkpoints/last, step 4" in finished.stderr

    steps = steps_of(folder)
    assert steps == steps_of(folder, "whole") and len(steps) == 8
    assert [set(step) & {"distill_features", "distill_boxes", "loss_bbox"} for step in steps[:3]] == [
        {"distill_features"},
        {"distill_features"},
        {"distill_features", "distill_boxes", "loss_bbox"},
    ]
    for name in ("final/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/ema.safetensors"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    lines = list(map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()))
    (before,) = [line for line in lines if line["kind"] == "retention"]
    (evaluation,) = [line for line in lines if line["kind"] == "eval"]
    retained = {name: value for name, value in before.items() if name.startswith("retention_")}
    assert retained["retention_bbox_AP"] >= 0 and retained.keys() <= evaluation.keys()
    provenance = json.loads((folder / "run" / "final" / "provenance.json").read_text())
    assert provenance["retained_before"] == retained
    report = json.loads((folder / "run" / "final" / "mapping_report.json").read_text())
    assert report["layers"]["detr_decoder.layers"] == [0, 2] and report["source"] == "teacher"
    last = folder / "run" / "checkpoints" / "last"
    assert torch.load(last / "objective.pt") == {"layers": [0, 2], "by_number": True}
    student = Sam3LiteModel.from_pretrained(folder / "run" / "final")
    trained = {name for name in student.state_dict() if not name.startswith("text_")}
    assert load_file(last / "model.safetensors").keys() == trained
    assert state_of(last)["origin"]["base"] == "teacher"


STILL = {"crop": 0, "smallest_side": 1, "color_jitter": 0}  # pictures come again, as they are or mirrored


@pytest.mark.slow
def test_with_a_cache_a_run_is_the_same_killed_and_resumed(folder, data):
    """In epochs of two steps, so that pictures come again; the cache is then there for another run."""
    settings = {**SETTINGS, **STILL, "batch_size": 8, "label_loss_weight": 0.5}
    finished = train(folder, data, **settings, output_dir="without")
    assert finished.returncode == 0, finished.stderr
    settings["teacher_cache"] = "cache"
    killed = train(folder, data, program=launcher(folder, KILLED), **settings)
    assert killed.returncode == -signal.SIGKILL
    assert "teacher_cache cache: 32 pictures x 0.33 MiB (float32, 64 px) = 0.01 GiB" in killed.stderr
    finished = train(folder, data, "--resume", "auto", **settings)
    assert finished.returncode == 0, finished.stderr

    steps = steps_of(folder, "without")
    assert steps_of(folder) == steps and len(steps) == 8
    for name in ("final/model.safetensors", "checkpoints/last/model.safetensors"):
        assert (folder / "run" / name).read_bytes() == (folder / "without" / name).read_bytes(), name
    held = sorted((folder / "cache").glob("*/*"))
    assert 16 < len(held) <= 32 and all(path.suffix == ".safetensors" for path in held)
    finished = train(folder, data, **settings, output_dir="again")
    assert finished.returncode == 0 and steps_of(folder, "again") == steps
    assert sorted((folder / "cache").glob("*/*")) == held


def test_a_cache_for_which_there_is_no_space_ends_the_run_in_one_line(folder, data):
    patch = "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=2**20)"
    settings = {**SETTINGS, **STILL, "teacher_cache": "cache"}
    line = error_of(train(folder, data, program=launcher(folder, patch), **settings))
    assert line.startswith("Error: teacher_cache cache: 0.01 GiB are needed for 32 pictures, and 0.00 GiB are free on")


@pytest.mark.slow
def test_two_processes_fill_one_cache(folder, data):
    settings = {**SETTINGS, **STILL, "max_steps": 4, "batch_size": 4, "distill_masks_weight": 0.0}
    for run, program in (("two", [*TORCHRUN, *SCRIPT]), ("cached", [*TORCHRUN, *SCRIPT])):
        cached = {"teacher_cache": "cache"} if run == "cached" else {}
        finished = train(folder, data, program=program, **settings, **cached, output_dir=run)
        assert finished.returncode == 0, finished.stderr
    assert steps_of(folder, "two") == steps_of(folder, "cached")
    finished = train(folder, data, **{**settings, "batch_size": 8}, teacher_cache="cache", output_dir="one")
    assert finished.returncode == 0, finished.stderr
    for mine, other in zip(steps_of(folder, "cached"), steps_of(folder, "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_like_one(folder, data):
    """In steps of features alone and in others; without masks, which are compared at random points."""
    settings = {**SETTINGS, "max_steps": 4, "feature_steps": 0.5, "distill_masks_weight": 0.0, "epochs": 9}
    finished = train(folder, data, **settings, output_dir="one")
    assert finished.returncode == 0, finished.stderr
    finished = train(folder, data, program=[*TORCHRUN, *SCRIPT], **{**settings, "batch_size": 1}, output_dir="two")
    assert finished.returncode == 0, finished.stderr
    one, two = steps_of(folder, "one"), steps_of(folder, "two")
    assert len(two) == 4
    for mine, other in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    weights = [load_file(folder / run / "checkpoints" / "last" / "model.safetensors") for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_a_teacher_that_is_none_ends_the_run_in_one_line(folder, data):
    line = error_of(train(folder, data, **{**SETTINGS, "teacher": "./nowhere"}))
    assert "there is no folder or file ./nowhere" in line


@pytest.fixture
def pictures(folder, data) -> dict:
    """Flags for pictures without labels, and what to ask the teacher."""
    (folder / "phrases.txt").write_text("red circle\nblue circle\n\nred square\nteapot\n")
    for path in (data / "train").glob("*.png"):
        target = folder / "pictures" / path.stem[-1] / path.name  # in folders of folders
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return {"phrases": "phrases.txt", "validation_split": 0.2, "prompts_per_image": 2}


@pytest.mark.slow
def test_pictures_without_labels_killed_and_resumed(folder, pictures):
    """In the second epoch, of six or seven steps, phrases are chosen by what the teacher said in the first."""
    settings = {**SETTINGS, **pictures, "max_steps": 10, "feature_steps": 0.0}
    finished = train(folder, "pictures", **settings, output_dir="whole")
    assert finished.returncode == 0, finished.stderr
    assert "validation: 3 pictures, 4 phrases; the teacher finds" in finished.stderr
    killed = train(folder, "pictures", program=launcher(folder, KILLED), **settings)
    assert killed.returncode == -signal.SIGKILL
    finished = train(folder, "pictures", "--resume", "auto", fresh=True, **settings)
    assert finished.returncode == 0, finished.stderr
    assert steps_of(folder) == steps_of(folder, "whole") and len(steps_of(folder)) == 10
    for name in ("final/model.safetensors", "checkpoints/last/model.safetensors", "checkpoints/last/objective.pt"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    known = torch.load(folder / "run" / "checkpoints" / "last" / "objective.pt")["choice"]["known"]
    assert known.shape == (13, 4) and (known > 0).sum() == 45  # more than the two of each that it learns from
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    (evaluation,) = [line for line in lines if line["kind"] == "eval"]
    assert "segm_AP" in evaluation


@pytest.mark.slow
def test_two_processes_choose_the_phrases_of_one(folder, pictures):
    settings = {**SETTINGS, **pictures, "distill_masks_weight": 0.0, "feature_steps": 0.0, "max_steps": 9}
    finished = train(folder, "pictures", **settings, output_dir="one")
    assert finished.returncode == 0, finished.stderr
    finished = train(
        folder, "pictures", program=[*TORCHRUN, *SCRIPT], **{**settings, "batch_size": 1}, output_dir="two"
    )
    assert finished.returncode == 0, finished.stderr
    for mine, other in zip(steps_of(folder, "two"), steps_of(folder, "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    choices = [torch.load(folder / run / "checkpoints" / "last" / "objective.pt")["choice"] for run in ("one", "two")]
    assert torch.equal(choices[0]["known"], choices[1]["known"]) and choices[0]["known"].any()
    assert sorted(choices[0]["answers"].tolist()) == sorted(choices[1]["answers"].tolist())
