"""What `sam3-lite info` says, against the model itself, hand-computed values and the published sizes."""

import json
import resource

import pytest
import torch
from conftest import micro_config
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.checkpoints import native_state_dict
from sam3_hf.cli import app
from sam3_hf.sharing.info import count_flops, model_info
from sam3_hf.sharing.sizes import preset_of


def run(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


@pytest.fixture
def frozen(model) -> Sam3LiteModel:
    return model.freeze_vocabulary(["cat", "red car"], Sam3LiteProcessor.from_config(model.config))


def test_parts_sum_to_the_model(model, tmp_path):
    model.half().save_pretrained(tmp_path)
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["parameters"] == sum(part["parameters"] for part in facts["parts"].values())
    assert facts["parameters"] == model.num_parameters() and facts["bytes"] == 2 * model.num_parameters()
    text = model.text_encoder.num_parameters() + sum(p.numel() for p in model.text_projection.parameters())
    assert facts["parts"]["text encoder"]["parameters"] == text
    assert (facts["dtype"], facts["vocabulary"], facts["preset"]) == ("float16", None, None)
    assert facts["sizes"]["vision_width"] == 32 and facts["sizes"]["queries"] == 12


def test_a_fixed_vocabulary(frozen, tmp_path):
    frozen.half().save_pretrained(tmp_path)
    facts = model_info(tmp_path)
    assert facts["vocabulary"] == ["cat", "red car"] and "text encoder" not in facts["parts"]
    assert facts["parts"]["vocabulary"]["bytes"] == 3 * 32 * (64 * 2 + 8 + 8)  # two classes and "visual"
    assert facts["bytes"] == sum(tensor.nbytes for tensor in frozen.state_dict().values())
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "vocabulary: cat, red car\n" in result.output
    every = facts["flops_per_image"] + facts["flops_per_prompt"]
    assert f"an image with all 2 classes: {every / 1e9:.2f} GFLOP" in result.output


def test_the_table(model, tmp_path):
    model.save_pretrained(tmp_path)
    output = run(tmp_path).output
    facts = model_info(tmp_path)
    for part, values in facts["parts"].items():
        (line,) = [line for line in output.splitlines() if line.startswith(part)]
        assert f"{values['parameters']:,}" in line and line.endswith(values["per"])
    assert "vocabulary: any text" in output and "licence unknown" in output
    assert f"each further prompt: {facts['flops_per_prompt'] / 1e9:.2f} GFLOP" in output


@torch.no_grad()
def test_flops_are_those_of_the_running_model():
    config = micro_config()
    config._attn_implementation = "eager"
    model = Sam3LiteModel(config).eval()
    counted = []
    for prompts in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=torch.zeros(1, 3, 64, 64), text_embeds=torch.zeros(prompts, 32, 64))
        counted.append(counter.get_total_flops())
    flops = count_flops(micro_config())
    per_prompt = sum(flops[part] for part in ("DETR encoder", "DETR decoder", "mask decoder", "scoring"))
    per_image = flops["vision encoder"] + flops["summary token"]
    assert flops["summary token"] > 0 and counted[0] == per_image + per_prompt
    # Further prompts share what depends on the image alone.
    assert all(count < per_image + (i + 1) * per_prompt for i, count in enumerate(counted) if i)


def test_flops_by_hand():
    """One CLIP layer on 32 tokens of width 64: four projections, scores and values, and the MLP; then the output."""
    layer = 4 * 32 * 64 * 64 + 2 * 32 * 32 * 64 + 2 * 32 * 64 * 256
    assert count_flops(micro_config())["text encoder"] == 2 * (layer + 32 * 64 * 64)


def test_flops_of_the_preset_lite():
    """Figures of the stock modules at these sizes, in TFLOP, less the mask projection, which goes to the queries."""
    flops = count_flops(Sam3LiteConfig.from_preset("lite"))
    expected = {"vision encoder": 2.64, "DETR encoder": 0.171, "DETR decoder": 0.014, "mask decoder": 0.1325}
    for part, value in expected.items():
        assert flops[part] / 1e12 == pytest.approx(value, abs=0.005 if value > 1 else 0.0005), part


def test_presets_are_recognised_at_any_resolution_and_vocabulary():
    assert preset_of(Sam3LiteConfig.from_preset("small", image_size=672, vocabulary=["cat"])) == "small"
    assert preset_of(Sam3LiteConfig.from_preset("small", num_queries=100)) is None


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (None, "unknown"),
        ("# No fields\n", "unknown"),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: sam-license\n---\n", "sam-license"),
    ],
)
def test_licence(model, tmp_path, card, license):
    model.save_pretrained(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert model_info(tmp_path)["license"] == license


def test_totals_of_the_mapping(model, tmp_path):
    model.to_sam3().save_pretrained(tmp_path / "standard")
    lite = Sam3LiteModel.from_pretrained(tmp_path / "standard", preset="same")
    lite.save_pretrained(tmp_path / "lite")
    totals = lite.mapping_report.totals
    assert model_info(tmp_path / "lite")["mapping"]["totals"] == totals
    assert f"{totals['copied']['tensors']} tensors copied" in run(tmp_path / "lite").output
    stock = model_info(tmp_path / "standard")
    assert stock["mapping"] is None
    assert stock["parameters"] == model.num_parameters()  # those that nothing reads do not count


def test_a_native_file(model, tmp_path):
    torch.save({"model": native_state_dict(model.state_dict())}, tmp_path / "sam3.pt")
    facts = model_info(tmp_path / "sam3.pt")
    assert facts["parameters"] == model.num_parameters() and facts["license"] == "unknown"


def test_a_large_model_is_not_loaded(tmp_path):
    """A file of `lite` in FP16 that is all hole: its bytes would take memory if they were read."""
    config = Sam3LiteConfig.from_preset("lite")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Sam3LiteModel(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = model_info(tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert facts["bytes"] == end > 1.1e9 and facts["preset"] == "lite"
    assert grown < 0.3 * end


def test_errors_are_one_line(model, tmp_path):
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "README.md").write_text("---\nlicense: [x\n---\n")
    state = model.state_dict()
    state.pop("detr_decoder.query_embed.weight")
    model.save_pretrained(tmp_path / "part", state_dict=state)
    expected = {"empty": "neither a config.json", "broken": "README.md", "part": "lacks 1 tensors"}
    for folder, message in expected.items():
        result = run(tmp_path / folder)
        assert result.exit_code == 1 and result.stdout == "", result.output
        assert message in result.stderr and result.stderr.startswith("Error: ")
