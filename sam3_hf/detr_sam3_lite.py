"""Detector of SAM 3 Lite: box prompts, fusion with the prompt, and queries, safe in half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sam3.modeling_sam3 import (
    Sam3DetrDecoder,
    Sam3DetrDecoderLayer,
    Sam3DetrEncoder,
    Sam3DetrEncoderLayer,
    Sam3GeometryEncoder,
    box_cxcywh_to_xyxy,
    inverse_sigmoid,
)

from .configuration_sam3_lite import BOX_PADDING_LABEL
from .precision_sam3_lite import LayerNorm, matmul_precision
from .recomputation_sam3_lite import recomputed

# For training from scratch: initial boxes are (cx, cy, w, h) = sigmoid(normal + shift), a fifth of the image wide...
ANCHOR_LOGIT_SHIFT = (0.0, 0.0, -1.4, -1.4)
# ...and attention to a position a quarter of the image outside of its box starts e^(0.53 * this) times weaker.
OUTSIDE_PENALTY = 8.0


def additive_mask(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`(batch, keys)` bool mask to `(batch, 1, 1, keys)` attention biases: 0 where valid, the lowest value else."""
    if valid is None:
        return None
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return bias.masked_fill(~valid, torch.finfo(dtype).min)[:, None, None, :]


class Sam3LiteGeometryEncoder(Sam3GeometryEncoder):
    """
    The stock box prompt encoder, reading each prompt's image through `image_index` and safe in half precision. Behind
    the boxes of a prompt comes a summary token, which without boxes depends on the image alone.
    """

    def summarize(self, vision_features: Tensor, vision_position: Tensor) -> Tensor:
        """
        The summary token of prompts without boxes, `(images, 1, hidden)`; see `forward`.

        Every parameter of the encoder has a part in it, if only a gradient of zero, as DDP needs.
        """
        images, device = len(vision_features), vision_features.device
        boxes = torch.zeros((images, 0, 4), device=device)
        labels = torch.zeros((images, 0), dtype=torch.long, device=device)
        return self(boxes, labels, vision_features, vision_position, torch.arange(images, device=device))[0]

    def forward(
        self,
        boxes: Tensor,
        box_labels: Tensor,
        vision_features: Tensor,
        vision_position: Tensor,
        image_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            boxes: `(prompts, boxes, 4)` float, cxcywh in [0, 1].
            box_labels: `(prompts, boxes)` int, 1 positive, 0 negative, -10 padding.
            vision_features: `(images, hidden, height, width)`, the coarsest level.
            vision_position: `(1, height * width, hidden)`.
            image_index: `(prompts,)` int, the image of each prompt.

        Returns:
            Features `(prompts, boxes + 1, hidden)` (the last one is a summary token) and their validity `(…)` bool.
        """
        num_prompts = boxes.shape[0]
        valid = box_labels != BOX_PADDING_LABEL
        embeds = [self.cls_embed.weight.expand(num_prompts, 1, -1).to(vision_features.dtype)]
        if boxes.shape[1] or torch.is_grad_enabled():
            embeds.insert(0, self._embed_boxes(boxes, box_labels.clamp(min=0), vision_features, image_index))
        embeds = torch.cat([part.to(embeds[0].dtype) for part in embeds], dim=1)
        valid = F.pad(valid, (0, 1), value=True)

        embeds = self.prompt_layer_norm(self.final_proj(embeds))
        attention_bias = additive_mask(valid, embeds.dtype)
        vision = vision_features.flatten(2).transpose(1, 2)[image_index]  # (prompts, height * width, hidden)
        for layer in self.layers:
            embeds = layer(embeds, vision, vision_position, attention_bias)
        return self.output_layer_norm(embeds), valid

    def _embed_boxes(self, boxes: Tensor, labels: Tensor, vision_features: Tensor, image_index: Tensor) -> Tensor:
        num_prompts, num_boxes, _ = boxes.shape
        dtype = self.boxes_direct_project.weight.dtype
        boxes = boxes.float()
        center_x, center_y, width, height = (side.flatten() for side in boxes.unbind(-1))
        position = self._encode_box_coordinates(center_x, center_y, width, height)
        position = position.unflatten(0, (num_prompts, num_boxes))

        normed = self.vision_layer_norm(vision_features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        grid_height, grid_width = normed.shape[-2:]
        corners = box_cxcywh_to_xyxy(boxes) * boxes.new_tensor([grid_width, grid_height, grid_width, grid_height])
        owner = image_index[:, None, None].expand(-1, num_boxes, 1).to(corners.dtype)
        rois = torch.cat([owner, corners], dim=-1).flatten(0, 1)  # (prompts * boxes, 5)
        # roi_align has no bfloat16 kernel and wants one dtype for both inputs; float32 serves every precision.
        with torch.autocast(device_type=boxes.device.type, enabled=False):
            pooled = torchvision.ops.roi_align(normed.float(), rois, self.roi_size)
        pooled = self.boxes_pool_project(pooled.to(dtype)).flatten(1).unflatten(0, (num_prompts, num_boxes))
        return (
            self.label_embed(labels.long())
            + self.boxes_direct_project(boxes.to(dtype))
            + pooled
            + self.boxes_pos_enc_project(position.to(dtype))
        )


class Sam3LiteDetrEncoderLayer(GradientCheckpointingLayer, Sam3DetrEncoderLayer):
    """The stock layer with gradient checkpointing, and with self-attention once per image where prompts share one."""

    def __init__(self, config):
        super().__init__(config)
        for name in ("layer_norm1", "layer_norm2", "layer_norm3"):
            setattr(self, name, LayerNorm(config.hidden_size, getattr(self, name).eps))

    def forward(
        self,
        vision: Tensor,
        prompt: Tensor,
        vision_position: Tensor,
        prompt_bias: Tensor | None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            vision: `(prompts, height * width, hidden)`, or, with `image_index`, of images.
            prompt: `(prompts, tokens, hidden)`.
            vision_position: `(1, height * width, hidden)`.
            prompt_bias: additive mask `(prompts, 1, 1, tokens)`.
            image_index: `(prompts,)` int, the row of `vision` that each prompt starts from.

        Returns:
            `(prompts, height * width, hidden)`.
        """
        normed = matmul_precision(self.layer_norm1(vision))
        with_position = normed + matmul_precision(vision_position)
        attended, _ = self.self_attn(query=with_position, key=with_position, value=normed)
        if image_index is not None:
            vision, attended = vision[image_index], attended[image_index]
        vision = vision + self.dropout(attended)

        def attend_to_prompt(vision: Tensor) -> Tensor:
            normed = self.layer_norm2(vision)
            return self.cross_attn(query=normed, key=prompt, value=prompt, attention_mask=prompt_bias)[0]

        def transform(vision: Tensor) -> Tensor:
            return self.mlp(self.layer_norm3(vision))

        # What is wide, or made for a few tokens only, costs more memory to keep than time to make again.
        vision = vision + self.dropout(recomputed(attend_to_prompt, vision))
        return vision + self.dropout(recomputed(transform, vision))


class Sam3LiteDetrEncoder(Sam3DetrEncoder):
    """Fuses the coarsest vision level with the prompt."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([Sam3LiteDetrEncoderLayer(config) for _ in range(config.num_layers)])

    def forward(
        self,
        vision: Tensor,
        image_index: Tensor,
        prompt: Tensor,
        vision_position: Tensor,
        prompt_bias: Tensor | None,
    ) -> Tensor:
        """
        Args:
            vision: `(images, height * width, hidden)`.
            image_index: `(prompts,)` int, the image of each prompt.
            prompt: `(prompts, tokens, hidden)`.
            vision_position: `(1, height * width, hidden)`.
            prompt_bias: additive mask `(prompts, 1, 1, tokens)`.

        Returns:
            `(prompts, height * width, hidden)`.
        """
        # Until it first attends to the prompt, an image is the same for all of its prompts.
        if len(image_index) <= len(vision):
            vision, image_index = vision[image_index], None
        for layer in self.layers:
            vision = layer(vision, prompt, vision_position, prompt_bias, image_index)
            image_index = None
        return vision


class Sam3LiteDetrDecoderLayer(GradientCheckpointingLayer, Sam3DetrDecoderLayer):
    """
    The stock layer with gradient checkpointing, and with one-to-many queries in training: those follow the ordinary
    ones, skip self-attention, and so cannot learn to suppress each other (`dac` in the SAM 3 training code).
    """

    def forward(
        self,
        hidden_states: Tensor,
        query_pos: Tensor,
        text_features: Tensor,
        vision_features: Tensor,
        vision_keys: Tensor,
        text_cross_attn_mask: Tensor | None,
        reference: Tensor,
        vision_bias: Callable[[Tensor], Tensor],
        num_interacting: int,
    ) -> Tensor:
        """
        Args:
            hidden_states: `(prompts, 1 + queries, hidden)`, the presence token first.
            query_pos: `(prompts or 1, 1 + queries, hidden)`, zero for the presence token.
            text_features: `(prompts, tokens, hidden)`.
            vision_features: `(prompts, height * width, hidden)`.
            vision_keys: the same with position encodings.
            text_cross_attn_mask: additive, `(prompts, 1, 1, tokens)`.
            reference: boxes of the queries, `(prompts or 1, queries, 4)` float32.
            vision_bias: makes of them an additive mask `(prompts or 1, heads, 1 + queries, height * width)`.
            num_interacting: how many of the first tokens take part in self-attention.
        """
        interacting = hidden_states[:, :num_interacting]
        with_pos = interacting + query_pos[:, :num_interacting]
        attended, _ = self.self_attn(query=with_pos, key=with_pos, value=interacting, attention_mask=None)
        attended = F.pad(self.self_attn_dropout(attended), (0, 0, 0, hidden_states.shape[1] - num_interacting))
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)

        attended, _ = self.text_cross_attn(
            query=hidden_states + query_pos,
            key=text_features,
            value=text_features,
            attention_mask=text_cross_attn_mask,
        )
        hidden_states = self.text_cross_attn_layer_norm(hidden_states + self.text_cross_attn_dropout(attended))

        def attend_to_vision(query: Tensor) -> Tensor:
            return self.vision_cross_attn(query, vision_keys, vision_features, attention_mask=vision_bias(reference))[
                0
            ]

        # Masks, and what they are made from, are a third of all that a prompt would keep for the backward pass.
        attended = recomputed(attend_to_vision, hidden_states + query_pos)
        hidden_states = self.vision_cross_attn_layer_norm(hidden_states + self.vision_cross_attn_dropout(attended))
        return self.mlp_layer_norm(hidden_states + self.mlp_dropout(self.mlp(hidden_states)))


def untrained_queries(name: str, like: Tensor) -> Tensor:
    """
    Queries as a decoder has them before training, for a trained one that gets more.

    Args:
        name: `query_embed` or `reference_points`.
        like: `(queries, channels)`.
    """
    values = torch.randn_like(like)
    return values + values.new_tensor(ANCHOR_LOGIT_SHIFT) if name == "reference_points" else values


class DecoderMemory(NamedTuple):
    """What the layers of a DETR decoder look at."""

    vision: Tensor  # (prompts, height * width, hidden)
    keys: Tensor  # the same with position encodings
    prompt: Tensor  # (prompts, tokens, hidden)
    prompt_bias: Tensor | None  # additive, (prompts, 1, 1, tokens)
    grid_size: tuple[int, int]  # height and width


class Sam3LiteDetrDecoder(Sam3DetrDecoder):
    """
    The stock decoder returning the boxes of every layer, without host synchronisation. Boxes are refined in float32
    whatever the precision of the model.
    """

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([Sam3LiteDetrDecoderLayer(config) for _ in range(config.num_layers)])

    def _init_weights(self, module):
        super()._init_weights(module)
        # The stock initialisation puts all queries on one spot of the image and lets them look everywhere, which no
        # training from scratch escapes quickly. Ours starts as a detector with learnable anchors would: queries
        # differ, their boxes cover the image, and each looks at its own box.
        if module is self.query_embed:
            init.normal_(module.weight)
        elif module is self.reference_points:
            init.normal_(module.weight)
            init.copy_(module.weight, module.weight + module.weight.new_tensor(ANCHOR_LOGIT_SHIFT))
        elif module is self.box_head.layer3:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif module in (self.box_rpb_embed_x.layer1, self.box_rpb_embed_y.layer1):
            # Two hidden units measure how far a position is before the box and how far behind it.
            weight = module.weight.clone()
            weight[:2] = weight.new_tensor([[-1.0, 0.0], [0.0, 1.0]])
            init.copy_(module.weight, weight)
        elif module in (self.box_rpb_embed_x.layer2, self.box_rpb_embed_y.layer2):
            weight = module.weight.clone()
            weight[:, :2] = -OUTSIDE_PENALTY
            init.copy_(module.weight, weight)

    def forward(
        self,
        vision: Tensor,
        prompt: Tensor,
        vision_position: Tensor,
        prompt_bias: Tensor | None,
        grid_size: tuple[int, int],
        one_to_many: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            vision: `(prompts, height * width, hidden)`.
            prompt: `(prompts, tokens, hidden)`.
            vision_position: `(1, height * width, hidden)`.
            prompt_bias: additive mask `(prompts, 1, 1, tokens)`.
            grid_size: height and width of the vision grid.
            one_to_many: append a second copy of the queries that skips self-attention.

        Returns:
            Normalised hidden states `(layers, prompts, queries, hidden)`, boxes `(layers, prompts, queries, 4)`
            float32 cxcywh in [0, 1], presence logits `(layers, prompts)`. With `one_to_many`, twice the queries.
        """
        memory = self.memory(vision, prompt, vision_position, prompt_bias, grid_size)
        hidden, boxes = self.start(vision.shape[0], 2 if one_to_many else 1)
        reference = boxes
        all_hidden, all_boxes, all_presence = [], [], []
        for layer in self.layers:
            hidden = self.run_layer(layer, hidden, reference, memory)
            normed = self.output_layer_norm(hidden[:, 1:])
            # Not detached: the loss on a layer's boxes also trains the layer before it.
            boxes = self.refine(normed, boxes)
            reference = boxes.detach()
            limit = self.clamp_presence_logit_max_val
            all_hidden.append(normed)
            all_boxes.append(boxes)
            all_presence.append(self.presence_logits(hidden).clamp(min=-limit, max=limit))
        return torch.stack(all_hidden), torch.stack(all_boxes), torch.stack(all_presence)

    def memory(
        self,
        vision: Tensor,
        prompt: Tensor,
        vision_position: Tensor,
        prompt_bias: Tensor | None,
        grid_size: tuple[int, int],
    ) -> DecoderMemory:
        """What all layers look at; arguments as those of `forward`."""
        vision = matmul_precision(vision)
        return DecoderMemory(vision, vision + matmul_precision(vision_position), prompt, prompt_bias, grid_size)

    def start(self, num_prompts: int, copies: int = 1) -> tuple[Tensor, Tensor]:
        """
        Returns:
            The stream in front of the first layer, `(prompts, 1 + copies * queries, hidden)`, the presence token
            first, and the boxes there, `(1, copies * queries, 4)` float32 cxcywh.
        """
        queries = self.query_embed.weight.repeat(copies, 1).expand(num_prompts, -1, -1)
        presence = self.presence_token.weight.expand(num_prompts, 1, -1)
        # Where queries start is the same for every prompt, and so is what is made from it.
        boxes = self.reference_points.weight.float().sigmoid().repeat(copies, 1)[None]
        return torch.cat([presence, queries], dim=1), boxes

    def run_layer(self, layer: nn.Module, hidden: Tensor, reference: Tensor, memory: DecoderMemory) -> Tensor:
        """The stream behind a layer; `reference` are the boxes in front of it."""
        query_pos = self.ref_point_head(self.position_encoding.encode_boxes(reference).to(self.dtype))
        return layer(
            hidden,
            F.pad(query_pos, (0, 0, 1, 0)),
            memory.prompt,
            memory.vision,
            memory.keys,
            memory.prompt_bias,
            reference,
            partial(self._box_position_bias, memory.grid_size),
            1 + self.config.num_queries,
        )

    def refine(self, normed: Tensor, boxes: Tensor) -> Tensor:
        """Boxes behind a layer, from its normalised queries and the boxes in front of it."""
        return (self.box_head(normed).float() + inverse_sigmoid(boxes)).sigmoid()

    def presence_logits(self, hidden: Tensor) -> Tensor:
        """`(prompts,)`, not limited yet, from the stream behind a layer."""
        return self.presence_head(self.presence_layer_norm(hidden[:, 0])).squeeze(-1)

    def _box_position_bias(self, grid_size: tuple[int, int], boxes: Tensor) -> Tensor:
        """
        Attention bias from the signed log distance of each grid line to the box edges (`boxRPB` of SAM 3).

        Args:
            boxes: `(prompts, queries, 4)` float32, cxcywh in [0, 1].

        Returns:
            `(prompts, heads, 1 + queries, height * width)`; the first row, of the presence token, is zero.
        """
        x1, y1, x2, y2 = box_cxcywh_to_xyxy(boxes).unbind(-1)
        edges_x, edges_y = torch.stack([x1, x2], dim=-1), torch.stack([y1, y2], dim=-1)
        bias_y = self.box_rpb_embed_y(self._log_distance(edges_y, grid_size[0]))  # (prompts, queries, height, heads)
        bias_x = self.box_rpb_embed_x(self._log_distance(edges_x, grid_size[1]))  # (prompts, queries, width, heads)
        bias_y = F.pad(bias_y.permute(0, 3, 1, 2), (0, 0, 1, 0)).unsqueeze(-1)
        bias_x = F.pad(bias_x.permute(0, 3, 1, 2), (0, 0, 1, 0)).unsqueeze(-2)
        return (bias_y + bias_x).flatten(-2)

    def _log_distance(self, edges: Tensor, size: int) -> Tensor:
        lines = torch.arange(size, device=edges.device, dtype=edges.dtype) / size
        distance = (lines[:, None] - edges[:, :, None, :]) * 8  # (prompts, queries, size, 2)
        return (distance.sign() * torch.log2(distance.abs() + 1.0) / 3.0).to(self.dtype)  # 3 = log2(8)
