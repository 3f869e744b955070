"""Presets of the lite SAM 3 family: names for sizes."""

from __future__ import annotations

from .limits_sam3_lite import did_you_mean

# Width of the ViT MLP relative to its hidden size: 4736 / 1024 in `facebook/sam3`.
MLP_RATIO = 4.625

# Epsilon of the ViT's LayerNorms in Meta's code (`sam3/model_builder.py`); Transformers' converter wrote 1e-6.
VIT_LAYER_NORM_EPS = 1e-5

# One row per preset: ViT width, depth, heads, global attention layers, DETR encoder and decoder depth.
_FULL_SIZE_PRESETS = {
    "standard": (1024, 32, 16, [7, 15, 23, 31], 6, 6),
    "medium": (896, 28, 14, [6, 13, 20, 27], 4, 4),
    "depth16": (1024, 16, 16, [6, 11, 13, 15], 4, 4),
    "lite-plus": (768, 24, 12, [5, 11, 17, 23], 4, 6),
    "lite": (768, 24, 12, [5, 11, 17, 23], 4, 4),
    "small-plus": (512, 16, 8, [3, 7, 11, 15], 4, 6),
    "small": (512, 16, 8, [3, 7, 11, 15], 4, 4),
}
# The same two-sided family in miniature: tiny is to tiny-standard what lite is to standard.
_MINIATURE_PRESETS = {
    "tiny-standard": (128, 8, 4, [3, 7], 6, 6),
    "tiny-plus": (96, 6, 3, [2, 5], 4, 6),
    "tiny": (96, 6, 3, [2, 5], 4, 4),
}
PRESETS = (*_FULL_SIZE_PRESETS, *_MINIATURE_PRESETS)

# Model types of the two kinds of text encoder: that of SAM 3, and that of SAM3-LiteText.
CLIP_TEXT, LITE_TEXT = "clip_text_model", "sam3_lite_text_text_model"
# One row per text encoder of SAM3-LiteText (vil-uob/sam3-litetext-s0, -s1, -l): width, layers, heads, whether the
# first and the last layer are convolutions; in miniature beside it. As Transformers' conversion script reads them off
# those checkpoints (`convert_sam3_lite_text_to_hf.py`: MLP 4 times the width, heads of 64 channels). With 16 positions
# and the projection to 256 channels they have the parameters of its `model_doc/sam3_lite_text.md`, 42.54M, 63.53M and
# 123.80M.
_LITE_TEXT_SIZES = {
    "s0": ((512, 6, 8, True), (32, 3, 2, True)),
    "s1": ((512, 12, 8, False), (32, 2, 2, False)),
    "l": ((768, 12, 12, False), (48, 2, 3, False)),
}
# `standard` is that of SAM 3.
TEXT_ENCODERS = ("standard", *_LITE_TEXT_SIZES)


def preset_fields(name: str, text: str = "standard") -> dict:
    """
    The nested fields of a preset, as keyword arguments of [`Sam3LiteConfig`].

    Args:
        text: its text encoder, one of `TEXT_ENCODERS`.

    Raises:
        ValueError: no preset or text encoder of that name.
    """
    if name in _FULL_SIZE_PRESETS:
        fields = _full_size_fields(*_FULL_SIZE_PRESETS[name])
    elif name in _MINIATURE_PRESETS:
        fields = _miniature_fields(*_MINIATURE_PRESETS[name])
    else:
        raise ValueError(f"There is no preset {name!r}{did_you_mean(name, PRESETS)}. Presets: {', '.join(PRESETS)}.")
    if text in _LITE_TEXT_SIZES:
        full, miniature = _LITE_TEXT_SIZES[text]
        vocab_size = fields["text_config"]["vocab_size"]
        fields["text_config"] = _lite_text_fields(*(full if name in _FULL_SIZE_PRESETS else miniature), vocab_size)
    elif text != "standard":
        raise ValueError(
            f"There is no text encoder {text!r}{did_you_mean(str(text), TEXT_ENCODERS)}. Text encoders: "
            f"{', '.join(TEXT_ENCODERS)}."
        )
    return fields


def spread_global_layers(num_hidden_layers: int, num_global: int) -> list[int]:
    """Indices of `num_global` global attention layers at the ends of equal periods, e.g. 24, 4 -> [5, 11, 17, 23]."""
    count = min(num_global, num_hidden_layers)
    return [(i + 1) * num_hidden_layers // count - 1 for i in range(count)]


def _full_size_fields(width, depth, heads, global_layers, encoder_layers, decoder_layers) -> dict:
    vit = {
        "model_type": "sam3_vit_model",
        "hidden_size": width,
        "intermediate_size": round(width * MLP_RATIO),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "global_attn_indexes": list(global_layers),
        "layer_norm_eps": VIT_LAYER_NORM_EPS,
    }
    text = {
        "model_type": CLIP_TEXT,
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
    }
    return {
        "vision_config": {"backbone_config": vit},
        "text_config": text,
        "geometry_encoder_config": {},
        "detr_encoder_config": {"num_layers": encoder_layers},
        "detr_decoder_config": {"num_layers": decoder_layers},
        "mask_decoder_config": {},
        "loss_config": {},
    }


def _lite_text_fields(width, depth, heads, convolutions, vocab_size) -> dict:
    return {
        "model_type": LITE_TEXT,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": 16,
        "use_repmixer_blocks": convolutions,
    }


def _miniature_fields(width, depth, heads, global_layers, encoder_layers, decoder_layers) -> dict:
    fields = _full_size_fields(width, depth, heads, global_layers, encoder_layers, decoder_layers)
    fields["vision_config"]["fpn_hidden_size"] = 64
    fields["vision_config"]["backbone_config"].update(
        image_size=128, patch_size=8, pretrain_image_size=128, window_size=8
    )
    fields["text_config"].update(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1022,
        eos_token_id=1023,
        pad_token_id=1023,
    )
    transformer = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "dropout": 0.0}
    fields["geometry_encoder_config"] = {**transformer, "num_layers": 2, "roi_size": 3}
    fields["detr_encoder_config"].update(transformer)
    fields["detr_decoder_config"].update(transformer, num_queries=50)
    fields["mask_decoder_config"].update(hidden_size=64, num_attention_heads=4)
    # The usual 0.02 suits a width of 1024; a narrow model would start with next to no signal in its branches.
    for part in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config"):
        fields[part]["initializer_range"] = 0.1
    fields["vision_config"]["backbone_config"]["initializer_range"] = 0.05
    fields["initializer_range"] = 0.1
    # Masks and classes have to be learnt from nothing here, and the class loss is divided by at least 200 queries.
    fields["loss_config"] = {
        "mask_num_points": 1024,
        "class_loss_weight": 300.0,
        "mask_focal_loss_weight": 600.0,
        "mask_dice_loss_weight": 30.0,
    }
    return fields
