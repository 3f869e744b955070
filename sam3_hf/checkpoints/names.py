"""The names of SAM 3's parameters in Meta's files and in Transformers, as one table that is read both ways."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

# Where the layers of the ViT, of the feature pyramid and of the text encoder are in a model of Transformers.
VIT = "vision_encoder.backbone"
NECK = "vision_encoder.neck.fpn_layers"
CLIP = "text_encoder.text_model"


# Parameters of a text encoder of SAM3-LiteText, and how to tell it from CLIP's: its layers are not in an `encoder`.
# Meta's files have no names for them.
LITE_TEXT_NAMES = re.compile(r"text_encoder\.(embeddings|layers|final_layer_norm|projection)\..+")
LITE_TEXT_LAYERS = "text_encoder.layers"


@dataclass(frozen=True)
class Names:
    """
    One row of the name table. `{i}` stands for a layer index, `{leaf}` for `weight` or `bias`, `{qkv}` in a
    Transformers name for the letters q, k, v of the three tensors that Meta stores as one, stacked on dimension 0.
    """

    native: str
    transformers: str
    form: str = "same"  # or "fused", "transposed", "class_token" (Meta keeps the row of a class token in front)


_TRUNK = "backbone.vision_backbone.trunk"
_CONVS = "backbone.vision_backbone.convs"
_TEXT = "backbone.language_backbone"
_DECODER = "transformer.decoder"


# The modules of a feature pyramid, in Meta's files and in Transformers.
PYRAMID = {
    "0.dconv_2x2_0": "0.scale_layers.0",
    "0.dconv_2x2_1": "0.scale_layers.2",
    "1.dconv_2x2": "1.scale_layers.0",
    "{i}.conv_1x1": "{i}.proj1",
    "{i}.conv_3x3": "{i}.proj2",
}


def modules(native: str, transformers: str, pairs: dict[str, str]) -> list[Names]:
    """Weight and bias of some modules, `{native: transformers}`, below these prefixes."""
    return [Names(f"{native}.{a}.{{leaf}}", f"{transformers}.{b}.{{leaf}}") for a, b in pairs.items()]


def _attention(native: str, transformers: str, out_proj: str = "o_proj") -> list[Names]:
    return [
        Names(f"{native}.in_proj_{{leaf}}", f"{transformers}.{{qkv}}_proj.{{leaf}}", "fused"),
        Names(f"{native}.out_proj.{{leaf}}", f"{transformers}.{out_proj}.{{leaf}}"),
    ]


def _mlp(native: str, transformers: str, count: int) -> list[Names]:
    return modules(f"{native}.layers", transformers, {str(i): f"layer{i + 1}" for i in range(count)})


_FFN = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
_THREE_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2", "norm3": "layer_norm3"}

NAME_TABLE: tuple[Names, ...] = (
    # vision encoder
    Names(f"{_TRUNK}.pos_embed", f"{VIT}.embeddings.position_embeddings", "class_token"),
    Names(f"{_TRUNK}.blocks.{{i}}.attn.qkv.{{leaf}}", f"{VIT}.layers.{{i}}.attention.{{qkv}}_proj.{{leaf}}", "fused"),
    *modules(_TRUNK, VIT, {"patch_embed.proj": "embeddings.patch_embeddings.projection", "ln_pre": "layer_norm"}),
    *modules(
        f"{_TRUNK}.blocks.{{i}}",
        f"{VIT}.layers.{{i}}",
        {
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    *modules(_CONVS, NECK, PYRAMID),
    # text encoder
    Names(f"{_TEXT}.encoder.positional_embedding", f"{CLIP}.embeddings.position_embedding.weight"),
    Names(f"{_TEXT}.encoder.text_projection", "text_encoder.text_projection.weight", "transposed"),
    *modules(
        f"{_TEXT}.encoder", CLIP, {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    ),
    *_attention(
        f"{_TEXT}.encoder.transformer.resblocks.{{i}}.attn", f"{CLIP}.encoder.layers.{{i}}.self_attn", "out_proj"
    ),
    *modules(
        f"{_TEXT}.encoder.transformer.resblocks.{{i}}",
        f"{CLIP}.encoder.layers.{{i}}",
        {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    ),
    Names(f"{_TEXT}.resizer.{{leaf}}", "text_projection.{leaf}"),
    # geometry encoder
    *modules(
        "geometry_encoder",
        "geometry_encoder",
        {
            "label_embed": "label_embed",
            "cls_embed": "cls_embed",
            "boxes_direct_project": "boxes_direct_project",
            "boxes_pool_project": "boxes_pool_project",
            "boxes_pos_enc_project": "boxes_pos_enc_project",
            "final_proj": "final_proj",
            "img_pre_norm": "vision_layer_norm",
            "norm": "prompt_layer_norm",
            "encode_norm": "output_layer_norm",
        },
    ),
    *_attention("geometry_encoder.encode.{i}.self_attn", "geometry_encoder.layers.{i}.self_attn"),
    *_attention("geometry_encoder.encode.{i}.cross_attn_image", "geometry_encoder.layers.{i}.cross_attn"),
    *modules("geometry_encoder.encode.{i}", "geometry_encoder.layers.{i}", {**_FFN, **_THREE_NORMS}),
    # DETR encoder
    *_attention("transformer.encoder.layers.{i}.self_attn", "detr_encoder.layers.{i}.self_attn"),
    *_attention("transformer.encoder.layers.{i}.cross_attn_image", "detr_encoder.layers.{i}.cross_attn"),
    *modules("transformer.encoder.layers.{i}", "detr_encoder.layers.{i}", {**_FFN, **_THREE_NORMS}),
    # DETR decoder
    *_attention(f"{_DECODER}.layers.{{i}}.self_attn", "detr_decoder.layers.{i}.self_attn"),
    *_attention(f"{_DECODER}.layers.{{i}}.ca_text", "detr_decoder.layers.{i}.text_cross_attn"),
    *_attention(f"{_DECODER}.layers.{{i}}.cross_attn", "detr_decoder.layers.{i}.vision_cross_attn"),
    *modules(
        f"{_DECODER}.layers.{{i}}",
        "detr_decoder.layers.{i}",
        {
            **_FFN,
            "norm1": "vision_cross_attn_layer_norm",
            "catext_norm": "text_cross_attn_layer_norm",
            "norm2": "self_attn_layer_norm",
            "norm3": "mlp_layer_norm",
        },
    ),
    *modules(
        _DECODER,
        "detr_decoder",
        {
            "norm": "output_layer_norm",
            "presence_token_out_norm": "presence_layer_norm",
            "query_embed": "query_embed",
            "reference_points": "reference_points",
            "presence_token": "presence_token",
        },
    ),
    *_mlp(f"{_DECODER}.bbox_embed", "detr_decoder.box_head", 3),
    *_mlp(f"{_DECODER}.presence_token_head", "detr_decoder.presence_head", 3),
    *_mlp(f"{_DECODER}.ref_point_head", "detr_decoder.ref_point_head", 2),
    *_mlp(f"{_DECODER}.boxRPB_embed_x", "detr_decoder.box_rpb_embed_x", 2),
    *_mlp(f"{_DECODER}.boxRPB_embed_y", "detr_decoder.box_rpb_embed_y", 2),
    # scores and masks
    *_mlp("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp", 2),
    *modules(
        "dot_prod_scoring",
        "dot_product_scoring",
        {"prompt_mlp.out_norm": "text_mlp_out_norm", "prompt_proj": "text_proj", "hs_proj": "query_proj"},
    ),
    *_attention("segmentation_head.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
    *modules(
        "segmentation_head",
        "mask_decoder",
        {
            "cross_attn_norm": "prompt_cross_attn_norm",
            "pixel_decoder.conv_layers.{i}": "pixel_decoder.conv_layers.{i}",
            "pixel_decoder.norms.{i}": "pixel_decoder.norms.{i}",
            "mask_predictor.mask_embed.layers.{i}": "mask_embedder.layers.{i}",
            "instance_seg_head": "instance_projection",
            "semantic_seg_head": "semantic_projection",
        },
    ),
)

# What a SAM 3 file may hold beside the detector's parameters, and why it is left behind.
DROPPED = (
    (r"(module\.)?(tracker|tracker_model|tracker_neck|inst_interactive_predictor)\.", "video tracker"),
    (r".*\bsam2_convs\.", "neck of the tracker"),
    (r".*\.(freqs_cis|freqs_cis_real|freqs_cis_imag|attn_mask)$", "table that the model computes"),
    (r".*\bgeometry_encoder\.points_", "point prompts, which the detector does not take"),
)
# Parameters of the standard model that no output depends on; a lite model does not have them.
UNREAD = (
    r"vision_encoder\.neck\.fpn_layers\.3\.",
    r"text_encoder\.(text_)?projection\.",
    r"mask_decoder\.pixel_decoder\.(conv_layers|norms)\.2\.",
)


def pattern_of(template: str) -> re.Pattern:
    """Matches the names that a template of [`Names`] stands for."""
    escaped = re.escape(template)
    for field, group in (("i", r"(?P<i>\d+)"), ("leaf", "(?P<leaf>weight|bias)"), ("qkv", "(?P<qkv>[qkv])")):
        escaped = escaped.replace(rf"\{{{field}\}}", group)
    return re.compile(escaped)


_NATIVE_PATTERNS = [(pattern_of(row.native), row) for row in NAME_TABLE]
_TRANSFORMERS_PATTERNS = [(pattern_of(row.transformers), row) for row in NAME_TABLE]


@dataclass(frozen=True)
class Stored:
    """Where a parameter is found in a file: the stored name, and how the stored tensor differs from the parameter."""

    name: str
    form: str = "same"
    part: int = 0  # of a fused tensor: 0, 1, 2 for q, k, v

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameter, from the shape of the stored tensor."""
        if self.form == "fused":
            return (stored[0] // 3, *stored[1:])
        if self.form == "transposed":
            return tuple(reversed(stored))
        if self.form == "class_token":
            return (stored[0], stored[1] - 1, *stored[2:])
        return tuple(stored)

    def take(self, stored: Tensor) -> Tensor:
        """The parameter, from the stored tensor."""
        if self.form == "fused":
            return stored.chunk(3)[self.part]
        if self.form == "transposed":
            return stored.T
        if self.form == "class_token":
            return stored[:, 1:]
        return stored


def from_native(name: str) -> dict[str, Stored]:
    """
    Transformers names of what Meta stores as `name` (three for fused attention projections), each with the way to
    take it out. Empty where the table has no such name.
    """
    for pattern, row in _NATIVE_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            letters = "qkv" if row.form == "fused" else " "
            fields = match.groupdict()
            return {
                row.transformers.format(**fields, qkv=letter): Stored(name, row.form, part)
                for part, letter in enumerate(letters)
            }
    return {}


def to_native(name: str) -> Stored | None:
    """Where Meta stores the parameter that Transformers calls `name`: the inverse of [`from_native`]."""
    for pattern, row in _TRANSFORMERS_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            fields = match.groupdict()
            part = "qkv".index(fields["qkv"]) if row.form == "fused" else 0
            return Stored(row.native.format(**fields), row.form, part)
    return None


def native_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Renames parameters from Transformers' names to Meta's.

    Args:
        state_dict: parameters of a [`Sam3LiteModel`] or `Sam3Model`.

    Returns:
        The same under Meta's names, attention projections fused. Meta's model never reads the row of the class token
        of its position embedding; it is zero.

    Raises:
        ValueError: a name that the table does not have, or one of three attention projections is missing.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    forms: dict[str, str] = {}
    for name, tensor in state_dict.items():
        stored = to_native(name)
        if stored is None:
            raise ValueError(f"`{name}` is no parameter of SAM 3: it has no native name.")
        parts.setdefault(stored.name, {})[stored.part] = tensor
        forms[stored.name] = stored.form
    native = {}
    for name, pieces in parts.items():
        tensor = pieces[0] if 0 in pieces else next(iter(pieces.values()))
        if forms[name] == "fused":
            if len(pieces) != 3:
                raise ValueError(f"`{name}` needs the q, k and v projections; only {len(pieces)} of 3 are there.")
            tensor = torch.cat([pieces[i] for i in range(3)])
        elif forms[name] == "transposed":
            tensor = tensor.T.contiguous()
        elif forms[name] == "class_token":
            tensor = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        native[name] = tensor
    return native


__all__ = [
    "CLIP",
    "DROPPED",
    "LITE_TEXT_LAYERS",
    "LITE_TEXT_NAMES",
    "NAME_TABLE",
    "NECK",
    "PYRAMID",
    "UNREAD",
    "VIT",
    "Names",
    "Stored",
    "from_native",
    "modules",
    "native_state_dict",
    "pattern_of",
    "to_native",
]
