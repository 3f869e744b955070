"""Which layers of the source a smaller model keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from ..checkpoints import CLIP, VIT
from ..configuration_sam3_lite import Sam3LiteConfig
from .towers import check_sizes, has_clip

# ViT layers that DART-Pruned-16 keeps of the standard 32, by the global layers on both sides.
KNOWN_DEPTHS = {
    (32, (7, 15, 23, 31), 16, (6, 11, 13, 15)): [0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 13, 15, 16, 23, 29, 31],
}


def depth_map(source_types: list[bool], target_types: list[bool]) -> list[int]:
    """
    Source layers to keep, in order, evenly spread, each of its target layer's type.

    Args:
        source_types, target_types: per layer, e.g. whether its attention is global.

    Raises:
        ValueError: there is no such choice.
    """
    source, target = len(source_types), len(target_types)
    infinite = float("inf")
    cost = np.full((target + 1, source + 1), infinite)  # of the first layers of the target from those of the source
    cost[0] = 0
    takes_last = np.zeros_like(cost, dtype=bool)
    for j in range(1, target + 1):
        for i in range(1, source + 1):
            # From even spacing between the first and the last layer, which both stay. In whole numbers, so that ties
            # are ties: then the later layer stays.
            offset = ((i - 1) * (target - 1) - (j - 1) * (source - 1)) ** 2
            fits = source_types[i - 1] == target_types[j - 1]
            taken = cost[j - 1, i - 1] + offset if fits else infinite
            takes_last[j, i] = taken <= cost[j, i - 1]
            cost[j, i] = min(cost[j, i - 1], taken)
    if cost[target, source] == infinite:
        raise ValueError(
            f"{target} layers (global: {[i for i, t in enumerate(target_types) if t]}) cannot be chosen in order from "
            f"{source} (global: {[i for i, t in enumerate(source_types) if t]}), windowed from windowed and global "
            "from global: use other `global_attn_indexes` or fewer layers."
        )
    kept, i = [], source
    for j in range(target, 0, -1):
        while not takes_last[j, i]:
            i -= 1
        kept.append(i - 1)
        i -= 1
    return kept[::-1]


def layer_maps(source: Sam3LiteConfig, target: Sam3LiteConfig) -> dict[str, list[int]]:
    """
    For each stack of layers, by its prefix, the source layers to keep.

    Raises:
        ValueError: the sizes cannot be mapped.
    """
    check_sizes(source, target)

    def types(config: Sam3LiteConfig) -> list[bool]:
        vit = config.vision_config.backbone_config
        return [i in vit.global_attn_indexes for i in range(vit.num_hidden_layers)]

    def spread(old: int, new: int) -> list[int]:
        return depth_map([False] * old, [False] * new)

    def global_layers(config: Sam3LiteConfig) -> tuple[int, ...]:
        return tuple(config.vision_config.backbone_config.global_attn_indexes)

    text = {}
    if has_clip(target):
        old, new = (config.text_config.num_hidden_layers for config in (source, target))
        text[f"{CLIP}.encoder.layers"] = spread(old, new)
    vision = (len(types(source)), global_layers(source), len(types(target)), global_layers(target))
    return {
        f"{VIT}.layers": KNOWN_DEPTHS.get(vision) or depth_map(types(source), types(target)),
        **text,
        "geometry_encoder.layers": spread(
            source.geometry_encoder_config.num_layers, target.geometry_encoder_config.num_layers
        ),
        "detr_encoder.layers": spread(source.detr_encoder_config.num_layers, target.detr_encoder_config.num_layers),
        # The last one stays: the mask head has learnt to read it alone. Boxes come out a little coarser, masks right.
        "detr_decoder.layers": spread(source.detr_decoder_config.num_layers, target.detr_decoder_config.num_layers),
    }


def source_name(name: str, layers: dict[str, list[int]]) -> str:
    """Name in the source of what the target calls `name`."""
    for prefix, kept in layers.items():
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if match:
            return f"{prefix}.{kept[int(match[1])]}.{name[match.end() :]}"
    return name


def search_layers(
    start: list[int], types: list[bool], score: Callable[[list[int]], float], limit: int | None = None
) -> tuple[list[int], dict[tuple[int, ...], float]]:
    """
    Hill climbing: exchanges a kept layer for a dropped one of its type as long as the score rises.

    Args:
        start: layers to keep at first, in order.
        types: of all layers: whether attention is global.
        score: of a choice; higher is better.
        limit: most choices to try.

    Returns:
        The best choice, and the scores of all that were tried.
    """
    best = tuple(start)
    tried = {best: score(list(best))}
    improved = True
    while improved:
        improved = False
        for choice in _neighbours(best, types):
            if len(tried) == limit and choice not in tried:
                break
            if choice not in tried:
                tried[choice] = score(list(choice))
            if tried[choice] > tried[best]:
                best, improved = choice, True
                break
    return list(best), tried


def _neighbours(kept: tuple[int, ...], types: list[bool]) -> Iterator[tuple[int, ...]]:
    """Choices that differ in one layer, where the sequence of types stays the same."""
    for position, layer in enumerate(kept):
        low = kept[position - 1] if position else -1
        high = kept[position + 1] if position + 1 < len(kept) else len(types)
        for other in range(low + 1, high):
            if other != layer and types[other] == types[layer]:
                yield (*kept[:position], other, *kept[position + 1 :])


__all__ = ["KNOWN_DEPTHS", "depth_map", "layer_maps", "search_layers", "source_name"]
