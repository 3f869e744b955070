import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed.checkpoint
from accelerate import Accelerator
from accelerate.commands import accelerate_cli
from conftest import micro_config, shake
from huggingface_hub import ModelCard
from transformers import AutoModel
from typer.main import get_command
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.data.generated import write_dataset
from sam3_hf.training.checkpoints import FROZEN, save_checkpoint, write_frozen
from sam3_hf.training.optim import MovingAverage
from sam3_hf.training.phrases import FrozenText


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_half_the_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "half", "--preset", "same", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "parameters in fp16," in result.output and "source:" in result.output
    half = AutoModel.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.float16
    assert all(torch.equal(t.half(), half.state_dict()[name]) for name, t in model.state_dict().items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("source", "half")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    assert Sam3LiteProcessor.from_pretrained(tmp_path / "half").tokenizer("cat")


def test_a_standard_model_becomes_smaller(tmp_path):
    Sam3LiteModel(Sam3LiteConfig.from_preset("tiny-standard")).to_sam3().save_pretrained(tmp_path / "standard")
    result = run(tmp_path / "standard", tmp_path / "tiny", "--preset", "tiny", "--image-size", 64, "--report")
    assert result.exit_code == 0, result.output
    assert "rotated" in result.output and "vision_encoder.backbone.layers.*.mlp.fc1" in result.output
    assert (tmp_path / "tiny" / "mapping_report.json").exists()
    assert Sam3LiteModel.from_pretrained(tmp_path / "tiny").config.image_size == 64


def test_folders_are_only_replaced_when_told(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old.txt").write_text("old")
    result = run(tmp_path / "source", tmp_path / "target")
    assert result.exit_code == 1 and "--overwrite" in result.output
    assert (tmp_path / "target" / "old.txt").exists()
    result = run(tmp_path / "source", tmp_path / "target", "--overwrite")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "target" / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("fails", ["weights", "rename"])
def test_a_conversion_that_fails_leaves_the_old_folder_as_it_was(model, tmp_path, monkeypatch, fails):
    model.save_pretrained(tmp_path / "source")
    assert run(tmp_path / "source", tmp_path / "target").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}

    def save_half(self, folder, **kwargs):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("{")
        raise OSError("no space left on device")

    def rename(source, target, rename=os.rename):
        if Path(source).name == ".target.partial":
            raise OSError("no space left on device")
        rename(source, target)

    if fails == "weights":
        monkeypatch.setattr(Sam3LiteModel, "save_pretrained", save_half)
    else:
        monkeypatch.setattr(os, "rename", rename)
    result = run(tmp_path / "source", tmp_path / "target", "--dtype", "float16", "--overwrite")
    assert result.exit_code == 1 and "no space left" in result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_conversion_goes_back_to_the_folder_that_a_kill_had_moved_away(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    assert run(tmp_path / "source", tmp_path / "target").exit_code == 0
    (tmp_path / "target").rename(tmp_path / ".target.previous")
    result = run(tmp_path / "source", tmp_path / "target")
    assert result.exit_code == 1 and "--overwrite" in result.output
    assert Sam3LiteModel.from_pretrained(tmp_path / "target")


def test_errors_are_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "target", "--preset", "lite")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "grow" in result.output
    assert not (tmp_path / "target").exists()


def train_a_step(checkpoints: Path, freeze_text: bool = True, ema_decay: float = 0.9) -> tuple[dict, dict]:
    """A checkpoint `best` as the trainer writes it; the whole model's weights, and with their averages."""
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config()))
    frozen = {}
    if freeze_text:
        text = FrozenText(model, Sam3LiteProcessor.from_config(model.config), ["cat"], torch.device("cpu"))
        frozen = text.weights()
        write_frozen(checkpoints, frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = MovingAverage(model, ema_decay) if ema_decay else None
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    averages = {}
    if ema is not None:
        ema.update(1)
        averages = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    save_checkpoint(Accelerator(cpu=True), checkpoints / "best", model, optimizer, ema, {"step": 1})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()} | frozen
    return weights, weights | averages


def equal(model, weights: dict) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("freeze_text", [True, False])
def test_bare_weights_out_of_a_training_checkpoint(tmp_path, freeze_text):
    weights, averages = train_a_step(tmp_path / "checkpoints", freeze_text)
    best = tmp_path / "checkpoints" / "best"
    assert (best / FROZEN).exists() == freeze_text
    loaded, info = Sam3LiteModel.from_pretrained(best, output_loading_info=True)
    assert equal(loaded, weights) and not info["missing_keys"]
    assert equal(AutoModel.from_pretrained(best), weights)
    assert equal(Sam3LiteModel.from_pretrained(best, variant="ema"), averages)

    result = run(best, tmp_path / "bare")
    assert result.exit_code == 0, result.output
    assert equal(Sam3LiteModel.from_pretrained(tmp_path / "bare"), weights)
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    assert not names & {"optimizer.pt", "ema.safetensors", "trainer_state.json", FROZEN}
    left = sum((best / name).stat().st_size for name in ("optimizer.pt", "ema.safetensors"))
    assert f"{left / 1e6:.1f} MB of training state left behind" in result.output

    result = run(best, tmp_path / "average", "--ema", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    average = Sam3LiteModel.from_pretrained(tmp_path / "average")
    assert average.dtype == torch.float16
    assert equal(average, {name: tensor.half() for name, tensor in averages.items()})
    changed = [name for name in weights if not torch.equal(weights[name], averages[name])]
    assert changed and not any(name.startswith("text_") for name in changed) == freeze_text


def test_averages_that_are_not_there(model, tmp_path):
    train_a_step(tmp_path / "checkpoints", ema_decay=0)
    result = run(tmp_path / "checkpoints" / "best", tmp_path / "target", "--ema")
    assert result.exit_code == 1 and "has no ema.safetensors" in result.output and result.output.count("\n") == 1
    model.save_pretrained(tmp_path / "plain")
    result = run(tmp_path / "plain", tmp_path / "target", "--ema")
    assert result.exit_code == 1 and "is no checkpoint folder of a training run" in result.output
    assert not (tmp_path / "target").exists()


def test_a_checkpoint_without_its_frozen_text_is_refused(tmp_path):
    train_a_step(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "best" / FROZEN).unlink()
    result = run(tmp_path / "checkpoints" / "best", tmp_path / "target")
    assert result.exit_code == 1 and f"{FROZEN} is missing" in result.output


def test_the_folder_of_a_run_is_not_a_model(tmp_path):
    train_a_step(tmp_path / "run" / "checkpoints")
    for folder in ("run", "run/checkpoints"):
        result = run(tmp_path / folder, tmp_path / "target")
        assert result.exit_code == 1 and result.output.count("\n") == 1
        assert f"take {tmp_path / 'run' / 'checkpoints' / 'best'}." in result.output
    shutil.copytree(tmp_path / "run" / "checkpoints" / "best", tmp_path / "run" / "final")
    result = run(tmp_path / "run", tmp_path / "target")
    assert f"take {tmp_path / 'run' / 'final'} or {tmp_path / 'run' / 'checkpoints' / 'best'}." in result.output


def test_parts_of_an_fsdp_checkpoint_are_put_together_by_the_command_in_the_error(tmp_path, monkeypatch):
    weights, _ = train_a_step(tmp_path / "checkpoints")
    best = tmp_path / "checkpoints" / "best"
    parts = best / "pytorch_model_fsdp_0"
    frozen = {name for name in weights if name.startswith("text_")}
    torch.distributed.checkpoint.save(
        {"model": {name: tensor for name, tensor in weights.items() if name not in frozen}}, checkpoint_id=parts
    )
    (best / "model.safetensors").unlink()
    result = run(best, tmp_path / "target")
    assert result.exit_code == 1 and "written under FSDP" in result.output and "final/" in result.output
    command = result.output.split("`")[1]
    assert command.startswith("accelerate merge-weights")
    monkeypatch.setattr(sys, "argv", command.split())
    accelerate_cli.main()
    assert run(best, tmp_path / "target").exit_code == 0
    assert equal(Sam3LiteModel.from_pretrained(tmp_path / "target"), weights)


def test_sizes_of_a_source_in_the_cache_of_the_hub(model, tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "models--someone--lite"
    model.save_pretrained(cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    finished = run("someone/lite", tmp_path / "half", "--dtype", "float16")
    assert finished.exit_code == 0, finished.output
    size = (cached / "snapshots" / "0123" / "model.safetensors").stat().st_size
    assert f"(source: {size / 1e6:.1f} MB)" in finished.stdout


def test_the_report_is_among_what_is_pushed_while_saving(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "source")
    smaller = Sam3LiteModel.from_pretrained(
        tmp_path / "source", config=model.config.changed(detr_encoder_layers=1), mapping="select"
    )
    uploaded = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            uploaded.extend(operation.path_in_repo for operation in operations)

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card")
    )
    smaller.save_pretrained(tmp_path / "target", push_to_hub=True)
    assert (tmp_path / "target" / "mapping_report.json").exists()
    assert {"model.safetensors", "config.json", "mapping_report.json"} <= set(uploaded)


def test_calibration_from_the_command_line(tmp_path):
    from sam3_hf.mapping.calibration.images import draw_images

    Sam3LiteModel(Sam3LiteConfig.from_preset("tiny-standard", image_size=64)).to_sam3().save_pretrained(
        tmp_path / "standard"
    )
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(draw_images(6, 64, seed=0)):
        picture.save(tmp_path / "images" / f"{i}.png")
    options = ("--preset", "tiny", "--image-size", 64, "--no-search-depth", "--dtype", "float16", "--report")
    for images, name in ((tmp_path / "images", "given"), ("generated", "drawn")):
        prompts = ("--calibration-prompt", "red cell", "--calibration-prompt", "white cell")
        count = ("--num-calibration-images", 5)
        result = run(
            tmp_path / "standard", tmp_path / name, *options, "--calibration-images", images, *prompts, *count
        )
        assert result.exit_code == 0, result.output
        assert "refit" in result.output and "in fp16" in result.output
        calibration = json.loads((tmp_path / name / "mapping_report.json").read_text())["calibration"]
        assert (calibration["images"], calibration["images_fitted"]) == (name, 4)
    result = run(tmp_path / "standard", tmp_path / "none", *options, "--calibration-images", tmp_path / "nothing")
    assert result.exit_code == 1 and "Error:" in result.output and "nothing is not a folder" in result.output


@pytest.mark.parametrize("kind", ["lite", "standard"])
def test_damaged_weights_of_a_calibration_are_said_in_a_line(model, tmp_path, kind):
    (model if kind == "lite" else model.to_sam3()).save_pretrained(tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50_000])
    options = ("--preset", "tiny", "--calibration-images", "generated", "--num-calibration-images", 2)
    result = run(tmp_path / "source", tmp_path / "target", *options)
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert str(tmp_path / "source") in result.output and "damaged" in result.output
    assert not (tmp_path / "target").exists()


def test_calibration_options_that_would_be_ignored_are_errors(tmp_path):
    result = run("source", tmp_path / "target", "--calibration-prompt", "cat")
    assert result.exit_code == 2 and "--calibration-images" in result.output
    result = run("source", tmp_path / "target", "--calibration-images", "generated", "--mapping", "select")
    assert result.exit_code == 2 and "exclude" in result.output


def test_too_little_memory_to_calibrate_is_said_in_a_line(tmp_path, monkeypatch):
    def calibrate(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sam3_hf.commands.convert.calibrate_mapping", calibrate)
    result = run("source", tmp_path / "target", "--calibration-images", "generated")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1 and "a smaller --num-calibration-images." in result.stderr


def test_help_names_every_option_in_full_in_80_columns():
    for name, command in get_command(app).commands.items():
        listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
        (line,) = [line for line in listed.splitlines() if line.split()[:1] == [name]]
        assert not line.endswith("..."), line
        if name == "train":  # whose help is the trainer's
            continue
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
        assert max(map(len, shown.splitlines())) <= 80
        assert {option for one in command.params for option in one.opts if option.startswith("-")} <= set(
            re.findall(r"--[\w-]+", shown)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "MODEL", "out", "--mapping", "best"], "--mapping best is none of auto, isometry, select, skip."),
        (["convert", "MODEL", "file/out"], "where a folder is needed: choose another path"),
        (["predict", "picture.png", "--device", "warp"], "device warp cannot be used here"),
        (["predict", "picture.png"], "file: Not a directory, where a folder is needed: choose another path"),
        (["check", "empty"], "there is no dataset in empty"),
        (
            ["check", "nowhere"],
            "there is no dataset nowhere: no such file or folder, and none of the Hub (no network)",
        ),
        (["check", "data", "--contact-sheet", "file/x.png"], "where a folder is needed: choose another path"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(saved, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    write_dataset("data", 1, 1, image_size=64, num_concepts=2)
    shutil.copyfile("data/train/00000.png", "picture.png")

    def unreachable(name):
        raise ConnectionError("no network")

    if arguments[-1] == "nowhere":
        monkeypatch.setattr(datasets, "load_dataset", unreachable)
    arguments = [str(saved) if argument == "MODEL" else argument for argument in arguments]
    if arguments[0] == "predict":
        arguments += ["--model", str(saved), "--prompt", "cat", "--output", "file", "--workers", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: ") and message in line and result.stderr.splitlines()[-1] == line
    assert sorted(os.listdir()) == ["data", "empty", "file", "picture.png"]


def test_yaml_of_a_category_map_that_is_none_is_said_in_one_line(tmp_path):
    write_dataset(tmp_path / "data", 1, 1, image_size=64, num_concepts=2)
    (tmp_path / "map.yaml").write_text("[1")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "data"), "--category-map", str(tmp_path / "map.yaml")])
    (line,) = [line for line in result.output.splitlines() if "not valid YAML" in line]
    assert result.exit_code == 1 and "expected ',' or ']'" in line
