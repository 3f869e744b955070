"""The sizes of a model as people speak of them, from its configuration alone."""

from __future__ import annotations

import functools

from ..configuration_sam3_lite import Sam3LiteConfig, parameter_sizes
from ..presets_sam3_lite import PRESETS, TEXT_ENCODERS


def preset_of(config: Sam3LiteConfig) -> str | None:
    """The name of the preset with these sizes, whatever the vocabulary, the image size and the text encoder."""
    return _names_of(config)[0]


def text_encoder_of(config: Sam3LiteConfig) -> str | None:
    """The name that its preset has for the text encoder: `standard`, or one of SAM3-LiteText."""
    return _names_of(config)[1]


def _names_of(config: Sam3LiteConfig) -> tuple[str | None, str | None]:
    *sizes, _ = parameter_sizes(config)
    for name in PRESETS:
        for text in TEXT_ENCODERS:
            if _sizes_of_preset(name, text) == sizes:
                return name, text
    return None, None


@functools.cache  # making all of them takes a second
def _sizes_of_preset(name: str, text: str) -> list:
    *sizes, _ = parameter_sizes(Sam3LiteConfig.from_preset(name, text))  # but for the vocabulary
    return sizes


def sizes_of(config: Sam3LiteConfig) -> dict[str, int]:
    """Widths and numbers of layers, heads and queries; sides of image and patch in pixels."""
    vit = config.vision_config.backbone_config
    return {
        "image_size": config.image_size,
        "patch_size": vit.patch_size,
        "vision_width": vit.hidden_size,
        "vision_layers": vit.num_hidden_layers,
        "vision_heads": vit.num_attention_heads,
        "detr_encoder_layers": config.detr_encoder_config.num_layers,
        "detr_decoder_layers": config.detr_decoder_config.num_layers,
        "queries": config.detr_decoder_config.num_queries,
    }
