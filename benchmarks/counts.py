"""Arithmetic, kernels and memory of inference and training at full size, counted on a machine without a GPU.

    python benchmarks/counts.py inference --models stock-standard standard lite --prompts 1 8 80
    python benchmarks/counts.py training --models stock-standard standard lite --precisions fp16
    python benchmarks/counts.py distillation --models lite --teacher standard --precisions fp16 --prompts 4

These are counts, not measurements: see `counting.py` for what they leave out. Rows named `stock-PRESET` are
`transformers.Sam3Model`, one call per prompt in inference; in training under the loss of `train_step.py`.

Inference is of one image in half precision, with text features of 8 tokens given; `text TFLOP` is what computing them
would add: for stock, 32 tokens per phrase, the length its processor pads to. `masks` says for how many queries of each
prompt there are masks: all, or the number of `--kept` ones, as `Sam3LitePipeline` has it; for 0 the mask head does not
run. `GB moved` is what all kernels read and write, one by one.

Training is of one image with a frozen text encoder; matching is replaced by the first queries of each prompt. `TFLOP`
are those of forward pass, loss and backward pass; `kernels` and `GB moved` of forward pass and loss. `GB` is the most
that weights, AdamW's moments and all else hold at once: up to the loss by the rules of CUDA, and then what is held at
its end with what the backward pass adds on a CPU, whose autocast differs in little. `GB per image` is what a third
image adds, and `images in` a card what that leaves room for, beside `--reserve`. With `--adapters`, low-rank adapters
of `--rank` train on the detector or on all parts, and the weights are frozen.

Distillation is training by a teacher's answers alone, after the steps on its features; it sees every second prompt,
and is in half precision, without its text encoder. `TFLOP` and `GB` are with the teacher; `cached` is for steps in
which its feature pyramids come from the disk, while its vision encoder stays in memory.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from common import STOCK, TOKENS, autocast, build, image_size_of, parser, report
from counting import Counter, fake_cpu, fake_cuda, flops
from fake_steps import FakeDistiller, FakeTrainer, counted_matches
from torch import Tensor
from train_step import STOCK_TOKENS
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.modeling_sam3_lite import PROMPTS_SEGMENTED_AT_ONCE
from sam3_hf.precision_sam3_lite import precision_name
from sam3_hf.training.adapter_arguments import AdapterArguments

IMAGES = (1, 2, 3)  # of the training steps that are counted


class Call(NamedTuple):
    """What a call of the model does on an image."""

    vision: int  # operations
    total: int
    text: int  # of one phrase, beside the total
    kernels: int
    moved: int  # bytes


@functools.cache
def count_call(name: str, image_size: int | None, prompts: int, kept: int | None) -> Call:
    """
    Args:
        kept: masks per prompt; None: of all queries.
    """
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
            if kept is None:
                features = BaseModelOutputWithPooling(pooler_output=text)
                model(vision_embeds=vision, text_embeds=features, attention_mask=mask)
            else:
                find(model, vision, text, mask, kept)
        total = counter.get_total_flops()
        tokens = STOCK_TOKENS if name.startswith(STOCK) else TOKENS
        with flops() as counter:
            model.text_encoder.text_model(torch.zeros(1, tokens, dtype=torch.long))
    return Call(vision_flops, total, counter.get_total_flops(), count.kernels, count.moved)


def find(model: Sam3LiteModel, vision: Sam3VisionEncoderOutput, text: Tensor, mask: Tensor, kept: int) -> None:
    """What `Sam3LiteModel.find` does for one image if each prompt keeps the first `kept` of its queries."""
    index, levels = torch.zeros(len(text), dtype=torch.long), vision.fpn_hidden_states
    found = model.detect(levels, index, text, mask.bool(), None, None, False, model.image_summary(vision))
    if not kept:
        return
    shared = model.mask_decoder.shared_maps(levels, len(text))
    for rows in index.split(PROMPTS_SEGMENTED_AT_ONCE):
        some = torch.arange(len(rows))
        pixels = model._mask_features(levels, rows, found.of_prompts(some), shared)
        matches = torch.empty(len(rows) * kept, dtype=torch.long)
        with counted_matches([kept] * len(rows)):
            model.mask_decoder.matched_masks(found.queries[some], pixels, matches, matches)


def inference(arguments: argparse.Namespace, name: str, prompts: int, kept: int | None) -> dict:
    calls, asked = (prompts, 1) if name.startswith(STOCK) else (1, prompts)
    call = count_call(name, arguments.image_size, asked, kept)
    return {
        "model": name,
        "prompts": prompts,
        "masks": "all" if kept is None else kept,
        "vision TFLOP": calls * call.vision / 1e12,
        "detector and masks TFLOP": calls * (call.total - call.vision) / 1e12,
        "TFLOP": calls * call.total / 1e12,
        "text TFLOP": prompts * call.text / 1e12,
        "kernels": calls * call.kernels,
        "GB moved": calls * call.moved / 1e9,
    }


def another_class(arguments: argparse.Namespace, name: str) -> dict:
    """What another class costs as part of the vision pass: absent, found, and with masks of all queries."""
    row = {"model": name}
    for column, kept in (("absent", 0), ("10 found", 10), ("all masks", None)):
        fewer, more = (count_call(name, arguments.image_size, prompts, kept) for prompts in (8, 9))
        row[f"{column} / vision"] = (more.total - fewer.total) / fewer.vision
    return row


class Forward(NamedTuple):
    """What forward pass and loss of a step do."""

    kernels: int
    moved: int  # bytes
    peak: int  # bytes, with AdamW's two moments
    held: int  # of them, at its end


def count_forward(make: Callable[[], FakeTrainer], grid: int, precision: str, prompts: int) -> list[Forward]:
    """Of steps on 1, 2 and 3 images."""
    counted = []
    with fake_cuda(grid):
        trainer = make()
        weights = sum(parameter.nbytes * (1 + 2 * parameter.requires_grad) for parameter in trainer.model.parameters())
        for images in IMAGES:
            batch = trainer.batch(images, prompts)
            with Counter(weights + trainer.resident) as counter, autocast(precision):
                loss = trainer.loss(batch)
            counted.append(Forward(counter.kernels, counter.moved, counter.peak, counter.live))
            del loss
    return counted


def count_backward(make: Callable[[], FakeTrainer], grid: int, precision: str, prompts: int) -> tuple[list[int], int]:
    """
    Bytes that the backward pass adds to what is held at its start, of steps on 1, 2 and 3 images; operations of the
    first step.
    """
    added = []
    with fake_cpu(grid):
        trainer = make()
        for images in IMAGES:
            batch = trainer.batch(images, prompts)
            with Counter(device="cpu") as counter:
                with autocast(precision):
                    loss = trainer.loss(batch)
                held = counter.peak = counter.live
                loss.backward()
            added.append(counter.peak - held)
            trainer.model.zero_grad()
        batch = trainer.batch(IMAGES[0], prompts)
        with flops() as arithmetic:  # which keeps tensors alive
            trainer.loss(batch).backward()
    return added, arithmetic.get_total_flops()


def grid_side(name: str, image_size: int | None) -> int:
    config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK))
    return (image_size or config.image_size) // config.vision_config.backbone_config.patch_size


def training(arguments: argparse.Namespace, case: tuple) -> dict | None:
    name, precision, prompts, checkpointing, targets = case
    if name.startswith(STOCK) and (checkpointing or targets != "none"):
        return None
    adapters = None if targets == "none" else AdapterArguments(arguments.rank, lora_targets=targets)
    row = {"model": name, "precision": precision, "prompts per image": prompts, "checkpointing": checkpointing}
    row |= {"adapters": targets} | ({} if adapters is None else {"rank": arguments.rank})
    make = partial(FakeTrainer, name, arguments.image_size, checkpointing, adapters)
    return row | count_step(arguments, make, (name, precision, prompts))


def distillation(arguments: argparse.Namespace, case: tuple) -> dict:
    name, precision, prompts, checkpointing, cached = case
    make = partial(FakeDistiller, name, arguments.teacher, arguments.image_size, checkpointing, cached)
    row = {"model": name, "teacher": arguments.teacher, "precision": precision, "prompts per image": prompts}
    row |= {"checkpointing": checkpointing, "cached": cached}
    return row | count_step(arguments, make, (name, precision, prompts))


def count_step(arguments: argparse.Namespace, make: Callable[[], FakeTrainer], case: Sequence) -> dict:
    """The figures of a row of training."""
    name, precision, prompts = case
    grid = grid_side(name, arguments.image_size)
    forward, (added, flop) = (count(make, grid, precision, prompts) for count in (count_forward, count_backward))
    peaks = (max(counted.peak, counted.held + more) for counted, more in zip(forward, added, strict=True))
    one, two, three = (peak / 1e9 for peak in peaks)
    per_image = three - two
    row = {"TFLOP": flop / 1e12, "kernels": forward[0].kernels, "GB moved": forward[0].moved / 1e9}
    row |= {"GB": one, "GB per image": per_image}
    for card in arguments.cards:
        space = card - arguments.reserve
        fits = 2 + int((space - two) / per_image) if space >= two else int(space >= one)
        row[f"images in {card:g} GB"] = fits
    return row


def main() -> None:
    options = parser(__doc__)
    kinds = ["inference", "training", "distillation", "class"]
    options.add_argument("what", choices=kinds, help="class: cost of another class")
    options.add_argument("--models", nargs="+", default=["stock-tiny-standard", "tiny"], help="presets, stock-PRESET")
    options.add_argument("--image-size", type=int, help="side of the input in pixels; default: the presets'")
    options.add_argument("--prompts", nargs="+", type=int, default=[1, 8], help="per image")
    options.add_argument("--kept", nargs="*", type=int, default=[10], help="masks per prompt; beside those of all")
    options.add_argument(
        "--precisions", nargs="+", type=precision_name, choices=["fp32", "fp16"], default=["fp32"], help="of training"
    )
    options.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"])
    options.add_argument("--teacher", default="tiny-standard", help="preset, of distillation")
    options.add_argument("--cached", nargs="+", choices=["off", "on"], default=["off", "on"], help="its pyramids")
    options.add_argument("--adapters", nargs="+", choices=["none", "detector", "vision", "all"], default=["none"])
    options.add_argument("--rank", type=int, default=16, help="of the adapters")
    options.add_argument("--cards", nargs="+", type=float, default=[8, 12, 16, 24], help="GB of GPUs to fill")
    options.add_argument("--reserve", type=float, default=1.0, help="GB for the CUDA context and fragmentation")
    arguments = options.parse_args()
    if arguments.what == "inference":
        rows = [
            inference(arguments, name, count, kept)
            for count in arguments.prompts
            for name in arguments.models
            for kept in (None, *arguments.kept)
            if kept is None or not name.startswith(STOCK)
        ]
        for row in rows:
            base = next((r for r in rows if r["prompts"] == row["prompts"] and r["model"].startswith(STOCK)), None)
            row["stock / this"] = base and base["TFLOP"] / row["TFLOP"]
    elif arguments.what == "class":
        rows = [another_class(arguments, name) for name in arguments.models if not name.startswith(STOCK)]
    else:
        checkpointing, cached = (
            [value == "on" for value in given] for given in (arguments.checkpointing, arguments.cached)
        )
        cases = itertools.product(arguments.models, arguments.precisions, arguments.prompts, checkpointing)
        if arguments.what == "training":
            rows = [
                row
                for case in cases
                for targets in arguments.adapters
                if (row := training(arguments, (*case, targets))) is not None
            ]
        else:
            rows = [distillation(arguments, (*case, held)) for case in cases for held in cached]
    report(arguments, rows)


if __name__ == "__main__":
    main()
