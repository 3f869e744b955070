"""
The small SAM 3 and the prompts whose outputs by Meta's own code are in `meta_outputs.json`.

Those are of facebookresearch/sam3, commit 99d02f2: its component classes at the sizes of `CONFIG`, its unmodified
`forward_grounding` on the CPU in float32, with the weights of `seeded_weights`. The file holds seeds and numbers only.
"""

import math
import zlib

import numpy as np
import torch

TRANSFORMER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
CONFIG = {
    "vision_config": {
        "fpn_hidden_size": 32,
        "backbone_config": {
            "hidden_size": 32,
            "intermediate_size": 148,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "global_attn_indexes": [1, 3],
            "image_size": 64,
            "patch_size": 8,
            "pretrain_image_size": 32,
            "window_size": 4,
        },
    },
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "geometry_encoder_config": {**TRANSFORMER, "num_layers": 2, "roi_size": 3},
    "detr_encoder_config": {**TRANSFORMER, "num_layers": 2},
    "detr_decoder_config": {**TRANSFORMER, "num_layers": 3, "num_queries": 10},
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4},
}
BOX, OTHER = [0.4, 0.5, 0.3, 0.4], [0.7, 0.2, 0.2, 0.3]  # cxcywh
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9"
# name: one row per prompt: phrase, image, boxes with their labels
CASES = {
    "phrases": [("cat", 0, []), ("red car", 0, []), ("a person wearing a hat", 1, []), (LONG, 1, []), ("", 0, [])],
    "token 0": [("cat!;", 0, [])],
    "boxes": [("cat", 0, [(BOX, 1)]), ("cat", 0, [(BOX, 0)]), ("visual", 0, [(BOX, 1)])],
    "several boxes": [("red car", 1, [(BOX, 1), (OTHER, 0)]), ("a person wearing a hat", 0, [(OTHER, 0), (BOX, 1)])],
    "neighbours": [
        ("cat", 0, []),
        ("red car", 0, [(BOX, 1)]),
        ("a person wearing a hat", 1, []),
        ("visual", 0, [(BOX, 1), (OTHER, 0)]),
    ],
}


def seeded_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights by their native names: matrices with a standard deviation of 1/sqrt(inputs), nothing at a constant."""
    weights = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if "pos_embed" in name or "positional_embedding" in name or "token_embedding" in name:
            noise = noise * 0.05
        elif len(shape) == 1:
            noise = 1 + 0.1 * noise if name.endswith("weight") else 0.02 * noise
        elif not name.endswith(("embed.weight", "reference_points.weight", "presence_token.weight")):
            inputs = shape[0] if "dconv" in name else math.prod(shape[1:])
            noise = noise / math.sqrt(inputs)
        weights[name] = torch.from_numpy(noise)
    return weights


def pixel_values() -> torch.Tensor:
    """Two images."""
    return torch.from_numpy(np.random.RandomState(41).standard_normal((2, 3, 64, 64)).astype(np.float32)).clamp(-1, 1)


def packed_boxes(case: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes `(prompts, boxes, 4)` and their labels, -10 for padding."""
    most = max(len(boxes) for _, _, boxes in case)
    packed, labels = torch.zeros(len(case), most, 4), torch.full((len(case), most), -10)
    for row, (_, _, boxes) in enumerate(case):
        for column, (box, label) in enumerate(boxes):
            packed[row, column], labels[row, column] = torch.tensor(box), label
    return packed, labels
