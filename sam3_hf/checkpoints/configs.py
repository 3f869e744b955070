"""The configuration of a checkpoint: from the shapes of its tensors, and from and to that of the standard model."""

from __future__ import annotations

import copy
import dataclasses
import re

from transformers import PreTrainedConfig, Sam3Config, Sam3LiteTextConfig

from ..configuration_sam3_lite import Sam3LiteConfig
from ..presets_sam3_lite import LITE_TEXT, VIT_LAYER_NORM_EPS, spread_global_layers
from .names import CLIP, VIT


def config_from_shapes(shapes: dict[str, tuple[int, ...]], tables: dict[str, tuple[int, ...]]) -> Sam3LiteConfig:
    """
    Sizes of a checkpoint without a config. Sizes that leave no trace in the shapes are those of `facebook/sam3`
    (head size 64, window 24, image 1008 px, evenly spread global layers), unless the rotary `tables` of the native
    format, `(positions, head size / 2)` per layer, tell them.
    """
    width, _, patch, _ = shapes[f"{VIT}.embeddings.patch_embeddings.projection.weight"]
    depth = _count(shapes, f"{VIT}.layers")
    positions = shapes[f"{VIT}.embeddings.position_embeddings"][1]
    vit = {
        "hidden_size": width,
        "intermediate_size": shapes[f"{VIT}.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(width // 64, 1),
        "patch_size": patch,
        "pretrain_image_size": round(positions**0.5) * patch,
        "global_attn_indexes": spread_global_layers(depth, 4),
    }
    if tables:
        by_layer = {int(re.search(r"blocks\.(\d+)", name)[1]): shape for name, shape in tables.items()}
        sides = {layer: round(shape[0] ** 0.5) for layer, shape in by_layer.items()}
        vit["num_attention_heads"] = width // (2 * by_layer[0][1])
        vit["window_size"] = min(sides.values())
        vit["image_size"] = max(sides.values()) * patch
        vit["global_attn_indexes"] = sorted(i for i, side in sides.items() if side == max(sides.values()))
    vocab_size, text_width = shapes[f"{CLIP}.embeddings.token_embedding.weight"]
    hidden_size = shapes["text_projection.weight"][0]
    transformer = {
        "hidden_size": hidden_size,
        "num_attention_heads": shapes["detr_decoder.box_rpb_embed_x.layer2.weight"][0],
        "intermediate_size": shapes["detr_decoder.layers.0.mlp.fc1.weight"][0],
    }
    return Sam3LiteConfig(
        vision_config={"backbone_config": vit, "fpn_hidden_size": hidden_size},
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shapes[f"{CLIP}.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, f"{CLIP}.encoder.layers"),
            "num_attention_heads": max(text_width // 64, 1),
            "max_position_embeddings": shapes[f"{CLIP}.embeddings.position_embedding.weight"][0],
        },
        geometry_encoder_config={
            **transformer,
            "num_layers": _count(shapes, "geometry_encoder.layers"),
            "roi_size": shapes["geometry_encoder.boxes_pool_project.weight"][-1],
        },
        detr_encoder_config={**transformer, "num_layers": _count(shapes, "detr_encoder.layers")},
        detr_decoder_config={
            **transformer,
            "num_layers": _count(shapes, "detr_decoder.layers"),
            "num_queries": shapes["detr_decoder.query_embed.weight"][0],
        },
        mask_decoder_config={"hidden_size": hidden_size, "num_attention_heads": transformer["num_attention_heads"]},
    )


def _count(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    """Number of layers called `prefix`.0 and so on."""
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in shapes]
    indices = {int(match[1]) for match in found if match}
    if not indices:
        raise KeyError(f"{prefix}.0")
    return max(indices) + 1


def _parts_for(config: PreTrainedConfig, target: type[PreTrainedConfig]) -> dict[str, PreTrainedConfig]:
    """
    Copies of the nested configs of a model, as those of another class: the fields are the same, but each class of
    Transformers has its own classes for them.
    """
    parts = {}
    for name in ("vision", "text", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder"):
        part = copy.deepcopy(getattr(config, f"{name}_config"))
        wanted = target.sub_configs.get(f"{name}_config")
        if name in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder") and type(part) is not wanted:
            known = {field.name for field in dataclasses.fields(wanted)} & set(vars(part))
            part = wanted(**{field: getattr(part, field) for field in known})
        parts[f"{name}_config"] = part
    return parts


def lite_config(config: Sam3Config | Sam3LiteTextConfig) -> Sam3LiteConfig:
    """
    The configuration of a standard model as one of ours: the same sizes without the parts that nothing reads.

    What does not say whether phrases get the summary token is SAM 3 itself, where they do, and whose ViT was trained
    with another epsilon than Transformers' converter wrote.
    """
    parts = _parts_for(config, Sam3LiteConfig)
    summary_token = getattr(config, "summary_token", None)
    if summary_token is None:
        parts["vision_config"].backbone_config.layer_norm_eps = VIT_LAYER_NORM_EPS
        summary_token = True
    return Sam3LiteConfig(
        **parts,
        initializer_range=config.initializer_range,
        summary_token=summary_token,
        mask_supervision=getattr(config, "mask_supervision", True),
    )


def stock_config(config: Sam3LiteConfig) -> Sam3Config | Sam3LiteTextConfig:
    """
    The configuration of the standard model class at the sizes of `config`: the inverse of [`lite_config`]. The text
    encoder decides which class. It keeps `summary_token` and `mask_supervision`, which those classes do not read.
    """
    stock = Sam3LiteTextConfig if config.text_config.model_type == LITE_TEXT else Sam3Config
    parts = _parts_for(config, stock)
    parts["vision_config"].scale_factors = [4.0, 2.0, 1.0, 0.5]
    parts["mask_decoder_config"].num_upsampling_stages = 3
    return stock(
        **parts,
        initializer_range=config.initializer_range,
        summary_token=config.summary_token,
        mask_supervision=config.mask_supervision,
    )


__all__ = ["config_from_shapes", "lite_config", "stock_config"]
