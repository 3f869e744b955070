"""Model cards, and pushing to a stand-in of the Hub and loading from it."""

import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import HUNG, micro_config, shake
from hub_stand_in import TOKEN
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.presets_sam3_lite import PRESETS
from sam3_hf.sharing.hub import PushError, push_folder
from sam3_hf.sharing.model_card import (
    RANDOM_WEIGHTS,
    Origin,
    _origin_text,
    model_card,
    origin_of,
    versions,
    write_card,
)

ROOT = Path(__file__).parents[1]
SCORES = {"segm_AP": 0.48006, "segm_AP50": 0.65, "segm_cgF1": 0.26, "bbox_AP": 0.41, "bbox_AP50": 0.66, "IL_MCC": 0.6}
TRAINING = {
    "versions": {"sam3-hf": "0.1.0", "torch": "2.11.0"},
    "steps": 1400,
    "epochs": 7.0,
    "images_per_step": 4,
    "dataset": {
        "training images": 800,
        "concepts": ["red circle", "blue circle"],
        "has masks": True,
        "name": "shapes",
        "hub_id": "me/shapes",
    },
    "best": {"step": 1000, "epoch": 5.0, "metric": "segm_AP", "value": 0.48006, "scores": {**SCORES, "loss": 59.8}},
    "arguments": {"epochs": 7, "learning_rate": 2e-4, "seed": 0, "ema_decay": None},
}


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """What a training run leaves in final/, with files beside it that must stay at home."""
    final = tmp_path / "final"
    model.save_pretrained(final)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(final)
    (final / "metrics.jsonl").write_text('{"kind": "eval", "segm_AP": 0.48}\n')
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    write_card(final, {"origin": asdict(RANDOM_WEIGHTS), **TRAINING}, tmp_path / "picture.png")
    (final / "scaler.pt").write_bytes(b"state")
    (final / "ema.safetensors").write_bytes(b"average")
    (final / "checkpoints").mkdir()
    (final / "checkpoints" / "weights.json").write_text("{}")
    (final / ".hidden.json").write_text("{}")
    return final


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def outputs_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).pred_masks


def test_one_commit_with_all_that_belongs_there(hub, folder, model, inputs):
    before = snapshot(folder)
    result = run("push", folder, "me/shapes", "--message", "First")
    assert result.exit_code == 0, result.output
    assert snapshot(folder) == before
    repository = hub.repositories["me/shapes"]
    _, commit = repository.branches["main"]
    assert commit.sha in result.output and commit.message == "First"
    assert hub.count("POST .*/commit/") == 1 and not repository.private and repository.gated is None
    assert {name for name in commit.files if not name.endswith(".py")} == {
        "README.md",
        "config.json",
        "example.png",
        "metrics.jsonl",
        "model.safetensors",
        "processor_config.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "modeling_sam3_lite.py" in commit.files and "hub.py" not in commit.files
    assert commit.large == {"model.safetensors", "example.png"}
    card = commit.files["README.md"].decode()
    assert 'from_pretrained("me/shapes"' in card and "path/to/this/folder" not in card
    assert {name: before[name] for name in commit.files if name != "README.md"} == {
        name: content for name, content in commit.files.items() if name != "README.md"
    }
    loaded = Sam3LiteModel.from_pretrained("me/shapes")
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    assert Sam3LiteProcessor.from_pretrained("me/shapes").tokenizer("cat")


def test_private_gated_and_on_a_branch(hub, folder, tmp_path):
    result = run("push", folder, "me/secret", "--private", "--gated", "manual", "--revision", "v2")
    assert result.exit_code == 0, result.output
    repository = hub.repositories["me/secret"]
    assert repository.private and repository.gated == "manual"
    assert len(repository.branches["v2"]) == 2 and len(repository.branches["main"]) == 1
    gate, upload = (next(i for i, r in enumerate(hub.requests) if re.search(p, r)) for p in ("settings", "PUT /lfs"))
    assert gate < upload  # at no time were the weights there for everybody
    assert Sam3LiteModel.from_pretrained("me/secret", revision="v2").config.image_size == 64
    with pytest.raises(OSError, match="me/secret"):
        Sam3LiteModel.from_pretrained("me/secret", token=False, cache_dir=tmp_path / "other", revision="v2")
    assert run("push", folder, "me/other", "--gated", "perhaps").exit_code == 2


def test_what_should_be_private_does_not_go_to_a_public_repository(hub, folder):
    push_folder(folder, "me/shapes")
    with pytest.raises(PushError, match="exists and is public"):
        push_folder(folder, "me/shapes", private=True)
    assert len(hub.repositories["me/shapes"].branches["main"]) == 2


def test_a_second_push_replaces_the_weights(hub, folder, model, inputs):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    push_folder(folder, "me/twice")
    shards = {n for n in hub.repositories["me/twice"].branches["main"][-1].files if n.endswith(".safetensors")}
    assert len(shards) > 1
    assert torch.equal(outputs_of(Sam3LiteModel.from_pretrained("me/twice"), inputs), outputs_of(model, inputs))
    for path in folder.glob("model*"):
        path.unlink()
    shake(model, seed=1).save_pretrained(folder)
    push_folder(folder, "me/twice")
    commits = hub.repositories["me/twice"].branches["main"]
    assert [name for name in commits[-1].files if name.startswith("model") and "safetensors" in name] == [
        "model.safetensors"
    ]
    assert len(commits) == 3
    loaded = Sam3LiteModel.from_pretrained("me/twice", force_download=True)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("POST /api/repos/create", 401, "hf auth login"),
        ("POST /api/repos/create", 403, "may not write to me/shapes"),
        ("POST .*/preupload/", 500, "answered 500"),
        ("PUT /lfs/", 500, "answered 500"),
        ("PUT /lfs/", None, "disconnected"),
        ("POST .*/commit/", 403, "may not write to me/shapes"),
        ("POST .*/commit/", 500, "answered 500"),
    ],
)
def test_a_push_that_fails_halfway(hub, folder, where, status, message):
    before = snapshot(folder)
    hub.failures[where] = status
    result = run("push", folder, "me/shapes", "--private", "--gated", "auto", "--revision", "dev")
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert f"sam3-lite push {folder} me/shapes --private --gated auto --revision dev" in result.output
    assert snapshot(folder) == before
    assert all(
        len(commits) == 1 for repository in hub.repositories.values() for commits in repository.branches.values()
    )
    sent = hub.count("PUT /lfs/")
    hub.failures.clear()
    assert run("push", folder, "me/shapes", "--private", "--gated", "auto", "--revision", "dev").exit_code == 0
    assert len(hub.repositories["me/shapes"].branches["dev"]) == 2
    if "commit" in where:
        assert hub.count("PUT /lfs/") == sent == 2  # what had arrived was not sent again


def test_without_a_hub_or_a_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PushError, match="no valid token.*hf auth login"):
        push_folder(folder, "me/shapes")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="(?s)Connection refused.*sam3-lite push"):
        push_folder(folder, "me/shapes")


def test_only_whole_models_are_pushed(hub, folder, tmp_path):
    with pytest.raises(ValueError, match=f"push {folder}"):
        push_folder(tmp_path, "me/x")
    with pytest.raises(ValueError, match="no folder"):
        push_folder(tmp_path / "nowhere", "me/x")
    (folder / "optimizer.pt").write_bytes(b"state")
    with pytest.raises(ValueError, match="checkpoint to resume from"):
        push_folder(folder, "me/x")
    (folder / "optimizer.pt").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="no model.safetensors"):
        push_folder(folder, "me/x")
    assert run("push", folder, "me/x").exit_code == 1
    assert not hub.repositories and not hub.requests


def test_from_memory_and_with_the_mapping_report(hub, tmp_path):
    standard = Sam3LiteModel(micro_config(vision_hidden_size=64, vision_num_attention_heads=4, detr_decoder_layers=4))
    shake(standard).to_sam3().save_pretrained(tmp_path / "standard")
    model = Sam3LiteModel.from_pretrained(tmp_path / "standard", config=micro_config())
    commit = model.push_to_hub("me/mapped", private=True, commit_message="From memory")
    files = hub.repositories["me/mapped"].branches["main"][-1].files
    assert commit.oid == hub.repositories["me/mapped"].branches["main"][-1].sha
    assert json.loads(files["mapping_report.json"])["strategy"] == "isometry"
    assert "isometry" in files["README.md"].decode() and "| rotated |" in files["README.md"].decode()
    assert files["LICENSE"].startswith(b"SAM License")
    assert "processor_config.json" in files
    loaded = Sam3LiteModel.from_pretrained("me/mapped")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    loaded.push_to_hub("me/copy")  # what it derives from is not forgotten on the way
    metadata = ModelCard(hub.repositories["me/copy"].branches["main"][-1].files["README.md"].decode()).data
    assert (metadata.license_name, metadata.base_model) == ("sam-license", "me/mapped")
    hub.failures["PUT /lfs/"] = 500
    with pytest.raises(PushError, match="(?s)answered 500.*push_to_hub again"):
        shake(loaded).push_to_hub("me/copy")


def test_a_tokenizer_that_was_left_on_the_hub(hub, model, monkeypatch, caplog, tmp_path):
    model.save_pretrained(tmp_path / "model")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    push_folder(tmp_path / "model", "me/words")
    push_folder(tmp_path / "model", "me/wordless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        del hub.repositories["me/wordless"].branches["main"][-1].files[name]
    loaded = Sam3LiteModel.from_pretrained("me/words")
    Sam3LiteProcessor.of_source("me/wordless", loaded.config)  # the Hub says that there is none
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    Sam3LiteProcessor.of_source("me/wordless", loaded.config)
    assert "tokenizer is not on this machine" not in caplog.text
    for _ in range(2):
        processor = Sam3LiteProcessor.of_source("me/words", loaded.config)
    assert len(processor.tokenizer) == loaded.config.text_config.vocab_size
    assert caplog.text.count("me/words: its tokenizer is not on this machine") == 1
    with pytest.raises(OSError, match="me/words: its tokenizer is not on this machine.*connect"):
        Sam3LiteProcessor.from_pretrained("me/words")


def test_the_command_in_a_process_of_its_own(hub, folder, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)  # as a login leaves it
    del environment["HF_TOKEN"]
    command = [sys.executable, "-c", "from sam3_hf.cli import app; app()", "push", str(folder), "me/shapes"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HUNG)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip().endswith(hub.repositories["me/shapes"].branches["main"][-1].sha)


def test_the_card_of_a_trained_model(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.datasets == ["me/shapes"] and data.base_model is None
    assert data.license is None  # no weights of SAM 3 in it: the licence is its author's to choose
    assert "derive from SAM 3 by Meta" not in card.text and not (folder / "LICENSE").exists()
    found = {result.metric_type: (result.metric_value, result.dataset_split) for result in data.eval_results}
    assert found == {name: (round(value, 4), "validation") for name, value in SCORES.items()}
    assert "| segm_AP | 0.4801 |" in card.text and "![" in card.text and "| steps | 1400 |" in card.text
    assert "red circle, blue circle" in card.text and "ema decay" not in card.text
    config = micro_config()
    count = Sam3LiteModel(config).num_parameters()
    assert f"| parameters | {count / 1e6:.1f}M" in card.text and "64 × 64 px" in card.text


def test_the_licence_follows_the_weights(model, tmp_path):
    model.to_sam3().save_pretrained(tmp_path / "standard")
    assert origin_of(tmp_path / "standard").derived is True
    result = run("convert", tmp_path / "standard", tmp_path / "lite", "--preset", "same", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert run("convert", tmp_path / "lite", tmp_path / "whole", "--dtype", "float32").exit_code == 0
    for name in ("lite", "whole"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.license_name == "sam-license" and "`LICENSE` beside them is a copy" in card.text
        assert (tmp_path / name / "LICENSE").read_text().startswith("SAM License")
        assert origin_of(tmp_path / name).derived is True
    model.save_pretrained(tmp_path / "bare")
    assert origin_of(tmp_path / "bare").derived is None
    assert "It is not recorded" in model_card(tmp_path / "bare").text
    write_card(tmp_path / "bare", {"origin": asdict(RANDOM_WEIGHTS), "versions": versions()})
    assert origin_of(tmp_path / "bare") == Origin(str(tmp_path / "bare"), False)
    run("convert", tmp_path / "bare", tmp_path / "half", "--dtype", "float16")
    assert ModelCard.load(tmp_path / "half" / "README.md").data.license is None


@pytest.mark.parametrize("trained", [True, False])
def test_the_snippet_of_the_card_runs(folder, tmp_path, trained, monkeypatch, capsys):
    if not trained:
        write_card(folder, {"origin": asdict(RANDOM_WEIGHTS), "versions": versions()})
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    Image.new("RGB", (60, 40)).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("path/to/this/folder", str(folder)), {})
    assert ("blue circle tensor(" if trained else "red blood cell tensor(") in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_the_card_of_each_preset_is_up_to_date(preset):
    """`python model_cards/write.py` brings them up to date."""
    text = (ROOT / "model_cards" / f"{preset}.md").read_text(encoding="utf-8")
    assert text == str(runpy.run_path(ROOT / "model_cards" / "write.py")["card_of"](preset))
    with torch.device("meta"):
        model = Sam3LiteModel(Sam3LiteConfig.from_preset(preset))
    assert f"| parameters | {model.num_parameters() / 1e6:.1f}M" in text
    assert ("sam-license" in text) != preset.startswith("tiny")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["lite", "standard"])
def test_pickled_weights_are_refused_unless_insisted_on(model, tmp_path, kind):
    folder, mark = tmp_path / kind, tmp_path / "executed"
    (model if kind == "lite" else model.to_sam3()).save_pretrained(folder)
    sizes = {"config": model.config} if kind == "standard" else {}
    expected = Sam3LiteModel.from_pretrained(folder, **sizes).state_dict()
    weights = {name: tensor for name, tensor in (model if kind == "lite" else model.to_sam3()).state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for given in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match="only pytorch_model.bin.*use_safetensors=False"):
            Sam3LiteModel.from_pretrained(folder, **sizes, **given)
    found = Sam3LiteModel.from_pretrained(folder, use_safetensors=False, **sizes).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    torch.save({**weights, "evil": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        Sam3LiteModel.from_pretrained(folder, use_safetensors=False, **sizes)
    (folder / "config.json").unlink()
    with pytest.raises(OSError):
        Sam3LiteModel.from_pretrained(folder, config=model.config)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the file does what it is feared for


def test_pickled_weights_on_the_hub_are_refused(hub, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("config.json", "pytorch_model.bin"):
        hub.add_file("me/pickled", name, (tmp_path / name).read_bytes())
    with pytest.raises(OSError, match="only pytorch_model.bin"):
        Sam3LiteModel.from_pretrained("me/pickled")
    loaded = Sam3LiteModel.from_pretrained("me/pickled", use_safetensors=False)
    assert torch.equal(loaded.text_projection.weight, model.text_projection.weight)


def test_the_card_says_that_a_vocabulary_replaced_the_text_encoder_that_was_mapped(model, tmp_path):
    """The report and its counts are of the mapping; a mapping from a frozen model has no text encoder to count."""
    model.to_sam3().save_pretrained(tmp_path / "standard")
    mapped = Sam3LiteModel.from_pretrained(tmp_path / "standard", preset="same")
    report = mapped.mapping_report.to_json()
    mapped.save_pretrained(tmp_path / "full")
    mapped.freeze_vocabulary(["cat"], Sam3LiteProcessor.from_config(mapped.config)).save_pretrained(
        tmp_path / "frozen"
    )
    assert (tmp_path / "frozen" / "mapping_report.json").read_text() == report
    fewer = mapped.config.changed(detr_decoder_layers=1)
    Sam3LiteModel.from_pretrained(tmp_path / "frozen", config=fewer).save_pretrained(tmp_path / "smaller")
    texts = {name: model_card(tmp_path / name).text for name in ("full", "frozen", "smaller")}
    assert all("`mapping_report.json` accounts" in text for text in texts.values())
    assert [name for name, text in texts.items() if "which a fixed vocabulary has replaced since" in text] == [
        "frozen"
    ]


def test_the_card_of_a_frozen_preset_names_it_and_asks_for_what_it_knows(tmp_path):
    model = Sam3LiteModel(Sam3LiteConfig.from_preset("tiny"))
    model.freeze_vocabulary(["cat"], Sam3LiteProcessor.from_config(model.config)).save_pretrained(tmp_path)
    text = model_card(tmp_path).text
    assert "`tiny`" in text and 'phrases = ["cat"]' in text and "Its vocabulary is fixed" in text


@pytest.mark.parametrize(("strategy", "data"), [("isometry", "without data"), ("calibrated", "on unlabelled images")])
def test_the_card_says_what_the_mapping_needed(strategy, data):
    text = _origin_text(Origin("me/large", None, on_hub=True), False, None, {"strategy": strategy})
    assert f"`{strategy}`, {data}" in text
