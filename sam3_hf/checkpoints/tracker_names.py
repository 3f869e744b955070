"""The names of the tracker's parameters in Meta's files and in Transformers."""

from __future__ import annotations

import re

from .names import PYRAMID, Names, Stored, modules, pattern_of

# Where the feature pyramid of the tracker is in a model of Transformers, and the tracker itself.
TRACKER_NECK = "tracker_neck.fpn_layers"
TRACKER = "tracker_model"
# The only parameter that Meta stores in parts: a tensor per kind of point.
POINTS = f"{TRACKER}.prompt_encoder.point_embed.weight"

_DECODER = ("tracker.sam_mask_decoder", f"{TRACKER}.mask_decoder")
_PROMPTS = ("tracker.sam_prompt_encoder", f"{TRACKER}.prompt_encoder")
_MEMORY = ("tracker.maskmem_backbone", f"{TRACKER}.memory_encoder")
_ATTENTION = ("tracker.transformer.encoder", f"{TRACKER}.memory_attention")
_NORMS = {f"norm{i}": f"layer_norm{i}" for i in range(1, 5)}
_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}


def _at(module: str, pairs: dict[str, str]) -> dict[str, str]:
    return {f"{module}.{a}": f"{module}.{b}" for a, b in pairs.items()}


def _mlp(native: str, transformers: str) -> dict[str, str]:
    layers = zip(range(3), ("proj_in", "layers.0", "proj_out"), strict=True)
    return {f"{native}.layers.{i}": f"{transformers}.{name}" for i, name in layers}


TRACKER_TABLE: tuple[Names, ...] = (
    *modules("backbone.vision_backbone.sam2_convs", TRACKER_NECK, PYRAMID),
    *(
        Names(f"tracker.{native}", f"{TRACKER}.{transformers}")
        for native, transformers in {
            "maskmem_tpos_enc": "memory_temporal_positional_encoding",
            "no_mem_embed": "no_memory_embedding",
            "no_mem_pos_enc": "no_memory_positional_encoding",
            "no_obj_ptr": "no_object_pointer",
            "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
        }.items()
    ),
    *modules(
        "tracker",
        TRACKER,
        {
            "mask_downsample": "mask_downsample",
            "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
            **_mlp("obj_ptr_proj", "object_pointer_proj"),
        },
    ),
    *modules(
        *_ATTENTION,
        {
            "norm": "layer_norm",
            **_at("layers.{i}", _NORMS),
            **_at("layers.{i}", {"linear1": "linear1", "linear2": "linear2"}),
            **_at("layers.{i}.self_attn", _PROJECTIONS),
            **_at("layers.{i}.cross_attn_image", _PROJECTIONS),
        },
    ),
    Names(f"{_MEMORY[0]}.fuser.layers.{{i}}.gamma", f"{_MEMORY[1]}.memory_fuser.layers.{{i}}.scale"),
    *modules(
        *_MEMORY,
        {
            "pix_feat_proj": "feature_projection",
            "out_proj": "projection",
            "fuser.layers.{i}.dwconv": "memory_fuser.layers.{i}.depthwise_conv",
            "fuser.layers.{i}.norm": "memory_fuser.layers.{i}.layer_norm",
            "fuser.layers.{i}.pwconv1": "memory_fuser.layers.{i}.pointwise_conv1",
            "fuser.layers.{i}.pwconv2": "memory_fuser.layers.{i}.pointwise_conv2",
            # a convolution, a norm and an activation each, then the last convolution
            **{f"mask_downsampler.encoder.{3 * i}": f"mask_downsampler.layers.{i}.conv" for i in range(4)},
            **{f"mask_downsampler.encoder.{3 * i + 1}": f"mask_downsampler.layers.{i}.layer_norm" for i in range(4)},
            "mask_downsampler.encoder.12": "mask_downsampler.final_conv",
        },
    ),
    *modules(
        *_PROMPTS,
        {
            "not_a_point_embed": "not_a_point_embed",
            "no_mask_embed": "no_mask_embed",
            "mask_downscaling.0": "mask_embed.conv1",
            "mask_downscaling.1": "mask_embed.layer_norm1",
            "mask_downscaling.3": "mask_embed.conv2",
            "mask_downscaling.4": "mask_embed.layer_norm2",
            "mask_downscaling.6": "mask_embed.conv3",
        },
    ),
    *modules(
        *_DECODER,
        {
            "iou_token": "iou_token",
            "mask_tokens": "mask_tokens",
            "obj_score_token": "obj_score_token",
            "conv_s0": "conv_s0",
            "conv_s1": "conv_s1",
            "output_upscaling.0": "upscale_conv1",
            "output_upscaling.1": "upscale_layer_norm",
            "output_upscaling.3": "upscale_conv2",
            "transformer.norm_final_attn": "transformer.layer_norm_final_attn",
            "transformer.layers.{i}.mlp.lin1": "transformer.layers.{i}.mlp.proj_in",
            "transformer.layers.{i}.mlp.lin2": "transformer.layers.{i}.mlp.proj_out",
            **_at("transformer.layers.{i}", _NORMS),
            **_at("transformer.layers.{i}.self_attn", _PROJECTIONS),
            **_at("transformer.layers.{i}.cross_attn_token_to_image", _PROJECTIONS),
            **_at("transformer.layers.{i}.cross_attn_image_to_token", _PROJECTIONS),
            **_at("transformer.final_attn_token_to_image", _PROJECTIONS),
            **_mlp("output_hypernetworks_mlps.{i}", "output_hypernetworks_mlps.{i}"),
            **_mlp("iou_prediction_head", "iou_prediction_head"),
            **_mlp("pred_obj_score_head", "pred_obj_score_head"),
        },
    ),
)
_PATTERNS = [(pattern_of(row.native), row) for row in TRACKER_TABLE]
_POINT = pattern_of(f"{_PROMPTS[0]}.point_embeddings.{{i}}.weight")
# Meta's model has one table of random frequencies, Transformers' two modules that hold it.
_FREQUENCIES = f"{_PROMPTS[0]}.pe_layer.positional_encoding_gaussian_matrix"
_FREQUENCY_TABLES = ("shared_image_embedding", "prompt_encoder.shared_embedding")

# What no output of the standard model depends on; a lite model does not have it.
UNREAD_LEVEL = f"{TRACKER_NECK}.3."


def from_tracker(name: str) -> dict[str, Stored]:
    """
    Transformers names of what a file stores as `name` of the tracker or of its pyramid, as
    [`~sam3_hf.checkpoints.from_native`] gives those of the detector. Empty where it is neither.
    """
    # `Sam3VideoModel.save_pretrained` doubles the prefix of the tracker.
    known = re.sub(rf"^{TRACKER}\.(?={TRACKER}\.)", "", name)
    if known.startswith((f"{TRACKER}.", f"{TRACKER_NECK}.")):
        return {known: Stored(name)}
    bare = re.sub(r"^(module\.)?(detector\.(?=backbone\.))?", "", name)
    if bare == _FREQUENCIES:
        return {f"{TRACKER}.{module}.positional_embedding": Stored(name) for module in _FREQUENCY_TABLES}
    if match := _POINT.fullmatch(bare):
        return {POINTS: Stored(name, "stacked", int(match["i"]))}
    for pattern, row in _PATTERNS:
        if match := pattern.fullmatch(bare):
            return {row.transformers.format(**match.groupdict()): Stored(name)}
    return {}


__all__ = ["POINTS", "TRACKER", "TRACKER_NECK", "TRACKER_TABLE", "UNREAD_LEVEL", "from_tracker"]
