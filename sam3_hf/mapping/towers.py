"""The transformers of a model, ViT and text encoder, by name and size; and which sizes can become which."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints import CLIP, VIT
from ..configuration_sam3_lite import Sam3LiteConfig
from ..presets_sam3_lite import CLIP_TEXT


@dataclass(frozen=True)
class Tower:
    """A pre-LayerNorm transformer: names and sizes of one side of a mapping."""

    prefix: str  # of the layers
    attention: str
    out_proj: str
    width: int
    heads: int
    mlp: int
    depth: int
    activation: str

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def vision_tower(config: Sam3LiteConfig) -> Tower:
    vit = config.vision_config.backbone_config
    sizes = (vit.hidden_size, vit.num_attention_heads, vit.intermediate_size, vit.num_hidden_layers)
    return Tower(f"{VIT}.layers", "attention", "o_proj", *sizes, vit.hidden_act)


def text_tower(config: Sam3LiteConfig) -> Tower:
    text = config.text_config
    sizes = (text.hidden_size, text.num_attention_heads, text.intermediate_size, text.num_hidden_layers)
    return Tower(f"{CLIP}.encoder.layers", "self_attn", "out_proj", *sizes, text.hidden_act)


def has_clip(config: Sam3LiteConfig) -> bool:
    """Whether the text encoder is CLIP's, the one kind that can be made smaller."""
    return config.text_config.model_type == CLIP_TEXT


def _check_lite_text(source: Sam3LiteConfig, target: Sam3LiteConfig):
    """Raises a ValueError unless the text encoder of SAM3-LiteText stays what it is."""
    fields = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("use_repmixer_blocks", "repmixer_kernel_size")
    pairs = {name: [getattr(part.text_config, name, None) for part in (source, target)] for name in fields}
    changed = [f"`text_config.{name}` from {old} to {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(
            "A text encoder cannot be made into one of another kind, nor one of SAM3-LiteText be resized: "
            f"{changed[0]}. Leave it as the source has it, or name a checkpoint that has it as `text_encoder` "
            '(`--text-encoder`); `mapping="skip"` leaves it to random initialisation.'
        )


def check_sizes(source: Sam3LiteConfig, target: Sam3LiteConfig):
    """Raises a ValueError where the target is not the smaller one, or has heads of another size."""
    grown, heads = [], []
    towers = [("vision_config.backbone_config", vision_tower)]
    if has_clip(source) and has_clip(target):
        towers.append(("text_config", text_tower))
    else:
        _check_lite_text(source, target)
    for label, tower in towers:
        old, new = tower(source), tower(target)
        sizes = {"hidden_size": "width", "intermediate_size": "mlp", "num_hidden_layers": "depth"}
        grown += [
            f"`{label}.{name}` from {getattr(old, size)} to {getattr(new, size)}"
            for name, size in sizes.items()
            if getattr(new, size) > getattr(old, size)
        ]
        if old.head_dim != new.head_dim:
            heads.append(
                f"`{label}` has heads of {new.head_dim} channels, the source of {old.head_dim}: heads are kept whole, "
                f"so set `num_attention_heads` to {new.width / old.head_dim:g}."
            )
    for part in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config"):
        old, new = getattr(source, part).num_layers, getattr(target, part).num_layers
        grown += [f"`{part}.num_layers` from {old} to {new}"] if new > old else []
    if grown:
        raise ValueError(
            f"A mapping makes a model smaller, but this one would grow: {', '.join(grown)}. Use other sizes, or "
            '`mapping="skip"`, which leaves what does not fit to random initialisation.'
        )
    if heads:
        raise ValueError(" ".join(heads))


__all__ = ["Tower", "check_sizes", "has_clip", "text_tower", "vision_tower"]
