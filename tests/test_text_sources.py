"""Where words come from: checkpoints of SAM3-LiteText, and words from one checkpoint with eyes from another."""

import json

import pytest
import torch
from conftest import micro_config, run, shake
from test_text_encoders import lite_text_model
from transformers import Sam3LiteTextModel

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.checkpoints import native_state_dict, open_checkpoint
from sam3_hf.configuration_sam3_lite import parameter_sizes
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.processing_sam3_lite import clip_tokenizer
from sam3_hf.sharing.model_card import origin_of

WIDE = {"vision_hidden_size": 48, "vision_num_attention_heads": 3, "detr_encoder_layers": 3}
KINDS = ["s0", "s1"]


def save(model, folder):
    """A model with its processor, as they lie in a repository."""
    model.save_pretrained(folder)
    processor = Sam3LiteProcessor.from_config(model.config) if isinstance(model, Sam3LiteModel) else None
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def same_text(model, other) -> bool:
    """Whether two models have the same text encoder and projection."""
    states = [
        {name: tensor for name, tensor in each.state_dict().items() if name.startswith("text_")}
        for each in (model, other)
    ]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


@pytest.fixture(params=KINDS)
def lite_text(request, tmp_path):
    """A model with a text encoder of SAM3-LiteText, and the folder that Transformers writes of it."""
    model = lite_text_model(request.param, **WIDE)
    model.to_sam3().save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock/config.json").read_text())["model_type"] == "sam3_lite_text"
    return model, tmp_path / "stock"


def smaller(config):
    """The micro sizes with the text encoder of `config`."""
    return micro_config(text_config=config.text_config.to_dict(), text_num_hidden_layers=3)


def test_a_checkpoint_of_transformers_is_copied(lite_text, inputs):
    model, folder = lite_text
    loaded = Sam3LiteModel.from_pretrained(folder, preset="same")
    assert loaded.mapping_report.strategy == "copy" and same_text(loaded, model)
    assert parameter_sizes(loaded.config) == parameter_sizes(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).pred_masks, model(**inputs).pred_masks)


def test_text_is_copied_where_the_rest_is_mapped(lite_text, tmp_path):
    model, folder = lite_text
    made = Sam3LiteModel.from_pretrained(folder, config=smaller(model.config))
    report = made.mapping_report
    assert report.strategy == "isometry" and same_text(made, model)
    actions = {row.action for row in report.rows if row.group.startswith("text_") and row.target_shape}
    assert actions == {"copied"}
    assert any(row.action == "rotated" for row in report.rows if row.group.startswith("vision_encoder"))
    made.save_pretrained(tmp_path / "lite")
    assert same_text(Sam3LiteModel.from_pretrained(tmp_path / "lite"), model)


def test_presets_keep_the_text_encoder_of_the_source(lite_text):
    model, folder = lite_text
    found, own = open_checkpoint(folder).config_at("small").text_config, model.config.text_config
    assert {**found.to_dict(), "dtype": None} == {**own.to_dict(), "dtype": None}


@pytest.mark.parametrize("overrides", [{"text": "standard"}, {"text_hidden_size": 16}, {"text": "l"}])
def test_a_text_encoder_is_neither_resized_nor_made_another(lite_text, overrides):
    model, folder = lite_text
    with pytest.raises(ValueError, match="cannot be made into.*text_config.*--text-encoder"):
        Sam3LiteModel.from_pretrained(folder, preset="same", **overrides)


def test_a_file_of_transformers_loads_again_after_to_sam3(lite_text, tmp_path):
    model, folder = lite_text
    Sam3LiteModel.from_pretrained(folder, preset="same").to_sam3().save_pretrained(tmp_path / "again")
    first, second = (Sam3LiteTextModel.from_pretrained(path) for path in (folder, tmp_path / "again"))
    assert same_text(Sam3LiteModel.from_pretrained(tmp_path / "again", preset="same"), model)
    assert first.config.text_config.to_dict() == second.config.text_config.to_dict()


@pytest.fixture
def eyes(tmp_path):
    """A model with CLIP's text encoder, saved."""
    torch.manual_seed(1)
    model = shake(Sam3LiteModel(micro_config()), seed=1).eval()
    return model, save(model, tmp_path / "eyes")


def test_words_come_from_one_checkpoint_and_eyes_from_another(lite_text, eyes, inputs):
    (words, folder), (seen, source) = lite_text, eyes
    model = Sam3LiteModel.from_pretrained(source, text_encoder=folder)
    assert same_text(model, words) and model.mapping_report.strategy == "copy"
    for name, tensor in seen.state_dict().items():
        assert name.startswith("text_") or torch.equal(model.state_dict()[name], tensor)
    rows = [row for row in model.mapping_report.rows if row.group.startswith("text_")]
    assert {row.reason for row in rows if row.target_shape} == {f"from {folder}"}
    assert {f"replaced by that of {folder}"} <= {row.reason for row in rows if not row.target_shape}
    assert all(not row.reason for row in model.mapping_report.rows if row.group.startswith("detr_"))
    assert f"with the text encoder of {folder}" in str(model.mapping_report)
    with torch.no_grad():
        text = words.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        rest = {"pixel_values": inputs["pixel_values"], "attention_mask": inputs["attention_mask"]}
        assert torch.equal(model(**inputs).pred_logits, seen(text_embeds=text, **rest).pred_logits)


def test_words_can_be_those_of_clip(lite_text, eyes):
    (_, folder), (clip, words) = lite_text, eyes
    model = Sam3LiteModel.from_pretrained(folder, preset="same", text_encoder=words)
    assert same_text(model, clip) and model.config.text_config.model_type == "clip_text_model"


def test_words_of_another_width_or_none_are_refused(eyes, tmp_path):
    model, source = eyes
    frozen = Sam3LiteModel.from_pretrained(source)
    frozen.freeze_vocabulary(["cat"], Sam3LiteProcessor.from_config(frozen.config)).save_pretrained(
        tmp_path / "frozen"
    )
    with pytest.raises(ValueError, match="frozen has a fixed vocabulary and no text encoder"):
        Sam3LiteModel.from_pretrained(source, text_encoder=tmp_path / "frozen")
    with pytest.raises(ValueError, match="frozen has a fixed vocabulary.*restore_text_encoder"):
        Sam3LiteModel.from_pretrained(tmp_path / "frozen", text_encoder=source)
    with pytest.raises(OSError, match="nowhere"):
        Sam3LiteModel.from_pretrained(source, text_encoder=tmp_path / "nowhere")


def test_convert_takes_words_from_another_model(lite_text, eyes, tmp_path):
    (words, folder), (_, source) = lite_text, eyes
    result = run("convert", source, tmp_path / "both", "--text-encoder", folder, "--report")
    assert result.exit_code == 0, result.output
    model = Sam3LiteModel.from_pretrained(tmp_path / "both")
    assert same_text(model, words) and "replaced by that of" in result.output
    assert Sam3LiteProcessor.from_pretrained(tmp_path / "both")(text="cat")["input_ids"].shape == (1, 16)
    assert "text encoder is that of `stock`" in (tmp_path / "both/README.md").read_text()
    report = json.loads((tmp_path / "both/mapping_report.json").read_text())
    assert report["text_source"] == str(folder)
    assert origin_of(source).derived is None  # it says nothing of itself, but words of SAM 3 are SAM 3's
    assert (tmp_path / "both/LICENSE").is_file() and origin_of(tmp_path / "both").derived is True


def test_the_tokenizer_of_the_words_is_cut_to_what_they_read(lite_text):
    model, folder = lite_text
    tokenizer = clip_tokenizer(1024)
    tokenizer.model_max_length = 77  # as in the repositories of SAM3-LiteText
    tokenizer.save_pretrained(folder)
    assert Sam3LiteProcessor.of_source(folder, model.config)(text="cat")["input_ids"].shape == (1, 16)


def test_calibration_asks_in_the_words_of_the_other_model(lite_text, eyes, tmp_path):
    (words, folder), (_, source) = lite_text, eyes
    model = calibrate_mapping(
        source,
        text_encoder=folder,
        config=smaller(words.config).changed(vision_num_hidden_layers=1, vision_global_attn_indexes=[0]),
        num_images=4,
        search_depth=False,
    )
    assert same_text(model, words)


def test_files_of_efficientsam3_are_refused_with_the_reason(tmp_path):
    state = native_state_dict(Sam3LiteModel(micro_config()).state_dict())
    state = {name: tensor for name, tensor in state.items() if "language_backbone" not in name}
    text = "backbone.language_backbone"
    state |= {
        f"{text}.encoder.embedding_layer.weight": torch.zeros(8, 4),
        f"{text}.projector.weight": torch.zeros(4, 4),
    }
    torch.save({"model": {f"detector.{name}": tensor for name, tensor in state.items()}}, tmp_path / "efficient.pt")
    with pytest.raises(ValueError, match="EfficientSAM3.*take it as Transformers has it.*vil-uob/sam3-litetext-s0"):
        Sam3LiteModel.from_pretrained(tmp_path / "efficient.pt")
