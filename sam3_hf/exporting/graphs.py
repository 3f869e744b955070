"""The parts of a model that become graphs. Numbers of images, prompts, boxes and queries are free, sides are not."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam3.modeling_sam3 import box_cxcywh_to_xyxy

from ..configuration_sam3_lite import context_length
from ..detr_sam3_lite import additive_mask
from ..modeling_sam3_lite import Sam3LiteModel
from ..presets_sam3_lite import LITE_TEXT
from .upsampling import ConvOfUpsampled
from .vision import for_runtimes

LEVELS = ("fine", "middle", "coarse")


# The free sizes of each input, by axis.
FREE_SIZES = {
    "pixel_values": {0: "images"},
    "input_ids": {0: "phrases", 1: "tokens"},
    "attention_mask": {0: "phrases", 1: "tokens"},
    "input_boxes": {0: "prompts", 1: "boxes"},
    "input_boxes_labels": {0: "prompts", 1: "boxes"},
    "image_index": {0: "prompts"},
    "fine": {0: "images"},
    "middle": {0: "images"},
    "coarse": {0: "images"},
    "encoded": {0: "prompts"},
    "prompt": {0: "prompts", 1: "tokens"},
    "prompt_mask": {0: "prompts", 1: "tokens"},
    "queries": {0: "prompts", 1: "queries"},
}


class Graph(NamedTuple):
    """A part of a model and how it is called."""

    module: nn.Module
    inputs: dict[str, Tensor]  # an example
    outputs: tuple[str, ...]

    def free_sizes(self) -> dict[str, dict[int, str]]:
        """{input: {axis: name of its size}}, of axes that may have another size than the example."""
        free = {name: FREE_SIZES[name] for name in self.inputs}
        if isinstance(self.module, MaskedTextGraph):  # such an encoder reads whole phrases
            free = {name: {0: "phrases"} for name in free}
        return free


class VisionGraph(nn.Module):
    """`(images, 3, height, width)` float32 pixels to the maps `(images, hidden, h, w)`, from fine to coarse."""

    def __init__(self, model: Sam3LiteModel):
        super().__init__()
        self.vision_encoder, self.dtype = for_runtimes(model.vision_encoder), model.dtype

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vision_encoder(pixel_values.to(self.dtype)).fpn_hidden_states)


class TextGraph(nn.Module):
    """`(phrases, tokens)` int64 ids to features `(phrases, tokens, hidden)`; repetitions are the caller's business."""

    def __init__(self, model: Sam3LiteModel):
        super().__init__()
        self.text_encoder, self.text_projection = model.text_encoder, model.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_projection(self.text_encoder.encode(input_ids).last_hidden_state)


class MaskedTextGraph(TextGraph):
    """As `TextGraph`, for an encoder whose tokens also see what comes after them: with the mask of padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text_projection(self.text_encoder.encode(input_ids, attention_mask).last_hidden_state)


class BoxesGraph(nn.Module):
    """
    Box prompts to the tokens `(prompts, boxes + 1, hidden)` that they add to the words. The last is the summary token:
    of a prompt whose boxes are all padding it is that of the image.
    """

    def __init__(self, model: Sam3LiteModel):
        super().__init__()
        self.geometry_encoder = model.geometry_encoder
        self.register_buffer("position", position_encoding(model), persistent=False)

    def forward(self, input_boxes: Tensor, input_boxes_labels: Tensor, coarse: Tensor, image_index: Tensor) -> Tensor:
        return self.geometry_encoder(input_boxes, input_boxes_labels, coarse, self.position, image_index)[0]


class DetectorGraph(nn.Module):
    """Words and what boxes add to them, on the coarse level, to boxes, logits and what the mask head reads."""

    def __init__(self, model: Sam3LiteModel):
        super().__init__()
        self.detr_encoder, self.detr_decoder = model.detr_encoder, model.detr_decoder
        self.dot_product_scoring = model.dot_product_scoring
        self.register_buffer("position", position_encoding(model), persistent=False)

    def forward(self, coarse: Tensor, prompt: Tensor, prompt_mask: Tensor, image_index: Tensor) -> tuple[Tensor, ...]:
        bias = additive_mask(prompt_mask, coarse.dtype)
        encoded, row = coarse.flatten(2).transpose(1, 2), image_index
        for layer in self.detr_encoder.layers:
            encoded = layer(encoded, prompt, self.position, bias, row)
            row = None
        grid = tuple(coarse.shape[-2:])
        hidden, boxes, presence = self.detr_decoder(encoded, prompt, self.position, bias, grid, one_to_many=False)
        logits = self.dot_product_scoring(hidden[-1:], prompt, prompt_mask).squeeze(-1)
        return (
            box_cxcywh_to_xyxy(boxes[-1]),
            logits[0].float(),
            presence[-1].unsqueeze(-1).float(),
            hidden[-1],
            encoded,
        )


class MasksGraph(nn.Module):
    """
    The pyramid and some queries of each prompt `(prompts, queries, hidden)` to mask logits of those. Convolutions of
    the image's own maps are made once per image, as `shared_maps` of the mask head.
    """

    def __init__(self, model: Sam3LiteModel):
        super().__init__()
        self.mask_decoder = model.mask_decoder
        self.upsampling = nn.ModuleList(map(ConvOfUpsampled, model.mask_decoder.pixel_decoder.conv_layers))

    def forward(
        self,
        fine: Tensor,
        middle: Tensor,
        coarse: Tensor,
        encoded: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        image_index: Tensor,
        queries: Tensor,
    ) -> Tensor:
        head = self.mask_decoder
        bias = additive_mask(prompt_mask, coarse.dtype)
        normed = head.prompt_cross_attn_norm(encoded)
        encoded = encoded + head.prompt_cross_attn(query=normed, key=prompt, value=prompt, attention_mask=bias)[0]
        pixels = encoded.transpose(1, 2).unflatten(2, coarse.shape[-2:])
        convs, norms = head.pixel_decoder.conv_layers, head.pixel_decoder.norms
        for level, conv, upsampled, norm in zip((middle, fine), convs, self.upsampling, norms, strict=True):
            pixels = F.relu(norm(upsampled(pixels) + conv(level)[image_index]))
        return head.masks(queries, pixels).float()


def position_encoding(model: Sam3LiteModel) -> Tensor:
    """`(1, height * width, hidden)` of the coarsest level."""
    height, width = model.config.vision_config.backbone_feature_sizes[-1]
    hidden = model.config.detr_encoder_config.hidden_size
    return model._position_encoding(torch.zeros(1, hidden, height, width, dtype=model.dtype, device=model.device))


def graphs_of(model: Sam3LiteModel) -> dict[str, Graph]:
    """
    The graphs of a model in evaluation mode with eager attention: `vision`, `text` (none with a fixed vocabulary),
    `boxes`, `detector` and `masks` (none where it was trained on boxes alone). Sizes of the examples differ from one
    another and from 1, so that none is taken for fixed, or for another's.
    """
    config, dtype = model.config, model.dtype
    hidden, side = config.detr_encoder_config.hidden_size, config.image_size
    sizes = config.vision_config.backbone_feature_sizes
    images, prompts, tokens, boxes, queries = 2, 3, 7, 4, 5

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    levels = {name: floats(images, hidden, *size) for name, size in zip(LEVELS, sizes, strict=True)}
    index = torch.tensor([0, 1, 1])
    asked = {"prompt": floats(prompts, tokens, hidden), "prompt_mask": torch.ones(prompts, tokens, dtype=torch.bool)}
    encoded = floats(prompts, sizes[-1][0] * sizes[-1][1], hidden)
    graphs = {
        "vision": Graph(VisionGraph(model), {"pixel_values": torch.zeros(images, 3, side, side)}, LEVELS),
        "text": _text_graph(model),
        "boxes": Graph(
            BoxesGraph(model),
            {
                "input_boxes": torch.full((prompts, boxes, 4), 0.5),
                "input_boxes_labels": torch.ones(prompts, boxes, dtype=torch.long),
                "coarse": levels["coarse"],
                "image_index": index,
            },
            ("shown",),
        ),
        "detector": Graph(
            DetectorGraph(model),
            {"coarse": levels["coarse"], **asked, "image_index": index},
            ("boxes", "logits", "presence_logits", "queries", "encoded"),
        ),
        "masks": Graph(
            MasksGraph(model),
            {
                **levels,
                "encoded": encoded,
                **asked,
                "image_index": index,
                "queries": floats(prompts, queries, hidden),
            },
            ("mask_logits",),
        ),
    }
    if not config.mask_supervision:
        del graphs["masks"]
    return {name: graph for name, graph in graphs.items() if graph is not None}


def _text_graph(model: Sam3LiteModel) -> Graph | None:
    if model.text_encoder is None:
        return None
    config = model.config.text_config
    ids = torch.arange(3, 3 + 2 * 8).reshape(2, 8)
    if config.model_type != LITE_TEXT:
        return Graph(TextGraph(model), {"input_ids": ids}, ("text",))
    ids = torch.ones(2, context_length(config), dtype=torch.long)
    return Graph(MaskedTextGraph(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ("text",))
