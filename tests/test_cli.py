import torch
from transformers import AutoModel
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_half_the_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "half", "--preset", "same", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "torch.float16" in result.output and "source:" in result.output
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


def test_errors_are_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "target", "--preset", "lite")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "grow" in result.output
    assert not (tmp_path / "target").exists()
