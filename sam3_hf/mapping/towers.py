"""The transformers of a model, ViT and text encoder, by name and size; and which sizes can become which."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints import CLIP, VIT
from ..configuration_sam3_lite import Sam3LiteConfig


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


def check_sizes(source: Sam3LiteConfig, target: Sam3LiteConfig):
    """Raises a ValueError where the target is not the smaller one, or has heads of another size."""
    grown, heads = [], []
    for label, tower in (("vision_config.backbone_config", vision_tower), ("text_config", text_tower)):
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


__all__ = ["Tower", "check_sizes", "text_tower", "vision_tower"]
