"""Text encoders of SAM3-LiteText in the place of CLIP's: sizes, equality with Transformers, phrases one by one."""

import re
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, micro_config, shake, with_padding_box
from transformers import Sam3LiteTextModel

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.configuration_sam3_lite import context_length
from sam3_hf.sharing.sizes import preset_of, text_encoder_of

PHRASES = ["red blood cell", "cat", "a very long phrase about the little white dog", "visual"]
KINDS = ["s0", "s1"]  # with convolutions, and without


def lite_text_model(kind: str = "s0", **overrides) -> Sam3LiteModel:
    """A model with a text encoder of SAM3-LiteText whose weights and statistics are none that a fresh one has."""
    torch.manual_seed(0)
    overrides = {"text_config": {"max_position_embeddings": 77}, **overrides}  # a table that has to be resized
    model = shake(Sam3LiteModel(micro_config(text=kind, text_num_hidden_layers=3, **overrides))).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer) * 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.5)  # 1e-5 would hide what the convolutions do
    return model


def features(model, phrases: list[str], length: int | None = None) -> torch.Tensor:
    """Features of the tokens of the first phrase."""
    tokens = Sam3LiteProcessor.from_config(model.config)(text=phrases)
    ids, mask = (tokens[name][:, :length] for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found = model.get_text_features(ids, mask).pooler_output
    return found[0, : int(mask[0].sum())]


# Million parameters as published with the checkpoints, with both projections.
@pytest.mark.parametrize(("kind", "published"), [("s0", 42.54), ("s1", 63.53), ("l", 123.80)])
def test_sizes_are_those_of_the_published_text_encoders(kind, published):
    with torch.device("meta"):
        model = Sam3LiteModel(Sam3LiteConfig.from_preset("lite", text=kind))
        stock = Sam3LiteTextModel(model.to_sam3().config)
    text, ours = stock.text_encoder, model.text_encoder
    total = text.num_parameters() + stock.text_projection.weight.numel() + stock.text_projection.bias.numel()
    assert total / 1e6 == pytest.approx(published, abs=0.005)
    shapes = {name: tensor.shape for name, tensor in text.state_dict().items() if name != "projection.weight"}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert context_length(model.config.text_config) == 16


# Million parameters, and without the text encoder.
PRESET_SIZES = {
    ("lite", "s0"): (260.9, 218.8),
    ("lite", "s1"): (281.9, 218.8),
    ("lite", "l"): (341.9, 218.9),
    ("small", "s0"): (126.9, 84.8),
    ("small", "s1"): (147.9, 84.8),
    ("small", "l"): (207.9, 84.8),
}


@pytest.mark.parametrize(("preset", "kind"), PRESET_SIZES)
def test_presets_have_text_encoders_as_an_axis(preset, kind):
    with torch.device("meta"):
        model = Sam3LiteModel(Sam3LiteConfig.from_preset(preset, text=kind))
    total, text = (part.num_parameters() / 1e6 for part in (model, model.text_encoder))
    sizes = PRESET_SIZES[preset, kind]
    assert (round(total, 1), round(total - text, 1)) == sizes
    row = f"| {sizes[0]}M | {sizes[1]}M | {2 * total:.0f} MB |"
    table = (Path(__file__).parents[1] / "docs/mapping.md").read_text(encoding="utf-8")
    assert row in next(line for line in table.splitlines() if line.startswith(f"| {preset}, text {kind} |"))
    assert (preset_of(model.config), text_encoder_of(model.config)) == (preset, kind)


@pytest.mark.parametrize("preset", ["lite", "small"])
def test_the_sizes_of_the_readme(preset):
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    [header] = [line for line in lines if line.strip().startswith("| preset | text")]
    kinds = re.findall(r"text `(\w+)`", header)
    assert kinds == ["standard", "l", "s1", "s0"]
    cells = [f"`{preset}`"]
    for kind in kinds:
        with torch.device("meta"):
            total = Sam3LiteModel(Sam3LiteConfig.from_preset(preset, text=kind)).num_parameters() / 1e6
        cells.append(f"{total:.0f}M, {2 * total:.0f} MB")
    assert f"| {' | '.join(cells)} |" in [line.strip() for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_stock(kind, inputs):
    model = lite_text_model(kind)
    stock = model.to_sam3()
    assert type(stock) is Sam3LiteTextModel
    tokens = dict(Sam3LiteProcessor.from_config(model.config)(text=PHRASES[:3]))
    assert tokens["input_ids"].shape == (3, 16)
    inputs = {"pixel_values": inputs["pixel_values"], **tokens}
    with torch.no_grad():
        ours, theirs = model(**inputs), stock(**with_padding_box(inputs))
        words = model.get_text_features(**tokens).pooler_output
        expected = stock.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(words, expected, rtol=0, atol=1e-5)
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_features_of_a_phrase_do_not_depend_on_its_neighbours(kind, training):
    model = lite_text_model(kind).train(training)
    alone = features(model, PHRASES[:1])
    assert alone.std() > 0.01
    for others in (PHRASES[1:2], PHRASES[1:], PHRASES[:1]):
        torch.testing.assert_close(features(model, [PHRASES[0], *others]), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(features(model, PHRASES[:1], length=len(alone)), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_any_kind_and_length_reads_the_same(kind):
    model = lite_text_model(kind)
    tokens = Sam3LiteProcessor.from_config(model.config)(text=PHRASES[:2])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    expected = model.get_text_features(ids, mask).pooler_output
    as_stock_pads = torch.nn.functional.pad(ids, (0, 16), value=1023), torch.nn.functional.pad(mask, (0, 16))
    zeros = ids * mask, mask
    for padded in (as_stock_pads, zeros):
        found = model.get_text_features(*padded).pooler_output
        assert found.shape[1] == padded[0].shape[1]
        torch.testing.assert_close(found[:, :16], expected, rtol=0, atol=1e-6)


def test_layers_that_stay_on_one_device_exist():
    model = lite_text_model()
    classes = {type(module).__name__ for module in model.text_encoder.modules()}
    assert set(model.text_encoder._no_split_modules) <= classes
    assert set(model.text_encoder._no_split_modules) <= set(model._no_split_modules)


def test_more_tokens_than_the_encoder_reads_are_refused():
    model = lite_text_model()
    with pytest.raises(ValueError, match="has 17 tokens, this text encoder reads 16"):
        model.get_text_features(torch.full((1, 17), 5))


def test_a_table_of_few_positions_is_used_as_it_is():
    model = lite_text_model(text_config={"max_position_embeddings": 20})
    assert Sam3LiteProcessor.from_config(model.config)(text="cat")["input_ids"].shape == (1, 20)


def test_the_processor_cuts_to_what_the_encoder_reads(tmp_path, caplog):
    processor = Sam3LiteProcessor.from_config(lite_text_model().config)
    processor.save_pretrained(tmp_path)
    loaded = Sam3LiteProcessor.from_pretrained(tmp_path)
    tokens = loaded(text=" ".join(["dog"] * 20))
    assert tokens["input_ids"].shape == (1, 16) and tokens["input_ids"][0, -1] == 1023
    assert "longer than 16 tokens" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text": "s2"}, "no text encoder 's2'.*standard, s0, s1, l"),
        ({"text": "s0", "text_config": {"repmixer_kernel_size": 4}}, "repmixer_kernel_size` must be odd, got 4"),
        ({"text": "s0", "text_config": {"hiden_size": 64}}, "text_config.hiden_size`.*`hidden_size`"),
        ({"text_config": {"model_type": "bert"}}, "text_config.model_type` must be 'clip_text_model'.*got 'bert'"),
    ],
)
def test_impossible_text_encoders_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        Sam3LiteConfig.from_preset("tiny", **overrides)


def test_a_text_encoder_is_kept_where_a_configuration_is_saved_or_resized(tmp_path):
    config = Sam3LiteConfig.from_preset("tiny-standard", text="s1", text_num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    loaded = Sam3LiteConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.at_preset("tiny").text_config.to_dict() == config.text_config.to_dict()
    assert loaded.at_preset("tiny", text="standard").text_config.model_type == "clip_text_model"
    assert loaded.changed(image_size=64).text_config.to_dict() == config.text_config.to_dict()
    partial = Sam3LiteConfig(text_config={"model_type": "sam3_lite_text_text_model", "num_hidden_layers": 3})
    assert (partial.text_config.num_hidden_layers, partial.text_config.hidden_size) == (3, 512)  # not CLIP's 1024


@pytest.mark.parametrize("kind", KINDS)
def test_stock_reads_what_to_sam3_saves(kind, tmp_path):
    model = lite_text_model(kind)
    model.to_sam3().save_pretrained(tmp_path)
    loaded, info = Sam3LiteTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    for name, tensor in model.text_encoder.state_dict().items():
        assert torch.equal(loaded.text_encoder.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_parameter_learns(kind):
    model = lite_text_model(kind).train()
    before = {name: buffer.clone() for name, buffer in model.text_encoder.named_buffers()}
    tokens = Sam3LiteProcessor.from_config(model.config)(text=PHRASES)
    model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output.pow(2).sum().backward()
    assert not [name for name, p in model.text_encoder.named_parameters() if p.grad is None]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.text_encoder.named_buffers())
