"""Time, memory and file size of one model in several runtimes, compared by turns in one run.

    python benchmarks/deployment.py --rows lite/pytorch-fp32 lite/onnx-fp32 lite/onnx-int8 --image-size 336 --prompts 1

A row is MODEL/RUNTIME-PRECISION: a preset, or `stock-` and a preset for `transformers.Sam3Model`, which runs its
vision encoder once per prompt; `pytorch`, `compiled`, `onnx` or `openvino`; `fp32`, `bf16`, `int8-weights` or `int8`.
Each has a process of its own, so that its memory can be told. In every round each row is timed once, one after the
other: the ratios, to the first row, are medians over rounds of times that lie beside each other, which holds on a busy
machine too; the times themselves do not.

`model` is from pixels and token ids to the masks of `--detections` queries per prompt, `end to end` from a JPEG on
disk to masks in memory. Weights are random. Models and exports are kept in `--folder` for the next run; results are
added to those in `--output`, so that rows can be run one at a time.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import DTYPES, RESULTS, STOCK, build, environment, jpeg_dataset, table
from inference import Predictor, threshold_for
from PIL import Image
from transformers import set_seed

from sam3_hf import Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data.generated import CONCEPTS
from sam3_hf.exporting.calibration import Calibration
from sam3_hf.exporting.export import export_model

RUNTIMES = ("pytorch", "compiled", "onnx", "openvino")
PRECISIONS = {"pytorch": ("fp32", "bf16"), "compiled": ("fp32", "bf16")}
PRECISIONS |= {"onnx": ("fp32", "int8-weights", "int8"), "openvino": ("fp32", "bf16", "int8-weights", "int8")}
CALIBRATION_IMAGES = 4


def read_row(text: str) -> tuple[str, str, str]:
    """Model, runtime and precision of a row."""
    model, _, way = text.partition("/")
    runtime, _, precision = way.partition("-")
    if not model or precision not in PRECISIONS.get(runtime, ()):
        known = ", ".join(f"{runtime}-{one}" for runtime in RUNTIMES for one in PRECISIONS[runtime])
        raise argparse.ArgumentTypeError(f"{text!r} is no MODEL/RUNTIME-PRECISION with one of {known}")
    return model, runtime, precision


def source_of(row: tuple[str, str, str], arguments: argparse.Namespace) -> Path:
    """The folder that a row loads, made if it is missing."""
    model, runtime, precision = row
    saved = arguments.folder / f"{model}-{arguments.image_size}"
    if not saved.exists():
        set_seed(0)
        made = build(model, arguments.image_size)
        made.save_pretrained(saved)
        Sam3LiteProcessor.from_config(made.config).save_pretrained(saved)
    if runtime not in ("onnx", "openvino"):
        return saved
    stored = "fp32" if precision == "bf16" else precision
    exported = saved.with_name(f"{saved.name}-{runtime}-{stored}")
    if exported.exists():
        return exported
    if (runtime, stored) != ("onnx", "fp32"):  # all else is made of those graphs
        saved = source_of((model, "onnx", "fp32"), arguments)
    pictures = sorted((arguments.folder / "pictures" / "train").glob("*.jpg"))
    calibration = Calibration(pictures, list(CONCEPTS), CALIBRATION_IMAGES) if stored == "int8" else None
    export_model(saved, exported, format=runtime, precision=stored, calibration=calibration)
    return exported


def prepare(row: tuple[str, str, str], arguments: argparse.Namespace) -> None:
    """In a process of its own, whose memory is no row's."""
    torch.set_num_threads(arguments.threads)
    if not row[0].startswith(STOCK):
        source_of(row, arguments)


@torch.no_grad()
def stock_calls(model: str, precision: str, arguments: argparse.Namespace, file: Path) -> dict[str, Callable]:
    """What is timed of a stock model, as its users call it."""
    predictor = Predictor(model, DTYPES[precision], arguments.image_size, prompts_of(arguments), stored=False)

    def only() -> list:
        with torch.no_grad():
            return [predictor.model(**call) for call in calls]

    calls = predictor.inputs([Image.open(file).convert("RGB")])
    threshold = threshold_for(only(), arguments.detections)

    def end_to_end() -> None:
        picture = Image.open(file).convert("RGB")
        with torch.no_grad():
            outputs = [predictor.model(**call) for call in predictor.inputs([picture])]
        predictor.masks(outputs, [picture], threshold)

    return {"model": only, "end to end": end_to_end}


def our_calls(row: tuple[str, str, str], arguments: argparse.Namespace, file: Path) -> dict[str, Callable]:
    """What is timed of a model of ours, in whatever runtime."""
    _, runtime, precision = row
    in_pytorch = runtime in ("pytorch", "compiled")
    dtype = DTYPES[precision] if in_pytorch or precision == "bf16" else None
    pipe = Sam3LitePipeline.from_pretrained(source_of(row, arguments), device="cpu", dtype=dtype)
    if runtime == "compiled":
        pipe.model.compile()
    model: Sam3LiteModel = pipe.model
    prompts, count = prompts_of(arguments), arguments.prompts
    settings = {"threshold": 0.0, "max_detections": arguments.detections * count, "nms_iou": None}
    tokens = pipe.processor(text=prompts)
    pixels = pipe.processor(images=Image.open(file).convert("RGB"))["pixel_values"].to(model.dtype)

    def only() -> None:
        with torch.no_grad():
            vision = model.get_vision_features(pixels)
            text = model.get_text_features(**tokens).pooler_output
            index = torch.zeros(count, dtype=torch.long)
            limits = {"threshold": 0.0, "max_detections": settings["max_detections"]}
            model.find(vision, text, tokens["attention_mask"], index, **limits)

    return {"model": only, "end to end": lambda: pipe(file, prompts, **settings)}


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    return [f"{CONCEPTS[i % len(CONCEPTS)]} {i}" for i in range(arguments.prompts)]  # all different


def work(row: tuple[str, str, str], arguments: argparse.Namespace, file: Path, pipe) -> None:
    """Loads a row, then times what it is asked for until it is asked for nothing; tells its memory at the end."""
    torch.set_num_threads(arguments.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = (
        stock_calls(row[0], row[2], arguments, file) if row[0].startswith(STOCK) else our_calls(row, arguments, file)
    )
    pipe.send(None)
    while (name := pipe.recv()) is not None:
        start = time.perf_counter()
        calls[name]()
        pipe.send(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send({"peak MB": round(peak / 1e3), "of these before loading": round(before / 1e3)})  # Linux counts in KiB


def measure(arguments: argparse.Namespace, file: Path) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    workers = []
    for row in arguments.rows:
        maker = context.Process(target=prepare, args=(row, arguments))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{'/'.join(row)} could not be made")
    for row in arguments.rows:
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(row, arguments, file, theirs), daemon=True)
        process.start()
        mine.recv()
        workers.append(mine)
    kinds = ("model", "end to end")
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for number in range(arguments.warmup + arguments.rounds):
        for kind in kinds:
            times = [ask(worker, kind) for worker in workers]
            if number >= arguments.warmup:
                seconds[kind].append(times)
    rows = []
    for index, (row, worker) in enumerate(zip(arguments.rows, workers, strict=True)):
        result = {"row": f"{row[0]}/{row[1]}-{row[2]}"}
        for kind, times in seconds.items():
            result[f"{kind} s"] = statistics.median(time[index] for time in times)
            result[f"{kind}, times as fast"] = statistics.median(time[0] / time[index] for time in times)
        result |= ask(worker, None)
        result["file MB"] = None if row[0].startswith(STOCK) else size_of(source_of(row, arguments))
        rows.append(result)
    return rows


def ask(worker, what):
    worker.send(what)
    return worker.recv()


def size_of(folder: Path) -> float:
    kinds = (".safetensors", ".onnx", ".data", ".xml", ".bin", ".npz")
    return round(sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds) / 1e6, 1)


def add_run(path: Path, run: dict) -> None:
    """Adds a run to those of a result file."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1, default=str) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", nargs="+", type=read_row, required=True, help="MODEL/RUNTIME-PRECISION")
    options.add_argument("--image-size", type=int, default=336, help="side of the input in pixels")
    options.add_argument("--prompts", type=int, default=1, help="per image")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--detections", type=int, default=10, help="masks per prompt")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    options.add_argument("--folder", type=Path, default=Path("outputs/deployment"), help="of models and exports")
    options.add_argument("--output", type=Path, default=RESULTS / "deployment.json", help="JSON file to add to")
    arguments = options.parse_args()
    pictures = arguments.folder / "pictures"
    if not pictures.exists():
        jpeg_dataset(pictures, CALIBRATION_IMAGES, arguments.image_size)
    rows = measure(arguments, sorted((pictures / "train").glob("*.jpg"))[0])
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "folder", "rows")}
    add_run(arguments.output, {"environment": environment(), "settings": settings, "rows": rows})
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
