"""The changes of this package against stock SAM 3: each as two ways to equal outputs, from equal weights and inputs.

Parts behind the vision encoder get random features of one image, and text features of up to `TOKENS` tokens. Dropout
is off: two runs would draw differently.
"""

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from common import TOKENS, build, device, image_size_of, training_batch
from torch import Tensor, nn
from transformers import Sam3ImageProcessor
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from sam3_hf import loss_sam3_lite
from sam3_hf.detr_sam3_lite import additive_mask
from sam3_hf.loss_sam3_lite import DetectionOutputs, global_normalizers, pack_labels, sam3_lite_loss, union_masks
from sam3_hf.masks_sam3_lite import conv_of_upsampled
from sam3_hf.processing_sam3_lite import clip_tokenizer, enlarge_masks, tokenize
from sam3_hf.recomputation_sam3_lite import recomputed
from sam3_hf.text_sam3_lite import TOKEN_BLOCK

NO_DROPOUT = {f"{part}_config": {"dropout": 0.0} for part in ("detr_encoder", "detr_decoder", "mask_decoder")}
KINDS = ("", "red ", "small ", "broken ")
THINGS = ("car", "blood cell", "traffic light", "dog on a leash", "bottle", "person in a boat", "screw", "leaf")
OBJECTS = 5  # of a present concept
THRESHOLD = 0.5  # of scores and of mask probabilities


class Change(NamedTuple):
    """
    Attributes:
        stock, ours: the two ways; both return the same number of tensors, of equal shapes.
        modules: the stock module and ours, by whose gradients backward passes are compared too.
        inputs: tensors that gradients reach as well.
        claims: columns of the table in which ours is to be the lower one in a forward pass.
        training_claims: the same with backward pass; None for a part that no training runs with gradients.
        finish: brings our outputs into the form of the stock ones; neither counted nor timed.
    """

    name: str
    stock: Callable[[], Sequence[Tensor]]
    ours: Callable[[], Sequence]
    modules: Sequence[nn.Module] = ()
    inputs: Sequence[Tensor] = ()
    claims: tuple[str, ...] = ()
    training_claims: tuple[str, ...] | None = None
    finish: Callable[[Sequence], Sequence[Tensor]] = list


def models(preset: str, image_size: int | None) -> tuple[nn.Module, nn.Module]:
    """The stock model and ours, of the same weights."""
    ours = build(preset, image_size, **NO_DROPOUT)
    with torch.no_grad():
        for parameter in ours.parameters():  # so that none is zero, one, or equal to another by accident
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with device():
        return ours.to_sam3(), ours


class Setting:
    """Both models and inputs of their parts for some prompts on one image, in the dtypes that autocast gives them."""

    def __init__(self, stock: nn.Module, ours: nn.Module, prompts: int, dtype: torch.dtype):
        self.stock, self.model, self.prompts, self.device = stock, ours, prompts, device()
        size = image_size_of(ours)
        side = self.side = size // ours.config.vision_config.backbone_config.patch_size
        hidden = self.hidden = ours.config.detr_encoder_config.hidden_size
        self.num_queries = ours.config.detr_decoder_config.num_queries
        self.dtype = dtype
        self.pixel_values = torch.randn(1, 3, size, size, device=self.device)
        self.index = torch.zeros(prompts, dtype=torch.long, device=self.device)
        self.levels = [self.leaf(1, hidden, n * side, n * side) for n in (4, 2, 1)]
        self.position = ours._position_encoding(self.levels[-1].detach())
        self.text = self.leaf(prompts, TOKENS, hidden)
        lengths = TOKENS - torch.arange(prompts, device=self.device) % 4
        self.mask = torch.arange(TOKENS, device=self.device) < lengths[:, None]
        self.bias = additive_mask(self.mask, dtype)
        self.encoded = self.leaf(prompts, side**2, hidden)
        self.queries = self.leaf(prompts, self.num_queries, hidden, dtype=torch.float32)
        self.pixels = self.leaf(prompts, hidden, 4 * side, 4 * side)

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device).requires_grad_()

    def both(self, name: str) -> tuple[nn.Module, nn.Module]:
        return self.stock.get_submodule(name), self.model.get_submodule(name)


def vit(setting: Setting) -> Change:
    stock, ours = setting.both("vision_encoder.backbone")
    return Change(
        "ViT: windows once per run of layers, shared rotary tables, less kept",
        lambda: [stock(setting.pixel_values).last_hidden_state],
        lambda: [ours(setting.pixel_values).last_hidden_state],
        (stock, ours),
        claims=("bytes", "kernels"),
        training_claims=("kernels", "kept"),
    )


def neck(setting: Setting) -> Change:
    """The pyramid from the map of the ViT."""
    stock, ours = (part.fpn_layers for part in setting.both("vision_encoder.neck"))
    grid = setting.leaf(1, stock[2].proj1.in_channels, setting.side, setting.side)
    return Change(
        "neck: all but its last convolutions recomputed",
        lambda: [layer(grid) for layer in stock[:3]],
        lambda: [recomputed(layer, grid) for layer in ours],
        (stock, ours),
        (grid,),
        training_claims=("kept",),
    )


def vision(setting: Setting) -> Change:
    """The whole vision encoder, without the fourth level of the stock one, which nothing reads."""
    stock, ours = setting.both("vision_encoder")
    claims = ("FLOP", "bytes", "kernels")

    def per_prompt() -> list[Tensor]:
        passes = [stock(setting.pixel_values).fpn_hidden_states[:3] for _ in range(setting.prompts)]
        return [level for levels in passes for level in levels]

    def once() -> list[Tensor]:
        return list(ours(setting.pixel_values).fpn_hidden_states) * setting.prompts

    name = "vision encoder once per image"
    return Change(name, per_prompt, once, (stock, ours), claims=claims, training_claims=(*claims, "kept"))


def phrases(setting: Setting, different: int) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, each `(prompts, 32)`, of so many phrases in turn."""
    words = ["".join(parts) for parts in itertools.product(KINDS, THINGS)][:different]
    tokenizer = clip_tokenizer(setting.model.config.text_config.vocab_size)
    tokens = tokenize(tokenizer, [words[i % len(words)] for i in range(setting.prompts)])
    return tokens["input_ids"].to(setting.device), tokens["attention_mask"].to(setting.device)


def text(setting: Setting, name: str, ids: Tensor, mask: Tensor) -> Change:
    """Text encoder and projection. It is frozen in training, where its features are stored."""

    def features(model: nn.Module) -> list[Tensor]:
        return [model.get_text_features(ids, attention_mask=mask).pooler_output * mask[..., None]]

    ways = (lambda: features(setting.stock), lambda: features(setting.model))
    return Change(name, *ways, (setting.stock, setting.model), claims=("FLOP", "bytes"))


def padding(setting: Setting) -> Change:
    return text(setting, "text encoder: padding cut", *phrases(setting, setting.prompts))


def repeats(setting: Setting) -> Change:
    ids, mask = phrases(setting, max(setting.prompts // 2, 1))
    length = -(-int(mask.sum(1).max()) // TOKEN_BLOCK) * TOKEN_BLOCK
    return text(setting, "text encoder: each phrase once, of two prompts each", ids[:, :length], mask[:, :length])


def encoder(setting: Setting) -> Change:
    """The whole encoder, of which the first of its layers' self-attentions is shared."""
    stock, ours = setting.both("detr_encoder")
    side, prompts = setting.side, setting.prompts

    def per_prompt() -> list[Tensor]:
        position = setting.position.transpose(1, 2).unflatten(2, (side, side)).expand(prompts, -1, -1, -1)
        vision = setting.levels[-1].expand(prompts, -1, -1, -1)
        found = stock([vision], setting.text, [position], setting.mask)
        return [found.last_hidden_state]

    def shared() -> list[Tensor]:
        vision = setting.levels[-1].flatten(2).transpose(1, 2)
        return [ours(vision, setting.index, setting.text, setting.position, setting.bias)]

    inputs = (setting.levels[-1], setting.text)
    name = "DETR encoder: first self-attention once per image, MLPs and attention to the prompt recomputed"
    return Change(name, per_prompt, shared, (stock, ours), inputs, ("FLOP", "bytes"), ("kept",))


def decoder(setting: Setting) -> Change:
    """The decoder without one-to-many queries, which stock has not, and the boxes of all of its layers."""
    stock, ours = setting.both("detr_decoder")
    shape = torch.full((1, 2), setting.side, device=setting.device)

    def compared(hidden: Tensor, boxes: Tensor, presence: Tensor) -> list[Tensor]:
        # Ours trains the boxes of every layer before a layer, stock those of one: from the third on gradients differ.
        return [hidden, boxes[:2], boxes[2:].detach(), presence]

    def theirs() -> list[Tensor]:
        position = setting.position.expand(setting.prompts, -1, -1)
        found = stock(setting.encoded, setting.text, position, setting.mask, shape)
        hidden = found.intermediate_hidden_states
        boxes = (inverse_sigmoid(found.reference_boxes) + stock.box_head(hidden)).sigmoid()  # as in `Sam3Model`
        return compared(hidden, boxes, found.presence_logits.squeeze(-1))

    def own() -> list[Tensor]:
        grid = (setting.side, setting.side)
        return compared(*ours(setting.encoded, setting.text, setting.position, setting.bias, grid, False))

    name = "DETR decoder: no host sync, masks recomputed"
    inputs = (setting.encoded, setting.text)
    return Change(name, theirs, own, (stock, ours), inputs, ("kernels",), ("kept",))


def convolution(setting: Setting) -> Change:
    conv = setting.model.mask_decoder.pixel_decoder.conv_layers[1]
    pixels = setting.leaf(setting.prompts, setting.hidden, 2 * setting.side, 2 * setting.side)

    def upsampled() -> list[Tensor]:
        return [F.conv2d(F.interpolate(pixels, scale_factor=2.0, mode="nearest"), conv.weight, padding=1)]

    claims = ("FLOP", "bytes")
    inputs = (pixels, conv.weight)
    name = "sub-pixel convolution of an upsampled map"
    return Change(name, upsampled, lambda: [conv_of_upsampled(conv, pixels)], (), inputs, claims, (*claims, "kept"))


def pixel_decoder(setting: Setting) -> Change:
    """Attention to the prompt and pixel decoder; no masks."""
    stock, ours = setting.both("mask_decoder")

    def per_prompt() -> list[Tensor]:
        normed = stock.prompt_cross_attn_norm(setting.encoded)
        attended, _ = stock.prompt_cross_attn(
            query=normed, key=setting.text, value=setting.text, attention_mask=setting.bias
        )
        levels = [level.expand(setting.prompts, -1, -1, -1) for level in setting.levels]
        pixels = stock._embed_pixels(levels, setting.encoded + attended)
        return [pixels]

    def shared() -> Sequence[Tensor]:
        return [ours(tuple(setting.levels), setting.encoded, setting.index, setting.text, setting.bias)]

    claims, inputs = ("FLOP", "bytes"), (*setting.levels, setting.encoded, setting.text)
    name = "pixel decoder: sub-pixel, and the image's own map once per image"
    return Change(name, per_prompt, shared, (stock, ours), inputs, claims, (*claims, "kept"))


def stock_masks(head: nn.Module, queries: Tensor, pixels: Tensor) -> Tensor:
    """The last lines of `Sam3MaskDecoder.forward`."""
    return torch.einsum("bqc,bchw->bqhw", head.mask_embedder(queries), head.instance_projection(pixels))


def all_masks(setting: Setting) -> Change:
    """What inference with all masks does; training has `matched_masks`."""
    stock, ours = setting.both("mask_decoder")
    return Change(
        "masks: projection of the queries instead of every pixel",
        lambda: [stock_masks(stock, setting.queries, setting.pixels)],
        lambda: [ours.masks(setting.queries, setting.pixels)],
        (stock, ours),
        (setting.queries, setting.pixels),
        ("FLOP", "bytes"),
    )


def matched_masks(setting: Setting) -> Change:
    stock, ours = setting.both("mask_decoder")
    prompt = torch.arange(setting.prompts).repeat_interleave(OBJECTS)
    query = torch.arange(OBJECTS).repeat(setting.prompts) * (setting.num_queries // OBJECTS)
    matches = (prompt.to(setting.device), query.to(setting.device))
    inputs = (setting.queries, setting.pixels)
    return Change(
        f"masks of {OBJECTS} matched queries instead of all",
        lambda: [stock_masks(stock, *inputs)[matches]],
        lambda: [ours.matched_masks(*inputs, prompt, query)],
        (stock, ours),
        inputs,
        ("FLOP", "bytes"),
        ("FLOP", "bytes", "kept"),
    )


def loss(setting: Setting) -> Change:
    """
    The loss of this package called for all prompts, and for one after the other; stock SAM 3 has none. So that the
    sums are the same, all calls divide by the counts of all prompts and compare masks at the same points.
    """
    config, prompts = setting.model.config.loss_config, setting.prompts
    layers = setting.model.config.detr_decoder_config.num_layers
    labels = training_batch(setting.model, 1, prompts, OBJECTS)["labels"]
    targets = pack_labels(labels, prompts, setting.device)
    norms = global_normalizers(targets, union_masks(targets, setting.device)[1])
    points = torch.rand(int(config.mask_num_points * config.mask_oversample_ratio), 2, device=setting.device)

    def boxes() -> Tensor:
        return torch.rand(layers, prompts, setting.num_queries, 4, device=setting.device).requires_grad_()

    logits = [setting.leaf(layers, prompts, setting.num_queries) for _ in range(2)]
    by_layer = [logits[0], boxes(), setting.leaf(layers, prompts), logits[1], boxes()]
    by_prompt = [setting.leaf(prompts, 1, 4 * setting.side, 4 * setting.side), setting.queries, setting.pixels]

    def of(own_labels: list[dict], *inputs: Tensor) -> Tensor:
        *found, queries, pixels = inputs

        def masks(prompt: Tensor, query: Tensor, one_to_many: bool) -> Tensor:
            return setting.model.mask_decoder.matched_masks(queries, pixels, prompt, query)

        with (
            mock.patch.object(loss_sam3_lite, "global_normalizers", lambda *_: norms),
            mock.patch.object(loss_sam3_lite, "_random_points", lambda n, count, _: points[:count].expand(n, -1, -1)),
        ):
            return sam3_lite_loss(DetectionOutputs(*found), own_labels, config, masks)[0]

    def apart() -> list[Tensor]:
        parts = [tensor.split(1, dim=1) for tensor in by_layer] + [tensor.split(1) for tensor in by_prompt]
        losses = [of([label], *inputs) for label, *inputs in zip(labels, *parts, strict=True)]
        return [torch.stack(losses).sum()]

    return Change(
        "loss of all prompts together instead of prompt by prompt",
        apart,
        lambda: [of(labels, *by_layer, *by_prompt)],
        inputs=(*by_layer, *by_prompt),
        claims=("kernels",),
        training_claims=("kernels",),
    )


def enlarging(setting: Setting) -> Change:
    """Post-processing for a photo of 2 x 3 times the model's size, where each prompt found `OBJECTS` ellipses."""
    prompts, queries = setting.prompts, setting.num_queries
    x, y, w, h = torch.rand(4, prompts, queries, 1, 1, device=setting.device)
    line = torch.linspace(0, 1, 4 * setting.side, device=setting.device)
    distance = ((line - x) / (0.05 + 0.1 * w)) ** 2 + ((line[:, None] - y) / (0.05 + 0.1 * h)) ** 2
    found = torch.arange(queries, device=setting.device) < OBJECTS
    outputs = SimpleNamespace(
        pred_logits=torch.where(found, 4.0, -4.0).expand(prompts, -1),
        pred_boxes=torch.rand(prompts, queries, 4, device=setting.device),
        pred_masks=8 * (1 - distance),
        presence_logits=torch.full((prompts, 1), 4.0, device=setting.device),
    )
    photo = tuple(times * image_size_of(setting.model) for times in (2, 3))

    processor = Sam3ImageProcessor()

    def whole() -> list[Tensor]:
        results = processor.post_process_instance_segmentation(outputs, THRESHOLD, THRESHOLD, [photo] * prompts)
        return [mask for result in results for mask in result["masks"]]

    def rectangles() -> list[tuple[Tensor, int, int]]:
        scores = outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()
        kept = [masks[score > THRESHOLD] for masks, score in zip(outputs.pred_masks, scores, strict=True)]
        return [part for masks in kept for part in enlarge_masks(masks, photo, THRESHOLD)]

    def pasted(parts: Sequence[tuple[Tensor, int, int]]) -> list[Tensor]:
        masks = torch.zeros(len(parts), *photo, dtype=torch.long, device=setting.device)
        for mask, (part, top, left) in zip(masks, parts, strict=True):
            mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        return list(masks)

    name = "post-processing: each mask's rectangle as bool"
    return Change(name, whole, rectangles, claims=("bytes",), finish=pasted)


UNDER_AUTOCAST = (
    vit,
    neck,
    vision,
    padding,
    repeats,
    encoder,
    decoder,
    convolution,
    pixel_decoder,
    all_masks,
    matched_masks,
)
FLOAT32 = (loss, enlarging)  # whatever the precision
