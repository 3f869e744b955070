"""Time of inference, from a JPEG on disk to boolean masks in memory and of the model alone, by prompts per image.

    python benchmarks/inference.py --models stock-standard standard lite --precision fp16 --prompts 1 2 4 8 16 80

Rows named `stock-PRESET` are `transformers.Sam3Model` with its own processor, one call per prompt, as its users write
it: each call runs the vision encoder. The other rows ask for all prompts in one call. Rows with `stored text` take
text features that were computed before, as a fixed vocabulary allows. Weights are random; the score threshold is set
so that each prompt has `--detections` masks to enlarge. All prompts are therefore "found".

`pipeline` is `Sam3LitePipeline` on the same files and prompts: the mask head runs for kept detections only, and masks
are left run-length encoded.

`vision MFU` is the arithmetic of the vision encoder over its time and over the ceiling, the fastest of a few large
matrix products in the same precision and run.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import (
    DTYPES,
    STOCK,
    build,
    device,
    image_size_of,
    jpeg_dataset,
    median,
    on_device,
    parser,
    peak_gb,
    percentile,
    reporting,
    reset_peak,
    seconds_of,
    start_afresh,
)
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3Processor

from sam3_hf import Sam3LiteConfig, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data.generated import CONCEPTS
from sam3_hf.precision_sam3_lite import precision_name

CEILING_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}


class Predictor:
    """A model and its processor, asked as its users ask."""

    def __init__(self, name: str, dtype: torch.dtype, image_size: int | None, prompts: list[str], stored: bool):
        self.dtype, self.prompts = dtype, prompts
        self.one_by_one = name.startswith(STOCK)
        self.model = build(name, image_size).to(dtype)
        config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK))
        size = image_size_of(self.model)
        self.processor = Sam3LiteProcessor.from_config(config.changed(image_size=size))
        if self.one_by_one:
            parts = self.processor.image_processor, self.processor.tokenizer
            self.processor = Sam3Processor(*parts, target_size=size)
        self.text = None
        if stored:
            tokens = on_device(self.processor(text=prompts))
            features = self.model.get_text_features(**tokens).pooler_output
            self.text = {"text_embeds": features, "attention_mask": tokens["attention_mask"]}

    def inputs(self, images: list[Image.Image]) -> list[dict]:
        """What each call of the model takes."""
        if self.one_by_one:
            texts = [[prompt] * len(images) for prompt in self.prompts]
        else:
            texts = [None] if self.text else [[self.prompts] * len(images)]
        calls = []
        for text in texts:
            encoded = dict(self.processor(images=images, text=text, return_tensors="pt"))
            encoded.pop("original_sizes")
            encoded = on_device(encoded)
            encoded["pixel_values"] = encoded["pixel_values"].to(self.dtype)
            if self.text:
                encoded |= {name: torch.cat([value] * len(images)) for name, value in self.text.items()}
                images_of_prompts = torch.arange(len(images), device=device())
                encoded["image_index"] = images_of_prompts.repeat_interleave(len(self.prompts))
            calls.append(encoded)
        return calls

    def masks(self, outputs: list, images: list[Image.Image], threshold: float) -> list[dict]:
        """Detections at the size of the images, in main memory."""
        found = []
        sizes = [(image.height, image.width) for image in images]
        if not self.one_by_one:
            sizes = [size for size in sizes for _ in self.prompts]
        for output in outputs:
            found += self.processor.post_process_instance_segmentation(output, threshold, target_sizes=sizes)
        return [{name: value.cpu() for name, value in one.items()} for one in found]


def threshold_for(outputs: list, detections: int) -> float:
    """A score that about `detections` of each prompt's queries exceed."""
    scores = torch.cat([output.pred_logits.sigmoid() * output.presence_logits.sigmoid() for output in outputs]).float()
    return scores.topk(min(detections + 1, scores.shape[1])).values[:, -1].mean().item()


@torch.no_grad()
def measure(
    arguments: argparse.Namespace, name: str, count: int, stored: bool, files: list[Path], peak: float
) -> dict:
    start_afresh()
    prompts = [f"{CONCEPTS[i % len(CONCEPTS)]} {i}" for i in range(count)]  # all different
    predictor = Predictor(name, DTYPES[arguments.precision], arguments.image_size, prompts, stored)
    if arguments.compile and not predictor.one_by_one:
        predictor.model.compile(mode=arguments.compile)
    images = [Image.open(file).convert("RGB") for file in files]
    calls = predictor.inputs(images)

    def model_only() -> list:
        torch.compiler.cudagraph_mark_step_begin()
        return [predictor.model(**call) for call in calls]

    threshold = threshold_for(model_only(), arguments.detections)

    def end_to_end() -> list[dict]:
        pictures = [Image.open(file).convert("RGB") for file in files]
        torch.compiler.cudagraph_mark_step_begin()
        outputs = [predictor.model(**call) for call in predictor.inputs(pictures)]
        return predictor.masks(outputs, pictures, threshold)

    reset_peak()
    model_seconds = seconds_of(model_only, arguments.repeats)
    seconds = seconds_of(end_to_end, arguments.repeats)
    row = {
        "model": name + (", stored text" if stored else ""),
        "images": len(files),
        "prompts per image": count,
        "model s": median(model_seconds),
        "model images/s": len(files) / median(model_seconds),
        "end to end p50 s": median(seconds),
        "end to end p95 s": percentile(seconds, 0.95),
        "end to end images/s": len(files) / median(seconds),
        "peak GB": peak_gb(),
    }
    if not predictor.one_by_one and not stored:
        pipeline = Sam3LitePipeline(predictor.model, predictor.processor)

        def piped() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            pipeline(files, prompts, len(files), threshold=threshold)

        row["pipeline p50 s"] = median(seconds_of(piped, arguments.repeats))
    pixels = calls[0]["pixel_values"]
    vision = median(seconds_of(lambda: predictor.model.vision_encoder(pixels), arguments.repeats))
    flops = vision_flops(predictor.model, pixels)
    return row | {"vision s": vision, "vision TFLOP": flops / 1e12, "vision MFU": flops / vision / peak}


def vision_flops(model: nn.Module, pixels: torch.Tensor) -> int:
    # Counted in eager mode: a compiled encoder hides its operations.
    encoder = model.vision_encoder
    with FlopCounterMode(display=False) as counter:
        encoder.forward(pixels)
    return counter.get_total_flops()


def ceiling(dtype: torch.dtype) -> float:
    """Operations per second of the fastest of a few square matrix products."""
    best = 0.0
    for side in CEILING_SIDES[device().type]:
        a, b = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
        best = max(best, 2 * side**3 / min(seconds_of(lambda a=a, b=b: a @ b, 20, warmup=3)))
    return best


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["stock-tiny-standard", "tiny"], help="presets, stock-PRESET")
    options.add_argument(
        "--precision", type=precision_name, choices=DTYPES, default="fp32", help="of weights and inputs"
    )
    options.add_argument("--image-size", type=int, help="side of the input in pixels; default: the presets'")
    options.add_argument("--images", type=int, nargs="+", default=[1], help="images per call")
    options.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="per image")
    options.add_argument("--detections", type=int, default=10, help="masks per prompt")
    options.add_argument("--repeats", type=int, default=10)
    modes = ["default", "reduce-overhead", "max-autotune"]
    options.add_argument("--compile", nargs="?", const="default", choices=modes, help="all but the stock rows")
    options.add_argument("--stored-text", action="store_true", help="also rows with stored text features")
    arguments = options.parse_args()
    peak = ceiling(DTYPES[arguments.precision])
    with tempfile.TemporaryDirectory() as folder, reporting(arguments) as (rows, more):
        more["ceiling_tflops"] = peak / 1e12
        first = Sam3LiteConfig.from_preset(arguments.models[0].removeprefix(STOCK)).image_size
        data = jpeg_dataset(Path(folder), max(arguments.images), arguments.image_size or first)
        files = sorted((data / "train").glob("*.jpg"))
        for images in arguments.images:
            for count in arguments.prompts:
                for name in arguments.models:
                    rows.append(measure(arguments, name, count, False, files[:images], peak))
                    if arguments.stored_text and not name.startswith(STOCK):
                        rows.append(measure(arguments, name, count, True, files[:images], peak))


if __name__ == "__main__":
    main()
