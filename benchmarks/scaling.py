"""What inference and training cost as one size grows, and how training would scale to several GPUs.

    python benchmarks/scaling.py --model lite --precision fp16 --image-sizes 336 672 1008 --prompts 1 4 16

One size changes at a time; the others are `--base-prompts`, `--base-objects` of each present concept, and the preset's
pixels and queries. Inference is of one image by the model alone; a step is forward, loss, backward and AdamW with a
frozen text encoder. `class_over_vision` is the cost of one more prompt, from the fewest to the most measured, as a
part of the vision pass, masks of every prompt included; `absent_class_over_vision` that of one that nothing is found
for, as `Sam3LiteModel.find` has it, where the mask head does not run. `nothing found s` is without the vision pass.

Data-parallel scaling is a calculation, not a measurement: from the measured step and backward pass, the bytes of the
float32 gradients, and the speed of a link. A ring moves `2 (n - 1) / n` times the gradients; `overlapped` hides that
behind the backward pass, as DDP does at best.
"""

import argparse
from collections.abc import Iterator

import torch
from common import DTYPES, Phases, build, image_size_of, median, parser, reporting, seconds_of, training_batch
from torch.utils.flop_counter import FlopCounterMode
from train_step import Trainer

from sam3_hf.precision_sam3_lite import precision_name

AXES = ("image_sizes", "prompts", "objects", "queries")


@torch.no_grad()
def inference_seconds(arguments: argparse.Namespace, pixels: int | None, prompts: int, queries: int | None) -> dict:
    """Seconds of the vision encoder, of the whole model, and the model's arithmetic."""
    overrides = {} if queries is None else {"num_queries": queries}
    model = build(arguments.model, pixels, **overrides).to(DTYPES[arguments.precision])
    inputs = training_batch(model, 1, prompts, 0)
    del inputs["labels"]
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    vision = median(seconds_of(lambda: model.vision_encoder(inputs["pixel_values"]), arguments.repeats))
    whole = median(seconds_of(lambda: model(**inputs), arguments.repeats))
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    features = model.get_vision_features(inputs.pop("pixel_values"))
    nothing = median(seconds_of(lambda: model.find(features, **inputs, threshold=1.0), arguments.repeats))
    size = image_size_of(model)
    seconds = {"vision s": vision, "model s": whole, "nothing found s": nothing}
    return {"pixels": size, **seconds, "TFLOP": counter.get_total_flops() / 1e12}


def step_seconds(arguments: argparse.Namespace, pixels: int | None, prompts: int, objects: int) -> float:
    trainer = Trainer(arguments.model, arguments.precision, pixels, checkpointing=False, compiled=False)
    batch = training_batch(trainer.model, arguments.batch_size, prompts, objects)
    trainer.warm_up(batch)
    return median(seconds_of(lambda: trainer.step(batch), arguments.repeats))


def measurements(arguments: argparse.Namespace) -> Iterator[dict]:
    base = {"image_sizes": None, "prompts": arguments.base_prompts, "objects": arguments.base_objects, "queries": None}
    for axis in AXES:
        for value in getattr(arguments, axis):
            sizes = {**base, axis: value}
            row = {"axis": axis.replace("_", " "), "value": value}
            if axis != "objects":
                row |= inference_seconds(arguments, sizes["image_sizes"], sizes["prompts"], sizes["queries"])
            if axis != "queries":
                row["step s"] = step_seconds(arguments, sizes["image_sizes"], sizes["prompts"], sizes["objects"])
            yield row


def class_over_vision(rows: list[dict], column: str) -> float | None:
    """What another prompt adds to a column, as a part of the vision pass; None with fewer than two prompt counts."""
    counts = sorted((row for row in rows if row["axis"] == "prompts"), key=lambda row: row["value"])
    if len(counts) < 2:
        return None
    first, last = counts[0], counts[-1]
    return (last[column] - first[column]) / (last["value"] - first["value"]) / first["vision s"]


def data_parallel(arguments: argparse.Namespace) -> list[dict]:
    trainer = Trainer(arguments.model, arguments.precision, None, checkpointing=False, compiled=False)
    batch = training_batch(trainer.model, arguments.batch_size, arguments.base_prompts, arguments.base_objects)
    trainer.warm_up(batch)
    step = median(seconds_of(lambda: trainer.step(batch), arguments.repeats))
    phases = Phases()
    for _ in range(arguments.repeats):
        trainer.split_step(batch, phases)
    backward = phases.medians()["backward"]
    gradient_bytes = sum(4 * parameter.numel() for parameter in trainer.parameters)
    rows = []
    for link in arguments.links:
        for count in arguments.gpus:
            exchange = 2 * (count - 1) / count * gradient_bytes / (link * 1e9)
            row = {"GPUs": count, "link GB/s": link, "gradient MB": gradient_bytes / 1e6, "exchange s": exchange}
            row["efficiency, nothing overlapped"] = step / (step + exchange)
            row["efficiency, overlapped"] = step / (step + max(exchange - backward, 0))
            rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="a preset")
    options.add_argument("--precision", type=precision_name, choices=DTYPES, default="fp32")
    options.add_argument("--image-sizes", type=int, nargs="*", default=[128, 256], help="pixels")
    options.add_argument("--prompts", type=int, nargs="*", default=[1, 4, 16], help="per image")
    options.add_argument("--objects", type=int, nargs="*", default=[1, 10], help="of each present concept")
    options.add_argument("--queries", type=int, nargs="*", default=[50, 200])
    options.add_argument("--base-prompts", type=int, default=4)
    options.add_argument("--base-objects", type=int, default=5)
    options.add_argument("--batch-size", type=int, default=1, help="images of a training step")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--gpus", type=int, nargs="*", default=[2, 4, 8])
    options.add_argument("--links", type=float, nargs="*", default=[12.5, 25, 400], help="GB/s in one direction")
    arguments = options.parse_args()
    with reporting(arguments) as (rows, more):
        for row in measurements(arguments):
            rows.append(row)
        for name, column in (("class_over_vision", "model s"), ("absent_class_over_vision", "nothing found s")):
            more[name] = class_over_vision(rows, column)
        more["data_parallel"] = data_parallel(arguments)


if __name__ == "__main__":
    main()
