"""What the benchmarks share: the record of the machine, models, batches, timing, tables and result files."""

import argparse
import datetime
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.checkpoints import stock_config
from sam3_hf.data.generated import write_dataset

torch.backends.cudnn.allow_tf32 = False  # fp32 is float32, in convolutions too

STOCK = "stock-"
TOKENS = 8  # of a phrase of a few words
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
# What a result depends on, as git takes it.
CODE = ("../sam3_hf", "../training", ".", ":(exclude)results", ":(exclude)*.md")


def environment() -> dict:
    """Machine, versions and commit that a result belongs to."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder, check=True).stdout.strip()

    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else f"CPU {_cpu_name()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--", *CODE).splitlines()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = Path(sys.argv[0]).stem
    moment = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    default = RESULTS / f"{name}_{moment}.json"
    result.add_argument("--output", type=_new_file, default=default, help="JSON file to write; default: %(default)s")
    return result


def row_parser(description: str, rows: Iterable[str], steps: int, train_images: int):
    """The parser of `run ROW` and `table`, and that of `run` for more options; the numbers are defaults."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score one row")
    run.add_argument("row", choices=rows)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--steps", type=int, default=steps)
    run.add_argument("--images", type=int, default=100, help="pictures of each split to score on")
    run.add_argument("--train-images", type=int, default=train_images, help="pictures to learn from")
    table = commands.add_parser("table", help="print the results as Markdown")
    for command in (run, table):
        command.add_argument("--output", type=Path, required=True, help="folder of the results")
    return result, run


def _new_file(name: str) -> Path:
    if Path(name).exists():
        raise argparse.ArgumentTypeError(f"{name} exists already: choose another name, or delete it")
    return Path(name)


def report(arguments: argparse.Namespace, rows: list[dict], **more) -> None:
    """Prints the rows as a table and writes them, with the settings and the environment, to `arguments.output`.

    Raises:
        FileExistsError: the file exists.
    """
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    record = environment()
    sys.stdout.write(f"{record['machine']}, torch {record['torch']}, transformers {record['transformers']}, ")
    sys.stdout.write(f"commit {record['commit']}, {record['changed_files']} files changed since\n\n{table(rows)}\n")
    for name, value in more.items():
        sys.stdout.write(f"{name}: {value}\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("x", encoding="utf-8") as file:
        json.dump({"environment": record, "settings": settings, **more, "rows": rows}, file, indent=1, default=str)
        file.write("\n")


@contextmanager
def reporting(arguments: argparse.Namespace) -> Iterator[tuple[list[dict], dict]]:
    """
    Rows and more for `report` to fill, reported at the end: also where SIGTERM ends the benchmark early, as `timeout`
    does, with `complete` false.
    """
    rows: list[dict] = []
    more: dict = {"complete": False}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield rows, more
        more["complete"] = True
    finally:
        if rows:
            report(arguments, rows, **more)


def table(rows: list[dict]) -> str:
    """A Markdown table; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def device() -> torch.device:
    """The default device where one was set (see `counting.py`), otherwise the GPU, otherwise the CPU."""
    chosen = torch.get_default_device()
    return torch.device("cuda") if chosen.type == "cpu" and torch.cuda.is_available() else chosen


def settle() -> None:
    """Waits until the GPU has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Wall-clock seconds of each call, the device idle before and after."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        settle()
        start = time.perf_counter()
        function()
        settle()
        seconds.append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def percentile(seconds: list[float], share: float) -> float:
    """The value that `share` of the seconds do not exceed."""
    ordered = sorted(seconds)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Phases:
    """Seconds by phase of a step; waits for the device at both ends of each, so that nothing overlaps."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        settle()
        start = time.perf_counter()
        yield
        settle()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def watch(self, module: nn.Module, name: str) -> list:
        """Counts the forward passes of a module as a phase; returns the hooks, to be removed."""
        running = []

        def before(*_):
            running.append(self(name))
            running[-1].__enter__()

        def after(*_):
            running.pop().__exit__(None, None, None)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self.seconds.items()}


def build(name: str, image_size: int | None = None, **overrides) -> nn.Module:
    """
    A model with random weights on the device, in evaluation mode.

    Args:
        name: a preset, or `stock-` and a preset for `transformers.Sam3Model` at those sizes.
        image_size: side of the input in pixels; default: the preset's.
        overrides: of `Sam3LiteConfig.from_preset`.
    """
    torch.manual_seed(0)
    if image_size is not None:
        overrides["image_size"] = image_size
    config = Sam3LiteConfig.from_preset(name.removeprefix(STOCK), **overrides)
    with device():
        model = transformers.Sam3Model(stock_config(config)) if name.startswith(STOCK) else Sam3LiteModel(config)
    return model.eval()


def autocast(precision: str):
    """Mixed precision on the device; nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device().type, DTYPES[precision])


def image_size_of(model: nn.Module) -> int:
    return model.config.vision_config.backbone_config.image_size


def training_batch(model: nn.Module, images: int, prompts: int, objects: int) -> dict:
    """Random inputs of a training step: every second prompt is of a present concept, with boxes and masks.

    Args:
        prompts: per image. objects: per present concept.
    """
    size, where = image_size_of(model), device()
    count = images * prompts
    generator = np.random.default_rng(0)
    labels = []
    for index in range(count):
        present = objects if index % 2 == 0 else 0
        boxes = generator.uniform([0.4, 0.4, 0.1, 0.1], [0.6, 0.6, 0.3, 0.3], (present, 4))  # cxcywh
        masks = torch.zeros(present, size, size, dtype=torch.bool, device=where)
        for mask, (x, y, w, h) in zip(masks, boxes * size, strict=True):
            mask[int(y - h / 2) : int(y + h / 2), int(x - w / 2) : int(x + w / 2)] = True
        labels.append({"boxes": torch.tensor(boxes, dtype=torch.float32, device=where), "masks": masks})
    return {
        "pixel_values": torch.randn(images, 3, size, size, device=where),
        "text_embeds": torch.randn(count, TOKENS, model.config.detr_encoder_config.hidden_size, device=where),
        "attention_mask": torch.ones(count, TOKENS, dtype=torch.long, device=where),
        "image_index": torch.arange(images, device=where).repeat_interleave(prompts),
        "labels": labels,
    }


def jpeg_dataset(folder: Path, count: int, image_size: int) -> Path:
    """A generated dataset of `count` training images as JPEG, with masks; see `sam3_hf.data.generated`."""
    write_dataset(folder, num_train=count, num_valid=1, image_size=image_size)
    annotations = folder / "train" / "_annotations.coco.json"
    for picture in sorted(annotations.parent.glob("*.png")):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"), quality=90)
        picture.unlink()
    annotations.write_text(annotations.read_text().replace(".png", ".jpg"))
    return folder


def peak_gb() -> float | None:
    """Most memory that tensors held since the last reset; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def start_afresh() -> None:
    """Drops models and compiled code of the row before; compiled functions refer to their models in a circle."""
    torch._dynamo.reset()
    gc.collect()
    reset_peak()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device()) for name, value in inputs.items()}
