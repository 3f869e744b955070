"""Runs that train adapters: what they write, and how they go on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import micro_config
from conftest import run as command
from peft import PeftModel
from safetensors.torch import load_file, save_file
from train_cases import launcher, state_of, train, train_in_two

from sam3_hf import Sam3LiteModel
from sam3_hf.data.generated import write_dataset
from sam3_hf.training.adapters import add_adapters
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.compatibility import check_compatible
from sam3_hf.training.model import build_model
from sam3_hf.training.objectives import Labels
from sam3_hf.training.parts import build_objective, set_mask_supervision

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
def settings(saved) -> dict:
    """Those of a run from a lite model."""
    own = {"lora_rank": 2, "ema_decay": 0.9, "save_every_epochs": 1, "save_every_steps": 2}
    return {**own, "init": str(saved), "model_overrides": None, "num_workers": 0}


@pytest.fixture(scope="module")
def alone(data, settings, tmp_path_factory) -> Path:
    """6 steps in 2 epochs; final/ holds the adapter alone."""
    folder = tmp_path_factory.mktemp("alone")
    finished = train(folder, data, **settings, merge_adapter=False)
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def merged(alone, data, settings, tmp_path_factory) -> Path:
    """The same run after `--merge_adapter true`, which errors advise."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(alone, folder / "run", symlinks=True)
    finished = train(folder, data, "--resume", "auto", **settings, learning_rate=1.0, epochs=1)
    assert finished.returncode == 0, finished.stderr
    (line,) = (line for line in finished.stderr.splitlines() if "the run is finished" in line)
    assert "epochs (it had 2, now 1), learning_rate (it had 0.001, now 1.0);" in line
    return folder / "run"


def lines_of(folder: Path, kind: str) -> list[dict]:
    """Without times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "data_wait", "memory_gb")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == kind]


def test_checkpoints_hold_the_adapter_alone(alone, saved):
    checkpoints = alone / "checkpoints"
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


def test_the_final_model_holds_base_and_averaged_adapter(merged, saved):
    found = Sam3LiteModel.from_pretrained(merged / "final").state_dict()
    first = Sam3LiteModel.from_pretrained(saved).state_dict()
    assert found.keys() == first.keys()
    average = load_file(merged / "checkpoints" / "best" / "ema.safetensors")
    for name, value in first.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in average:
            value = value + average[f"{layer}.lora_B.default.weight"] @ average[f"{layer}.lora_A.default.weight"]
            assert not torch.equal(value.half(), first[name].half())
        assert torch.equal(found[name], value.half()), name


def test_an_adapter_alone_is_as_good_as_the_final_model(alone, merged, saved):
    """What `PeftModel` makes of both, once the adapter is merged."""
    loaded = PeftModel.from_pretrained(Sam3LiteModel.from_pretrained(saved), alone / "final").merge_and_unload()
    expected = Sam3LiteModel.from_pretrained(merged / "final").state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.half(), expected[name]), name


def test_a_resumed_run_is_as_if_nothing_had_happened(alone, data, settings, tmp_path):
    """Also in a folder with the weights of another run."""
    checkpoint = str(alone / "checkpoints" / "epoch_1")
    base = alone / "checkpoints" / "frozen_base.safetensors"
    stale = tmp_path / "run" / "checkpoints" / base.name
    stale.parent.mkdir(parents=True)
    save_file({name: torch.zeros_like(value) for name, value in load_file(base).items()}, stale)
    finished = train(tmp_path, data, "--resume", checkpoint, **settings, merge_adapter=False)
    assert finished.returncode == 0 and "step 3" in finished.stderr, finished.stderr
    assert_same_steps(tmp_path / "run", alone, first=4)
    found, expected = load_file(stale.parent / "last" / base.name), load_file(base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def assert_same_steps(found: Path, expected: Path, first: int) -> None:
    for kind in ("train", "eval"):
        assert lines_of(found, kind) == [line for line in lines_of(expected, kind) if line["step"] >= first]
    for name in ("adapter.safetensors", "ema.safetensors"):
        files = (run / "checkpoints" / "last" / name for run in (found, expected))
        assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(alone, data, settings, tmp_path):
    settings = {**settings, "merge_adapter": False}
    killed = train(tmp_path, data, program=launcher(tmp_path, KILLED), **settings)
    assert killed.returncode == -9 and state_of(tmp_path / "run" / "checkpoints" / "last")["step"] == 4
    finished = train(tmp_path, data, "--resume", "auto", fresh=True, **settings)
    assert finished.returncode == 0 and "step 4" in finished.stderr, finished.stderr
    assert_same_steps(tmp_path / "run", alone, first=1)
    files = (run / "final" / "adapter_model.safetensors" for run in (tmp_path / "run", alone))
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.slow
def test_two_processes_train_like_one(data, settings, tmp_path):
    """Without mask losses, which sample points at random."""
    settings = {**settings, "epochs": 1, "lora_targets": "all", "ema_decay": 0.0}
    settings |= {"mask_focal_loss_weight": 0.0, "mask_dice_loss_weight": 0.0}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    finished = train(one, data, **settings, batch_size=4)
    assert finished.returncode == 0, finished.stderr
    finished = train_in_two(two, data, **settings, batch_size=2)
    assert finished.returncode == 0, finished.stderr
    expected, found = lines_of(one / "run", "train"), lines_of(two / "run", "train")
    assert len(found) == 3
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


def test_an_adapter_alone_names_its_model(alone, saved):
    final = alone / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(saved)
    assert {"adapter_model.safetensors", "provenance.json", "tokenizer.json"} <= {p.name for p in final.iterdir()}
    assert not (final / "config.json").exists()
    result = command("info", final)
    assert result.exit_code == 0, result.output
    first, second, *_, last = result.stdout.splitlines()
    assert first == f"{final}: adapter of rank 2, alpha 2, without its model" and second == f"model: {saved}"
    facts = json.loads(command("info", final, "--json").stdout)
    trained = load_file(final / "adapter_model.safetensors")
    layers = [name for name in trained if "detr_decoder" in name and "lora_A" in name]
    assert facts["parts"]["DETR decoder"]["layers"] == len(layers) > 0 and "vision encoder" not in facts["parts"]
    assert facts["parameters"] == sum(value.numel() for value in trained.values())
    assert facts["bytes"] == 4 * facts["parameters"] and f"{facts['parameters']:,}" in last


def test_an_adapter_is_measured_in_whatever_precision_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/model", "r": 2, "lora_alpha": 2}')
    for dtype, size in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 1), (torch.float32, 4)):
        name = "base_model.model.detr_decoder.layers.0.fc1.lora_A.weight"
        save_file({name: torch.zeros(2, 8, dtype=dtype)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        facts = json.loads(command("info", tmp_path, "--json").stdout)
        assert (facts["parameters"], facts["bytes"]) == (16, 16 * size)
    assert command("info", tmp_path).exit_code == 0


def test_commands_say_what_to_do_with_an_adapter(alone, data, saved, tmp_path):
    final, last = alone / "final", alone / "checkpoints" / "last"
    picture = next((data / "valid").glob("*.png"))
    predict = ("predict", picture, "--prompt", "a", "--output", tmp_path / "out", "--model")
    evaluate = ("evaluate", "--data", data, "--workers", "0", "--model")
    for result in (command(*predict, final), command(*evaluate, final), command(*predict, alone)):
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert f"{final} holds an adapter, and no model" in line
        assert "--merge_adapter true" in line and str(saved) in line
    for folder in (final, alone):
        result = command("push", folder, "me/adapter")
        assert result.exit_code == 1 and f"push it with `hf upload OWNER/NAME {final}`" in result.stderr
    unfinished = tmp_path / "unfinished"
    shutil.copytree(alone / "checkpoints", unfinished / "checkpoints", symlinks=True)
    result = command(*predict, unfinished)
    assert result.exit_code == 1 and "has no model yet" in result.stderr and "--resume auto" in result.stderr
    result = command("convert", last, tmp_path / "converted")
    assert result.exit_code == 1 and "a run that trains an adapter" in result.stderr
    assert "is a checkpoint to resume from" in command(*evaluate, last).stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_rank": 3}, "lora_rank: 2 there, 3 here"),
        ({"lora_targets": "all"}, "lora_targets: None there, all here"),
        ({"lora_rank": None}, "lora_rank: 2 there, None here"),
        ({"lora_alpha": 4.0}, "lora_alpha: None there, 4.0 here"),
        ({"merge_adapter": False}, "merge_adapter: true there, false here"),
    ],
)
def test_other_adapters_do_not_go_on_from_a_checkpoint(merged, changed, message):
    saved = state_of(merged / "checkpoints" / "last")
    saved["arguments"]["merge_adapter"] = True
    check_compatible(saved, saved)
    with pytest.raises(ValueError, match=message):
        check_compatible(saved, saved | {"arguments": saved["arguments"] | changed})


def test_an_adapter_alone_needs_a_base_that_has_a_name(tmp_path):
    Sam3LiteModel(micro_config()).to_sam3().save_pretrained(tmp_path)
    smaller = micro_config(detr_decoder_layers=1).to_dict()
    overrides = json.dumps({name: value for name, value in smaller.items() if name.endswith("_config")})
    flags = ["--preset", "tiny", "--model_overrides", overrides, "--lora_rank", "2", "--merge_adapter", "false"]
    with pytest.raises(ValueError, match="is mapped to other weights.*sam3-lite convert"):
        build_model(parse_arguments(["--data", "x", "--init", str(tmp_path), *flags]), None)


def test_a_teacher_of_features_needs_adapters_in_the_vision_encoder(model):
    arguments = parse_arguments(["--data", "x", "--teacher", "y", "--lora_rank", "2"])
    add_adapters(model, arguments.adapter)
    with pytest.raises(ValueError, match="set feature_steps to 0.*or lora_targets to all"):
        build_objective(None, arguments, model, None, [], [], None)


@pytest.mark.parametrize(
    ("flags", "had_masks", "labels_have_masks", "message"),
    [
        (["--merge_adapter", "false"], True, False, "makes mask_supervision false, unlike in the config.json of some"),
        (["--merge_adapter", "false"], False, True, "makes mask_supervision true, unlike in the config.json of some"),
        (["--lora_targets", "mask_decoder.*"], True, False, "nothing would train.*the training split has no masks"),
    ],
)
def test_what_a_run_without_masks_cannot_train_or_say_is_refused(flags, had_masks, labels_have_masks, message):
    arguments = parse_arguments(["--data", "x", "--init", "some", "--lora_rank", "2", *flags])
    model = Sam3LiteModel(micro_config(mask_supervision=had_masks))
    add_adapters(model, arguments.adapter)
    with pytest.raises(ValueError, match=message):
        set_mask_supervision(arguments, model, Labels(), labels_have_masks)
    assert model.config.mask_supervision == had_masks
    set_mask_supervision(arguments, model, Labels(), had_masks)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [{"feature_steps": 0.0}, {"lora_targets": "all"}])
def test_a_teacher_teaches_adapters(data, settings, saved, chosen, tmp_path):
    finished = train(tmp_path, data, **settings, **chosen, teacher=str(saved), label_loss_weight=1.0, max_steps=4)
    assert finished.returncode == 0, finished.stderr
    weights = load_file(tmp_path / "run" / "checkpoints" / "last" / "adapter.safetensors")
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
