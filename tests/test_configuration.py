import json

import pytest
import torch
from conftest import stock_config
from transformers import Sam3Model

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.presets_sam3_lite import PRESETS, spread_global_layers

# Million parameters of the stock modules at these sizes, in all and without the text encoder.
PRESET_SIZES = {
    "standard": (840.4, 486.9),
    "medium": (685.3, 331.9),
    "depth16": (611.0, 257.6),
    "lite-plus": (577.8, 224.2),
    "lite": (573.8, 220.3),
    "small-plus": (443.6, 90.1),
    "small": (439.7, 86.2),
}


@pytest.mark.parametrize("preset", PRESET_SIZES)
def test_preset_sizes(preset):
    with torch.device("meta"):
        model = Sam3LiteModel(Sam3LiteConfig.from_preset(preset))
        stock = Sam3Model(stock_config(model.config))
    total = model.num_parameters() / 1e6
    assert total == pytest.approx(PRESET_SIZES[preset][0], rel=0.005)
    # Stock modules carry parameters that nothing reads; without the text encoder those weigh more than 0.5%.
    idle = [stock.vision_encoder.neck.fpn_layers[3], stock.mask_decoder.pixel_decoder.conv_layers[2]]
    idle_size = sum(p.numel() for part in idle for p in part.parameters()) / 1e6
    without_text = total - model.text_encoder.num_parameters() / 1e6
    assert without_text + idle_size == pytest.approx(PRESET_SIZES[preset][1], rel=0.005)
    assert without_text < PRESET_SIZES[preset][1]


def test_default_is_lite():
    assert Sam3LiteConfig().to_dict() == Sam3LiteConfig.from_preset("lite").to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(preset, tmp_path):
    config = Sam3LiteConfig.from_preset(preset, loss_config={"cost_class": 3.0})
    config.save_pretrained(tmp_path)
    assert Sam3LiteConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_width_keeps_head_size_and_mlp_ratio():
    vit = Sam3LiteConfig.from_preset("lite", vision_hidden_size=640).vision_config.backbone_config
    assert (vit.hidden_size, vit.num_attention_heads, vit.intermediate_size) == (640, 10, 2960)


def test_depth_spreads_global_layers():
    vit = Sam3LiteConfig.from_preset("lite", vision_num_hidden_layers=20).vision_config.backbone_config
    assert vit.global_attn_indexes == [4, 9, 14, 19]
    assert spread_global_layers(2, 4) == [0, 1]


def test_everything_in_between_can_be_built():
    config = Sam3LiteConfig.from_preset(
        "tiny",
        image_size=96,
        vision_hidden_size=80,
        vision_num_attention_heads=4,
        vision_num_hidden_layers=5,
        detr_encoder_layers=1,
        detr_decoder_layers=3,
        num_queries=7,
        detr_decoder_config={"dropout": 0.2},
    )
    outputs = Sam3LiteModel(config)(
        pixel_values=torch.zeros(1, 3, 96, 96), input_ids=torch.ones(1, 4, dtype=torch.long)
    )
    assert outputs.pred_boxes.shape == (1, 7, 4)
    assert outputs.pred_masks.shape == (1, 7, 48, 48)
    assert config.detr_decoder_config.dropout == 0.2
    assert config.detr_decoder_config.num_queries == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision_hidden_size": 800}, "`vision_hidden_size`=800.*768 or 832"),
        ({"vision_num_attention_heads": 7}, "hidden_size`=768.*num_attention_heads.*770"),
        ({"vision_num_attention_heads": 384}, "num_attention_heads`=384.*multiple of 4.*12"),
        ({"image_size": 1000}, "image_size`=1000.*994 or 1008"),
        ({"vision_global_attn_indexes": [40]}, r"global_attn_indexes.*\[40\].*\[5, 11, 17, 23\]"),
        ({"imagesize": 1008}, "`imagesize`.*did you mean `image_size`"),
        ({"vision_config": {"backbone_config": {"hiden_size": 512}}}, "backbone_config.hiden_size`.*`hidden_size`"),
        ({"detr_encoder_config": {"num_layer": 4}}, "detr_encoder_config.num_layer`.*`num_layers`"),
        ({"loss_config": {"cost_clas": 1.0}}, "loss_config.cost_clas`.*`cost_class`"),
        ({"detr_encoder_config": {"hidden_size": 128}}, "detr_encoder_config.hidden_size`=128 must equal"),
        ({"detr_decoder_layers": 0}, "detr_decoder_config.num_layers` must be at least 1"),
        ({"detr_encoder_layers": 0}, "detr_encoder_config.num_layers` must be at least 1"),
        ({"num_queries": 0}, "detr_decoder_config.num_queries` must be at least 1, got 0"),
        ({"vision_num_hidden_layers": 0}, "backbone_config.num_hidden_layers` must be at least 1"),
        ({"vision_num_hidden_layers": -2}, "backbone_config.num_hidden_layers` must be at least 1"),
        ({"vision_window_size": 0}, "backbone_config.window_size` must be at least 1"),
        ({"vision_num_attention_heads": 0}, "backbone_config.num_attention_heads` must be at least 1"),
        ({"patch_size": 0}, "backbone_config.patch_size` must be at least 1"),
        ({"image_size": 0}, "backbone_config.image_size`=0 .*positive multiple of patch_size.*14 or 28"),
        ({"image_size": -14}, "backbone_config.image_size`=-14 .*14 or 28"),
        ({"vision_hidden_size": 0}, "`vision_hidden_size`=0 .*64 or 128"),
        ({"vision_hidden_size": 0, "vision_num_attention_heads": 4}, "backbone_config.hidden_size`=0 .*4 or 8"),
        ({"text_num_hidden_layers": 0}, "text_config.num_hidden_layers` must be at least 1"),
        ({"text_num_attention_heads": 0}, "text_config.num_attention_heads` must be at least 1"),
        ({"text_num_attention_heads": 3}, r"text_config.hidden_size`=1024 .*num_attention_heads \(3\).*1023 or 1026"),
        ({"text_config": {"max_position_embeddings": 31}}, "text_config.max_position_embeddings` must be at least 32"),
        ({"detr_decoder_config": {"num_attention_heads": 3}}, "detr_decoder_config.hidden_size`=256 .*255 or 258"),
        ({"geometry_encoder_config": {"roi_size": 0}}, "geometry_encoder_config.roi_size` must be at least 1"),
        ({"loss_config": {"one_to_many_topk": 0}}, "loss_config.one_to_many_topk` must be at least 1"),
    ],
)
def test_impossible_fields_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        Sam3LiteConfig.from_preset("lite", **overrides)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'lit'; did you mean `lite`"):
        Sam3LiteConfig.from_preset("lit")


@pytest.mark.parametrize("field", ["image_size", "vision_hidden_size", "vision_num_hidden_layers", "num_queries"])
def test_wrong_type_is_named(field):
    with pytest.raises(Exception, match=field.removeprefix("vision_")):
        Sam3LiteConfig.from_preset("lite", **{field: "big"})


def test_impossible_size_set_later_is_found_by_the_model():
    config = Sam3LiteConfig.from_preset("tiny")
    config.vision_config.backbone_config.num_attention_heads = 7
    with pytest.raises(ValueError, match="num_attention_heads"):
        Sam3LiteModel(config)
    config = Sam3LiteConfig.from_preset("tiny")
    config.detr_decoder_config.num_queries = 0
    with pytest.raises(ValueError, match="num_queries` must be at least 1"):
        Sam3LiteModel(config)


def test_fields_of_another_transformers_version_only_warn(tmp_path):
    Sam3LiteConfig.from_preset("tiny").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["vision_config"]["backbone_config"]["field_of_the_future"] = 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="field_of_the_future"):
        Sam3LiteConfig.from_pretrained(tmp_path)
    fields["transformers_version"] = "5.99.0"
    path.write_text(json.dumps(fields))
    assert Sam3LiteConfig.from_pretrained(tmp_path).image_size == 128


def test_the_sizes_of_a_preset_for_the_same_use():
    config = Sam3LiteConfig.from_preset("standard", image_size=672, num_queries=50, vocabulary=["cat", "dog"])
    smaller = config.at_preset("lite")
    assert smaller.vision_config.backbone_config.hidden_size == 768
    assert (smaller.image_size, smaller.detr_decoder_config.num_queries) == (672, 50)
    assert smaller.vocabulary == ["cat", "dog"]
    assert config.at_preset("lite", image_size=336).image_size == 336
    with pytest.raises(ValueError, match="nonsense"):
        config.at_preset("lite", nonsense=1)
