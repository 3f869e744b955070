"""Smaller text encoders of CLIP's kind: their sizes, and their fit to phrases."""

import json

import pytest
import torch
from conftest import micro_config, run, shake

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.phrases import everyday_nouns, everyday_phrases, hold_out, plural, read_phrases
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.model import build_model

NOUNS = "cat dog cell star ring cross heart circle square car bus tree house boat shoe bag cup".split()
PHRASES = [f"{adjective} {noun}".strip() for adjective in ("", "red", "small", "striped") for noun in NOUNS]
LAYERS = "text_encoder.text_model.encoder.layers"


def features(model, phrases=("red fox", "old dog", "tiny ring")) -> torch.Tensor:
    tokens = Sam3LiteProcessor.from_config(model.config)(text=list(phrases))
    with torch.no_grad():
        found = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    return found[tokens["attention_mask"].bool()]


def cosine(model, other) -> float:
    return torch.nn.functional.cosine_similarity(features(model), features(other), dim=-1).mean().item()


@pytest.fixture(scope="module")
def wide() -> Sam3LiteModel:
    """A text encoder of four layers, the second of which does nothing."""
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config(text_num_hidden_layers=4))).eval()
    with torch.no_grad():
        idle = model.text_encoder.text_model.encoder.layers[1]
        for linear in (idle.self_attn.out_proj, idle.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


@pytest.fixture(scope="module")
def source(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    wide.save_pretrained(folder)
    Sam3LiteProcessor.from_config(wide.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def narrow(source) -> Sam3LiteModel:
    return Sam3LiteModel.from_pretrained(source, text_hidden_size=32, text_phrases=PHRASES)


# sizes


def test_heads_and_mlp_follow_the_width():
    text = Sam3LiteConfig.from_preset("lite", text_hidden_size=512, text_num_hidden_layers=12).text_config
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (512, 8, 2048)
    assert text.num_hidden_layers == 12
    text = micro_config(text_hidden_size=32, text_intermediate_size=100, text_num_attention_heads=1).text_config
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (32, 1, 100)
    text = Sam3LiteConfig.from_preset("lite", text="s0", text_hidden_size=256).text_config
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (256, 4, 1024)
    with pytest.raises(ValueError, match="`text_hidden_size`=100.*head size 64.*64 or 128.*text_num_attention_heads"):
        Sam3LiteConfig.from_preset("lite", text_hidden_size=100)


def test_a_smaller_text_encoder_stays_where_the_rest_becomes_smaller():
    config = Sam3LiteConfig.from_preset("standard", text_hidden_size=512)
    assert config.at_preset("lite").text_config.to_dict() == config.text_config.to_dict()
    assert config.at_preset("lite", text_num_hidden_layers=6).text_config.hidden_size == 512
    assert config.at_preset("lite", text="standard").text_config.hidden_size == 1024


# the fit


def test_the_fit_comes_nearer_than_rotation_alone(wide, source, narrow):
    rotated = Sam3LiteModel.from_pretrained(source, text_hidden_size=32, mapping="isometry")
    assert "text" not in rotated.mapping_report.calibration
    before, after = cosine(rotated, wide), cosine(narrow, wide)
    assert before < after - 0.03
    said = narrow.mapping_report.calibration["text"]
    assert said["cosine"] > said["cosine_before_fit"] + 0.03 and said["cosine"] == pytest.approx(after, abs=0.1)
    for name, tensor in wide.state_dict().items():
        assert name.startswith("text_") or torch.equal(narrow.state_dict()[name], tensor)


def test_the_report_says_what_was_fitted(narrow):
    report = narrow.mapping_report
    assert report.strategy == "isometry"
    said = report.calibration["text"]
    assert (said["phrases"], said["phrases_fitted"], said["phrases_held_out"]) == ("given", 60, 8)
    refit = {row.group for row in report.rows if row.action == "refit"}
    assert refit == {f"{LAYERS}.*.self_attn.out_proj", f"{LAYERS}.*.mlp.fc2", "text_projection"}
    assert f"fitted to 60 phrases: cosine of its features to the larger one's {said['cosine']:.3f}" in str(report)
    assert json.loads(report.to_json())["calibration"]["text"] == said


def test_the_layer_that_does_nothing_is_dropped(wide, source):
    model = Sam3LiteModel.from_pretrained(source, text_num_hidden_layers=3, text_phrases=PHRASES)
    assert model.mapping_report.layers[LAYERS] == [0, 2, 3]
    assert model.mapping_report.calibration["text"]["layer_choices_tried"] > 1
    torch.testing.assert_close(features(model), features(wide), rtol=0, atol=1e-3)


def test_the_fit_repeats_and_may_be_in_half_precision(source, narrow):
    again = Sam3LiteModel.from_pretrained(source, text_hidden_size=32, text_phrases=PHRASES)
    assert all(torch.equal(tensor, narrow.state_dict()[name]) for name, tensor in again.state_dict().items())
    half = Sam3LiteModel.from_pretrained(source, text_hidden_size=32, text_phrases=PHRASES, dtype="float16")
    assert half.text_projection.weight.dtype == torch.float16
    assert cosine(half.float(), narrow) > 0.999


def test_the_default_is_everyday_phrases(wide, source):
    model = Sam3LiteModel.from_pretrained(source, text_hidden_size=16)
    said = model.mapping_report.calibration["text"]
    assert said["phrases"] == "everyday" and said["phrases_fitted"] > 4000 and said["cosine"] > 0.8


def test_phrases_for_nothing_are_refused(source):
    with pytest.raises(ValueError, match="`text_phrases`.*does not become smaller"):
        Sam3LiteModel.from_pretrained(source, vision_num_hidden_layers=1, text_phrases=PHRASES)
    with pytest.raises(ValueError, match="`text_phrases`.*the mapping is 'select'"):
        Sam3LiteModel.from_pretrained(source, text_hidden_size=32, mapping="select", text_phrases=PHRASES)
    with pytest.raises(ValueError, match="1 phrases are too few"):
        Sam3LiteModel.from_pretrained(source, text_hidden_size=32, text_phrases=["cat"])


def test_calibration_fits_the_text_encoder_too(wide, source):
    config = micro_config(text_num_hidden_layers=4, text_hidden_size=32, detr_encoder_layers=1)
    model = calibrate_mapping(source, config=config, num_images=4, search_depth=False, text_phrases=PHRASES)
    assert {"text", "pyramid_cosines"} <= set(model.mapping_report.calibration)
    assert cosine(model, wide) > 0.8


# in use


def test_convert(source, narrow, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join([*PHRASES, "", PHRASES[0]]))
    command = ("convert", source, tmp_path / "small", "--text-hidden-size", 32, "--text-num-hidden-layers", 4)
    result = run(*command, "--text-phrases", tmp_path / "words.txt")
    assert result.exit_code == 0, result.output
    model = Sam3LiteModel.from_pretrained(tmp_path / "small")
    assert all(torch.equal(tensor, narrow.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "made smaller and fitted to 60 phrases" in (tmp_path / "small/README.md").read_text()
    again = run("convert", tmp_path / "small", tmp_path / "tiny", "--preset", "tiny", "--mapping", "skip")
    assert again.exit_code == 0, again.output
    assert Sam3LiteModel.from_pretrained(tmp_path / "tiny").config.text_config.hidden_size == 32
    missing = run(*command, "--overwrite", "--text-phrases", tmp_path / "none.txt")
    assert missing.exit_code == 1 and "none.txt: No such file" in missing.output and missing.output.count("\n") == 1


def test_training_starts_from_a_smaller_text_encoder(wide, narrow, tmp_path):
    wide.to_sam3().save_pretrained(tmp_path / "standard")
    (tmp_path / "words.txt").write_text("\n".join(PHRASES))
    sizes = {"vision_config": micro_config().to_dict()["vision_config"], "text_hidden_size": 32}
    sizes |= {"detr_encoder_layers": 2, "detr_decoder_layers": 2}
    flags = ["--data", "x", "--init", tmp_path / "standard", "--preset", "tiny", "--model_overrides"]
    flags += [json.dumps(sizes), "--text_phrases", tmp_path / "words.txt"]
    model = build_model(parse_arguments([*map(str, flags)]), None)
    assert model.config.text_config.hidden_size == 32
    torch.testing.assert_close(features(model), features(narrow), rtol=0, atol=1e-3)


# phrases


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("cat", "cats"),
        ("police officer", "police officers"),
        ("woman", "women"),
        ("man", "men"),
        ("human", "humans"),
        ("bus", "buses"),
        ("watch", "watches"),
        ("baby", "babies"),
        ("toy", "toys"),
        ("wine glass", "wine glasses"),
        ("scissors", "scissors"),
        ("sheep", "sheep"),
        ("potato", "potatoes"),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_everyday_phrases_are_nouns_plurals_and_adjectives():
    phrases = everyday_phrases()
    assert len(phrases) == len(set(phrases)) > 4500
    assert {*everyday_nouns(), "people", "cats"} <= set(phrases)
    assert (
        sum(phrase.endswith(" cat") for phrase in phrases) == sum(phrase.endswith(" cats") for phrase in phrases) == 1
    )


def test_phrases_are_held_out_and_read(tmp_path):
    fitted, held = hold_out(PHRASES)
    assert sorted([*fitted, *held]) == sorted(PHRASES) and len(held) == 8 and hold_out(PHRASES) == (fitted, held)
    assert [len(part) for part in hold_out(["a", "b"])] == [1, 1]
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is no text in UTF-8"):
        read_phrases(tmp_path / "latin.txt")
