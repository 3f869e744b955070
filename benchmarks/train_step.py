"""Time and memory of a training step with a frozen text encoder, split by phase, and the largest batch that fits.

    python benchmarks/train_step.py --models stock-standard standard lite --precisions fp16 --prompts 1 4
    python benchmarks/train_step.py --models lite --precisions fp16 --fit 8 12 16 24 --checkpointing off on

Rows named `stock-PRESET` are `transformers.Sam3Model` under the same loss, as one would train it without this package:
it takes one image per prompt, so an image with four prompts goes through the vision encoder four times, and it
computes the masks of all queries. It returns the logits and boxes of its last layer only, so its loss has neither the
terms of earlier layers nor one-to-many queries: it does less work there than the other rows, which have both. Nor has
it gradient checkpointing.

`seconds` is of whole steps without waiting between phases: forward, loss, backward, clipping, AdamW. The phases are of
other steps, with the device idle between them. `detector` is the forward pass without vision and loss; mask logits of
matched queries count as loss. `data` is decoding, augmenting and collating the batch's images from JPEG in the main
process, which a run leaves to workers. `text` is encoding the phrases of the batch, which a run does once for all of
its steps: it is no part of `seconds`. Compiled rows are not split.
"""

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from common import (
    DTYPES,
    STOCK,
    TOKENS,
    Phases,
    autocast,
    build,
    device,
    jpeg_dataset,
    median,
    parser,
    peak_gb,
    reporting,
    reset_peak,
    seconds_of,
    start_afresh,
    training_batch,
)
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sam3_hf import Sam3LiteConfig, passes_sam3_lite
from sam3_hf.data import PromptCollator, PromptSampling, TrainDataset, load_dataset_splits
from sam3_hf.loss_sam3_lite import DetectionOutputs, sam3_lite_loss
from sam3_hf.precision_sam3_lite import precision_name

STOCK_TOKENS = 32  # of a phrase; what the stock processor pads to
MAX_OVERFLOWS = 40  # halvings of the loss scale
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tried by --fit


def stock_loss(model: nn.Module, batch: dict, loss_config, loss: Callable = sam3_lite_loss) -> Tensor:
    """The loss of this package on the outputs of `transformers.Sam3Model`; see the head of this file."""
    outputs = model(
        pixel_values=batch["pixel_values"][batch["image_index"]],
        text_embeds=BaseModelOutputWithPooling(pooler_output=batch["text_embeds"]),
        attention_mask=batch["attention_mask"],
    )
    found = DetectionOutputs(
        logits=outputs.pred_logits[None],
        boxes=box_convert(outputs.pred_boxes, "xyxy", "cxcywh")[None],
        presence_logits=outputs.presence_logits[None, :, 0],
        semantic_logits=outputs.semantic_seg,
    )

    def masks(prompt: Tensor, query: Tensor, one_to_many: bool) -> Tensor:
        return outputs.pred_masks[prompt.to(device()), query.to(device())]

    return loss(found, batch["labels"], loss_config, masks)[0]


class Trainer:
    """A model with what a training step needs."""

    def __init__(self, name: str, precision: str, image_size: int | None, checkpointing: bool, compiled: bool):
        self.name, self.precision = name, precision
        model = self.model = build(name, image_size).train()
        self.loss_config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK)).loss_config
        model.text_encoder = model.text_projection = None
        if checkpointing:
            model.gradient_checkpointing_enable()
        if compiled:
            model.compile()
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=device().type == "cuda")
        self.scaler = torch.amp.GradScaler(device().type, enabled=precision == "fp16")

    def forward(self, batch: dict) -> Tensor:
        with autocast(self.precision):
            if self.name.startswith(STOCK):
                return stock_loss(self.model, batch, self.loss_config)
            return self.model(**batch).loss

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self, batch: dict) -> None:
        self.scaler.scale(self.forward(batch)).backward()
        self.update()

    def warm_up(self, batch: dict) -> None:
        """
        Steps until the optimizer takes one: the loss scale starts too high for random weights.

        Raises:
            RuntimeError: it never does.
        """
        for _ in range(MAX_OVERFLOWS):
            scale = self.scaler.get_scale()
            self.step(batch)
            if self.scaler.get_scale() >= scale:
                return
        raise RuntimeError(f"{self.name}: gradients are not finite at a loss scale of {self.scaler.get_scale()}.")

    def split_step(self, batch: dict, phases: Phases) -> None:
        """A step with each phase timed on its own."""

        def timed_loss(*arguments):
            with phases("loss"):
                return sam3_lite_loss(*arguments)

        hooks = phases.watch(self.model.vision_encoder, "vision")
        with mock.patch.object(passes_sam3_lite, "sam3_lite_loss", timed_loss), phases("forward"):
            if self.name.startswith(STOCK):
                with autocast(self.precision):
                    loss = stock_loss(self.model, batch, self.loss_config, timed_loss)
            else:
                loss = self.forward(batch)
        for hook in hooks:
            hook.remove()
        with phases("backward"):
            self.scaler.scale(loss).backward()
        with phases("optimizer"):
            self.update()


def measure(arguments: argparse.Namespace, case: tuple, data_seconds: Callable[[int, int, int], float]) -> dict | None:
    """A row of the table; None for a case that does not exist."""
    name, precision, size, batch_size, prompts, checkpointing, compiled = case
    if name.startswith(STOCK) and (checkpointing or compiled):
        return None
    text_seconds = seconds_of_text(name, precision, batch_size * prompts, arguments.repeats)
    start_afresh()
    trainer = Trainer(name, precision, size, checkpointing, compiled)
    pixels = trainer.model.config.vision_config.backbone_config.image_size
    batch = training_batch(trainer.model, batch_size, prompts, arguments.objects)
    row = {"model": name, "precision": precision, "pixels": pixels, "images": batch_size, "prompts per image": prompts}
    row |= {"checkpointing": checkpointing, "compiled": compiled}
    try:
        trainer.warm_up(batch)
        seconds = median(seconds_of(lambda: trainer.step(batch), arguments.repeats))
    except torch.OutOfMemoryError:
        return {**row, "seconds": None, "peak GB": "out of memory"}
    row |= {"seconds": seconds, "images/s": batch_size / seconds, "peak GB": peak_gb()}
    if not compiled:
        phases = Phases()
        for _ in range(arguments.repeats):
            trainer.split_step(batch, phases)
        parts = phases.medians()
        parts["detector"] = parts.pop("forward") - parts["vision"] - parts["loss"]
        parts |= {"data": data_seconds(pixels, batch_size, prompts), "text": text_seconds}
        order = ("data", "text", "vision", "detector", "loss", "backward", "optimizer")
        row |= {phase: parts[phase] for phase in order}
    return row


@functools.cache
@torch.no_grad()
def seconds_of_text(name: str, precision: str, phrases: int, repeats: int) -> float:
    """Seconds to encode so many different phrases."""
    model = build(name)
    length = STOCK_TOKENS if name.startswith(STOCK) else TOKENS
    tokens = torch.randint(1, 1000, (phrases, length), device=device())
    with autocast(precision):
        return median(seconds_of(lambda: model.get_text_features(tokens, torch.ones_like(tokens)), repeats))


def data_timer(folder: Path, images: int) -> Callable[[int, int, int], float]:
    """Seconds to load a batch, by its image size, number of images and of prompts per image."""
    splits = {}

    @functools.cache
    def seconds(pixels: int, batch_size: int, prompts: int) -> float:
        if pixels not in splits:
            splits[pixels] = load_dataset_splits(jpeg_dataset(folder / str(pixels), images, pixels))["train"]
        dataset = TrainDataset(splits[pixels], pixels, PromptSampling(prompts_per_image=prompts))
        collate = PromptCollator()
        return median(seconds_of(lambda: collate([dataset[0, i % images] for i in range(batch_size)]), 3))

    return seconds


def fit(arguments: argparse.Namespace, case: tuple, gigabytes: float) -> dict:
    """The largest batch whose step fits into so much GPU memory."""
    name, precision, size, _, prompts, checkpointing, compiled = case
    start_afresh()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gigabytes * 1e9 / total, 1.0))
    largest, peak = 0, None
    try:
        trainer = Trainer(name, precision, size, checkpointing, compiled)
        for batch_size in BATCHES:
            reset_peak()
            batch = training_batch(trainer.model, batch_size, prompts, arguments.objects)
            trainer.warm_up(batch)
            trainer.step(batch)
            largest, peak = batch_size, peak_gb()
    except torch.OutOfMemoryError:
        pass  # which ends the search
    torch.cuda.set_per_process_memory_fraction(1.0)
    row = {"model": name, "precision": precision, "prompts per image": prompts, "checkpointing": checkpointing}
    return {**row, "compiled": compiled, "card GB": gigabytes, "largest batch": largest, "peak GB": peak}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["tiny-standard", "tiny"], help="presets, or stock-PRESET")
    options.add_argument("--precisions", nargs="+", type=precision_name, choices=DTYPES, default=["fp32"])
    options.add_argument("--image-sizes", nargs="+", type=int, default=[None], help="pixels; default: the presets'")
    options.add_argument("--batch-sizes", nargs="+", type=int, default=[2], help="images per step")
    options.add_argument("--prompts", nargs="+", type=int, default=[1, 4], help="prompts per image")
    options.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"])
    options.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off"])
    options.add_argument("--objects", type=int, default=5, help="objects of each present concept")
    options.add_argument("--repeats", type=int, default=5, help="steps to time")
    options.add_argument("--fit", nargs="+", type=float, default=[], help="GB of memory to fill, instead of timing")
    arguments = options.parse_args()
    if arguments.fit and device().type != "cuda":
        options.error("--fit needs a CUDA GPU")
    switches = [[value == "on" for value in choice] for choice in (arguments.checkpointing, arguments.compile)]
    sizes, batches, prompts = arguments.image_sizes, arguments.batch_sizes, arguments.prompts
    cases = itertools.product(arguments.models, arguments.precisions, sizes, batches, prompts, *switches)
    with tempfile.TemporaryDirectory() as folder, reporting(arguments) as (rows, _):
        timer = data_timer(Path(folder), images=max(batches))
        for case in cases:
            if arguments.fit:
                rows.extend(fit(arguments, case, gigabytes) for gigabytes in arguments.fit)
            elif (row := measure(arguments, case, timer)) is not None:
                rows.append(row)


if __name__ == "__main__":
    main()
