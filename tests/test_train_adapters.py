"""Runs that train adapters, as processes of their own."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run as command
from safetensors.torch import load_file
from train_cases import error_of, launcher, state_of, train, train_in_two

import sam3_hf
from sam3_hf import Sam3LiteModel
from sam3_hf.data.generated import write_dataset
from sam3_hf.training.compatibility import check_compatible

RANK = {"lora_rank": 2, "ema_decay": 0.9, "save_every_epochs": 1, "save_every_steps": 2}
TINY_STANDARD = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"
KILLED = """
from sam3_hf.training.loop import TrainingLoop
take_step = TrainingLoop.take_step
def take_step_and_die(self, batches, stop):
    result = take_step(self, batches, stop)
    if self.step == 5:
        os.kill(os.getpid(), 9)
    return result
TrainingLoop.take_step = take_step_and_die
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=12, num_valid=3, image_size=64, num_concepts=3)


@pytest.fixture(scope="module")
def whole(data, saved, tmp_path_factory) -> Path:
    """6 steps in 2 epochs that nothing interrupts, from a lite model."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train(folder, data, **RANK, init=str(saved), model_overrides=None)
    assert finished.returncode == 0, finished.stderr
    return folder


def lines_of(folder: Path, kind: str) -> list[dict]:
    """Without times."""
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "data_wait", "memory_gb")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == kind]


def test_checkpoints_hold_the_adapter_alone(whole, saved):
    checkpoints = whole / "run" / "checkpoints"
    shared = {"frozen_text.safetensors", "frozen_base.safetensors"}
    for name in ("last", "best", "epoch_1"):
        files = {path.name: path for path in (checkpoints / name).iterdir()}
        assert "model.safetensors" not in files and shared <= files.keys()
        assert all(os.path.samefile(files[file], checkpoints / file) for file in shared)  # once on the disk
        weights, average = load_file(files["adapter.safetensors"]), load_file(files["ema.safetensors"])
        assert weights.keys() == average.keys() and all(".lora_" in key for key in weights)
        assert not any(key.startswith("vision_encoder") for key in weights)
        own = sum(path.stat().st_size for name, path in files.items() if name not in shared)
        assert own < files["frozen_base.safetensors"].stat().st_size
    base = load_file(checkpoints / "frozen_base.safetensors")
    first = Sam3LiteModel.from_pretrained(saved).state_dict()
    assert base.keys() == {name for name in first if not name.startswith("text_")}
    assert all(torch.equal(value, first[name]) for name, value in base.items())


def test_the_final_model_holds_base_and_averaged_adapter(whole, data, saved):
    found = Sam3LiteModel.from_pretrained(whole / "run" / "final").state_dict()
    first = Sam3LiteModel.from_pretrained(saved).state_dict()
    assert found.keys() == first.keys()
    average = load_file(whole / "run" / "checkpoints" / "best" / "ema.safetensors")
    for name, value in first.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in average:
            value = value + average[f"{layer}.lora_B.default.weight"] @ average[f"{layer}.lora_A.default.weight"]
            assert not torch.equal(value.half(), first[name].half())
        assert torch.equal(found[name], value.half()), name
    result = command("evaluate", "--model", whole / "run" / "final", "--data", data, "--workers", "0")
    assert result.exit_code == 0 and "segm" not in result.stderr


def test_killed_and_resumed_is_as_if_nothing_had_happened(whole, data, saved, tmp_path):
    settings = {**RANK, "init": str(saved), "model_overrides": None}
    killed = train(tmp_path, data, program=launcher(tmp_path, KILLED), **settings)
    assert killed.returncode == -9 and state_of(tmp_path / "run" / "checkpoints" / "last")["step"] == 4
    finished = train(tmp_path, data, "--resume", "auto", fresh=True, **settings)
    assert finished.returncode == 0 and "step 4" in finished.stderr, finished.stderr
    assert lines_of(tmp_path, "train") == lines_of(whole, "train")
    assert lines_of(tmp_path, "eval") == lines_of(whole, "eval")
    for name in (
        "final/model.safetensors",
        "checkpoints/last/adapter.safetensors",
        "checkpoints/last/ema.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name


def test_two_processes_train_like_one(data, saved, tmp_path):
    """Without mask losses, which sample points at random."""
    settings = {"epochs": 1, "lora_rank": 2, "lora_targets": "all", "init": str(saved), "model_overrides": None}
    settings |= {"mask_focal_loss_weight": 0.0, "mask_dice_loss_weight": 0.0, "num_workers": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    finished = train(one, data, **settings, batch_size=4)
    assert finished.returncode == 0, finished.stderr
    finished = train_in_two(two, data, **settings, batch_size=2)
    assert finished.returncode == 0, finished.stderr
    expected, found = lines_of(one, "train"), lines_of(two, "train")
    assert len(found) == 3
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(data, saved, tmp_path_factory) -> Path:
    """A run of which final/ holds the adapter alone."""
    folder = tmp_path_factory.mktemp("alone")
    settings = {"lora_rank": 2, "merge_adapter": False, "init": str(saved), "model_overrides": None}
    finished = train(folder, data, **settings, max_steps=1)
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


def test_an_adapter_alone_names_its_model(alone, saved):
    final = alone / "final"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(saved)
    assert {"adapter_model.safetensors", "provenance.json", "tokenizer.json"} <= {p.name for p in final.iterdir()}
    assert not (final / "config.json").exists()


def test_commands_say_what_to_do_with_an_adapter(alone, data, saved, tmp_path):
    final, last = alone / "final", alone / "checkpoints" / "last"
    picture = next((data / "valid").glob("*.png"))
    predict = ("predict", picture, "--prompt", "a", "--output", tmp_path / "out", "--model")
    evaluate = ("evaluate", "--data", data, "--workers", "0", "--model")
    for result in (command(*predict, final), command(*evaluate, final), command("info", final)):
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert "holds an adapter, and no model" in line and "--merge_adapter true" in line and str(saved) in line
    result = command("push", final, "me/adapter")
    assert result.exit_code == 1 and "push it with `hf upload" in result.stderr
    result = command("convert", last, tmp_path / "converted")
    assert result.exit_code == 1 and "a run that trains an adapter" in result.stderr
    assert "is a checkpoint to resume from" in command(*evaluate, last).stderr


def test_what_the_error_advises_makes_a_whole_model(alone, data, saved, tmp_path):
    shutil.copytree(alone, tmp_path / "run", symlinks=True)
    settings = {"lora_rank": 2, "merge_adapter": True, "init": str(saved), "model_overrides": None}
    finished = train(tmp_path, data, "--resume", "auto", **settings, max_steps=1)
    assert finished.returncode == 0, finished.stderr
    Sam3LiteModel.from_pretrained(tmp_path / "run" / "final")


def test_another_rank_does_not_go_on_from_a_checkpoint(whole, data, saved, tmp_path):
    checkpoint = str(whole / "run" / "checkpoints" / "last")
    settings = {"init": str(saved), "model_overrides": None, "num_workers": 0, "ema_decay": 0.9}
    finished = train(tmp_path, data, "--resume", checkpoint, "--lora_rank", "3", **settings)
    assert finished.returncode == 2 and "lora_rank: 2 there, 3 here" in finished.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_targets": "all"}, "lora_targets: None there, all here"),
        ({"lora_rank": None}, "lora_rank: 2 there, None here"),
        ({"lora_alpha": 4.0}, "lora_alpha: None there, 4.0 here"),
        ({"merge_adapter": False}, "merge_adapter: true there, false here"),
    ],
)
def test_other_adapters_do_not_go_on_from_a_checkpoint(whole, changed, message):
    saved = state_of(whole / "run" / "checkpoints" / "last")
    check_compatible(saved, saved)
    with pytest.raises(ValueError, match=message):
        check_compatible(saved, saved | {"arguments": saved["arguments"] | changed})


def test_an_adapter_alone_needs_a_base_that_has_a_name(data, tmp_path):
    settings = {
        "lora_rank": 2,
        "merge_adapter": False,
        "init": str(TINY_STANDARD),
        "preset": "tiny",
        "model_overrides": None,
    }
    line = error_of(train(tmp_path, data, **settings))
    assert "is mapped to other weights" in line and "sam3-lite convert" in line


def test_a_teacher_teaches_adapters_of_the_detector_once_it_is_asked(data, saved, tmp_path):
    settings = {"lora_rank": 2, "init": str(saved), "teacher": str(saved), "model_overrides": None, "max_steps": 1}
    line = error_of(train(tmp_path, data, **settings, label_loss_weight=1.0))
    assert "feature_steps to 0" in line and "lora_targets to all" in line
    finished = train(tmp_path, data, **settings, label_loss_weight=1.0, feature_steps=0.0)
    assert finished.returncode == 0, finished.stderr
