"""Arithmetic, kernels and memory of inference and training at full size, counted on a machine without a GPU.

    python benchmarks/counts.py inference --models stock-standard standard lite --prompts 1 8 80
    python benchmarks/counts.py training --models stock-standard standard lite --precisions fp16

These are counts, not measurements: see `counting.py` for what they leave out. Rows named `stock-PRESET` are
`transformers.Sam3Model`, one call per prompt in inference; in training under the loss of `train_step.py`.

Inference is of one image in half precision, with text features of 8 tokens given; `text TFLOP` is what computing them
would add: for stock, 32 tokens per phrase, the length its processor pads to. Training is of forward pass and loss with
a frozen text encoder; matching is replaced by the first queries of each prompt. `GB` is the most that weights, AdamW's
moments and all else hold until the backward pass starts, which frees more than it adds; `GB per image` is what another
image adds, and `images in` a card what that leaves room for, beside `--reserve`.
"""

import argparse
import functools
import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from common import STOCK, autocast, build, image_size_of, parser, report, training_batch
from counting import Counter, fake_cuda, flops
from train_step import STOCK_TOKENS, TOKENS, stock_loss
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sam3_hf import Sam3LiteConfig, loss_sam3_lite
from sam3_hf.loss_sam3_lite import Match



@functools.cache
def count_call(name: str, image_size: int | None, prompts: int) -> tuple[int, int, int, int]:
    """Operations of the vision encoder, of a whole call, of encoding one phrase, and kernels of a call."""
    with fake_cuda(grid_side(name, image_size)), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        model = build(name, image_size)
        torch.set_default_dtype(torch.float32)
        size = image_size_of(model)
        pixels = torch.empty(1, 3, size, size, dtype=torch.float16)
        text = torch.empty(prompts, TOKENS, model.config.detr_encoder_config.hidden_size, dtype=torch.float16)
        mask = torch.ones(prompts, TOKENS, dtype=torch.long)
        with flops() as counter, Counter() as count:
            vision = model.vision_encoder(pixels)
            vision_flops = counter.get_total_flops()
            features = BaseModelOutputWithPooling(pooler_output=text)
            model(vision_embeds=vision, text_embeds=features, attention_mask=mask)
        total = counter.get_total_flops()
        tokens = STOCK_TOKENS if name.startswith(STOCK) else TOKENS
        with flops() as counter:
            model.text_encoder.text_model(torch.zeros(1, tokens, dtype=torch.long))
    return vision_flops, total, counter.get_total_flops(), count.kernels


def inference(arguments: argparse.Namespace, name: str, prompts: int) -> dict:
    calls, asked = (prompts, 1) if name.startswith(STOCK) else (1, prompts)
    vision, total, text, kernels = count_call(name, arguments.image_size, asked)
    return {
        "model": name,
        "prompts": prompts,
        "vision TFLOP": calls * vision / 1e12,
        "detector and masks TFLOP": calls * (total - vision) / 1e12,
        "TFLOP": calls * total / 1e12,
        "text TFLOP": prompts * text / 1e12,
        "kernels": calls * kernels,
    }


def absent_class(arguments: argparse.Namespace, name: str) -> dict:
    """What another class costs as part of the vision pass: its detector alone, and with masks."""
    found = {}
    with fake_cuda(grid_side(name, arguments.image_size)), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        model = build(name, arguments.image_size)
        torch.set_default_dtype(torch.float32)
        size = image_size_of(model)
        hidden = model.config.detr_encoder_config.hidden_size
        with flops() as counter:
            levels = model.get_vision_features(torch.empty(1, 3, size, size, dtype=torch.float16)).fpn_hidden_states
        vision = counter.get_total_flops()
        for prompts in (8, 9):
            index = torch.zeros(prompts, dtype=torch.long)
            text = torch.empty(prompts, TOKENS, hidden, dtype=torch.float16)
            with flops() as counter:
                detected = model.detect(levels, index, text, None, None, None, False)
                detector = counter.get_total_flops()
                bias = None
                pixels, _ = model.mask_decoder(levels, detected.encoded, index, detected.prompt_features, bias)
                model.mask_decoder.masks(detected.queries, pixels)
            found[prompts] = detector, counter.get_total_flops()
    detector, both = (found[9][i] - found[8][i] for i in range(2))
    return {"model": name, "class without masks / vision": detector / vision, "with masks / vision": both / vision}


def fixed_matches(logits, boxes, targets, config, one_to_many) -> list[Match]:
    """The first queries of each prompt, one per object, and `one_to_many_topk` in the last set of the copy."""
    prompts = np.repeat(np.arange(len(targets.counts)), targets.counts)
    objects = np.arange(len(prompts))
    queries = objects - targets.first[prompts]
    matches = [Match(prompts, queries, objects)] * (len(logits) - one_to_many)
    if one_to_many:
        copies = config.one_to_many_topk
        matches.append(Match(*(np.repeat(column, copies) for column in (prompts, queries, objects))))
    return matches


def step_memory(name: str, image_size: int | None, precision: str, images: int, prompts: int, checkpointing: bool):
    """Bytes at the peak of forward pass and loss, and their kernels."""
    with fake_cuda(grid_side(name, image_size)):
        model = build(name, image_size).train()
        model.text_encoder = model.text_projection = None
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK)).loss_config
        batch = training_batch(model, images, prompts, objects=5)
        counts = [len(label["boxes"]) for label in batch["labels"] if len(label["boxes"])]
        known = SimpleNamespace(tolist=lambda: counts)  # reading a tensor back is what fake ones cannot
        weights = sum(parameter.nbytes for parameter in model.parameters())
        with (
            mock.patch.object(loss_sam3_lite, "match_queries", fixed_matches),
            mock.patch.object(torch, "bincount", lambda *_, **__: known),
            Counter(3 * weights) as counter,  # with AdamW's two moments
            autocast(precision),
        ):
            loss = stock_loss(model, batch, loss_config) if name.startswith(STOCK) else model(**batch).loss
        del loss
    return counter.peak, counter.kernels


def grid_side(name: str, image_size: int | None) -> int:
    config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK))
    return (image_size or config.image_size) // config.vision_config.backbone_config.patch_size


def training(arguments: argparse.Namespace, case: tuple) -> dict | None:
    name, precision, prompts, checkpointing = case
    if name.startswith(STOCK) and checkpointing:
        return None
    (one, kernels), (two, _) = (
        step_memory(name, arguments.image_size, precision, images, prompts, checkpointing) for images in (1, 2)
    )
    row = {"model": name, "precision": precision, "prompts per image": prompts, "checkpointing": checkpointing}
    row |= {"GB": one / 1e9, "GB per image": (two - one) / 1e9, "kernels": kernels}
    for card in arguments.cards:
        left = card - arguments.reserve - one / 1e9
        row[f"images in {card:g} GB"] = 0 if left < 0 else 1 + int(left / ((two - one) / 1e9))
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["inference", "training", "class"], help="class: cost of another class")
    options.add_argument("--models", nargs="+", default=["stock-tiny-standard", "tiny"], help="presets, stock-PRESET")
    options.add_argument("--image-size", type=int, help="side of the input in pixels; default: the presets'")
    options.add_argument("--prompts", nargs="+", type=int, default=[1, 8], help="per image")
    options.add_argument("--precisions", nargs="+", choices=["fp32", "fp16"], default=["fp32"], help="of training")
    options.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"])
    options.add_argument("--cards", nargs="+", type=float, default=[8, 12, 16, 24], help="GB of GPUs to fill")
    options.add_argument("--reserve", type=float, default=1.0, help="GB for the CUDA context and fragmentation")
    arguments = options.parse_args()
    if arguments.what == "inference":
        rows = [inference(arguments, name, count) for count in arguments.prompts for name in arguments.models]
        for row in rows:
            base = next((r for r in rows if r["prompts"] == row["prompts"] and r["model"].startswith(STOCK)), None)
            row["stock / this"] = base and base["TFLOP"] / row["TFLOP"]
    elif arguments.what == "class":
        rows = [absent_class(arguments, name) for name in arguments.models if not name.startswith(STOCK)]
    else:
        checkpointing = [value == "on" for value in arguments.checkpointing]
        cases = itertools.product(arguments.models, arguments.precisions, arguments.prompts, checkpointing)
        rows = [row for case in cases if (row := training(arguments, case)) is not None]
    report(arguments, rows)


if __name__ == "__main__":
    main()
