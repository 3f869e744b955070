"""Time, memory and file size of one model in several runtimes, compared by turns in one run.

    python benchmarks/deployment.py --rows lite/pytorch-fp32 lite/onnx-fp32 lite/onnx-int8 --image-size 336 --prompts 1
    python benchmarks/deployment.py --table --minutes 15

The second measures each row of the table beside its first one, at both sizes, with 1 and 8 prompts, on one core and
two; it begins no row after so many minutes, and goes on in the next call with what the output does not have yet. A
call that is ended loses the row that it was at.

A row is MODEL/RUNTIME-PRECISION: a preset, or `stock-` and a preset for `transformers.Sam3Model`, which runs its
vision encoder once per prompt; `pytorch`, `compiled`, `onnx` or `openvino`; `fp32`, `bf16`, `int8-weights` or `int8`.
Each has a process of its own, so that its memory can be told. In every round each row is timed once, one after the
other: the ratios, to the first row, are medians over rounds of times that lie beside each other, which holds on a busy
machine too; the times themselves do not.

`model` is from pixels and token ids to the masks of `--detections` queries per prompt, `end to end` from a JPEG on
disk to masks in memory; it is left out where `model` alone took `--seconds`. Weights are random. Models and exports
are kept in `--folder` for the next run (`lite` at both sizes takes 20 GB); results are added to those in `--output`.
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
KINDS = ("model", "end to end")
FIRST = "lite/pytorch-fp32"
TABLE = ("lite/onnx-int8", "stock-standard/pytorch-fp32", "lite/onnx-fp32", "lite/pytorch-bf16", "lite/openvino-int8")
TABLE += ("lite/openvino-fp32", "lite/openvino-bf16", "lite/compiled-fp32", "lite/compiled-bf16")
# Of the table, the cheapest first.
SETTINGS = [
    {"image_size": size, "prompts": prompts, "threads": threads}
    for size in (336, 1008)
    for prompts in (1, 8)
    for threads in (2, 1)
]


def read_row(text: str) -> tuple[str, str, str]:
    """Model, runtime and precision of a row."""
    model, _, way = text.partition("/")
    runtime, _, precision = way.partition("-")
    if not model or precision not in PRECISIONS.get(runtime, ()):
        known = ", ".join(f"{runtime}-{one}" for runtime in RUNTIMES for one in PRECISIONS[runtime])
        raise argparse.ArgumentTypeError(f"{text!r} is no MODEL/RUNTIME-PRECISION with one of {known}")
    return model, runtime, precision


def name_of(row: tuple[str, str, str]) -> str:
    return f"{row[0]}/{row[1]}-{row[2]}"


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
    calibration = Calibration(pictures_of(arguments), list(CONCEPTS), CALIBRATION_IMAGES) if stored == "int8" else None
    export_model(saved, exported, format=runtime, precision=stored, calibration=calibration)
    return exported


def pictures_of(arguments: argparse.Namespace) -> list[Path]:
    """Pictures of the size of the input, drawn if they are missing."""
    folder = arguments.folder / f"pictures-{arguments.image_size}"
    if not folder.exists():
        jpeg_dataset(folder, CALIBRATION_IMAGES, arguments.image_size)
    return sorted((folder / "train").glob("*.jpg"))


def prepare(row: tuple[str, str, str], arguments: argparse.Namespace) -> None:
    """In a process of its own, whose memory is no row's."""
    torch.set_num_threads(arguments.threads)
    if not row[0].startswith(STOCK):
        source_of(row, arguments)


@torch.no_grad()
def stock_calls(model: str, precision: str, arguments: argparse.Namespace, file: Path) -> dict[str, Callable]:
    """What is timed of a stock model, as its users call it."""
    predictor = Predictor(model, DTYPES[precision], arguments.image_size, prompts_of(arguments), stored=False)

    def only(count: int | None = None) -> list:
        with torch.no_grad():
            return [predictor.model(**call) for call in calls[:count]]

    calls = predictor.inputs([Image.open(file).convert("RGB")])
    threshold = threshold_for(only(1), arguments.detections)

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


def measure(arguments: argparse.Namespace) -> list[dict]:
    """The rows of the arguments, compared by turns."""
    file = pictures_of(arguments)[0]
    context = multiprocessing.get_context("spawn")
    workers = []
    for row in arguments.rows:
        maker = context.Process(target=prepare, args=(row, arguments))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{name_of(row)} could not be made")
    for row in arguments.rows:
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(row, arguments, file, theirs), daemon=True)
        process.start()
        mine.recv()
        workers.append(mine)
    seconds = take_turns(workers, arguments)
    rows = []
    for index, (row, worker) in enumerate(zip(arguments.rows, workers, strict=True)):
        result = {"row": name_of(row)}
        for kind, times in seconds.items():
            result[f"{kind} s"] = statistics.median(time[index] for time in times)
            result[f"{kind}, times as fast"] = statistics.median(time[0] / time[index] for time in times)
        result |= {"rounds": len(seconds["model"])} | ask(worker, None)
        result["file MB"] = None if row[0].startswith(STOCK) else size_of(source_of(row, arguments))
        rows.append(result)
    return rows


def take_turns(workers: list, arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """
    {kind: for each round the seconds of each worker}, of rounds until there are enough, or the time is up. The first
    ones warm up where there are others.
    """
    rounds: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    start = time.perf_counter()

    def is_time_left() -> bool:
        return time.perf_counter() - start < arguments.seconds

    while len(rounds["model"]) < arguments.warmup + arguments.rounds and (not rounds["model"] or is_time_left()):
        for kind in KINDS:
            if kind == "model" or is_time_left():
                rounds[kind].append([ask(worker, kind) for worker in workers])
    return {kind: times[arguments.warmup :] or times[-1:] for kind, times in rounds.items() if times}


def ask(worker, what):
    worker.send(what)
    return worker.recv()


def size_of(folder: Path) -> float:
    kinds = (".safetensors", ".onnx", ".data", ".xml", ".bin", ".npz")
    return round(sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds) / 1e6, 1)


def run_table(arguments: argparse.Namespace) -> None:
    """Measures what the output does not have of the table, until the minutes are over."""
    start = time.perf_counter()
    cells = [(setting, row) for setting in SETTINGS for row in TABLE]
    for number, (setting, row) in enumerate(cells):
        if (setting, row) in done_of(arguments.output):
            continue
        if time.perf_counter() - start > 60 * arguments.minutes:
            sys.stdout.write(f"{len(cells) - number} of {len(cells)} rows at most are left: run it again\n")
            return
        own = argparse.Namespace(**vars(arguments) | setting | {"rows": [read_row(FIRST), read_row(row)]})
        run_rows(own)
    sys.stdout.write(f"{arguments.output} has all rows\n")


def done_of(path: Path) -> list[tuple[dict, str]]:
    """Setting and last row of the runs of a result file."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    return [({key: run["settings"][key] for key in SETTINGS[0]}, run["rows"][-1]["row"]) for run in runs]


def run_rows(arguments: argparse.Namespace) -> None:
    rows = measure(arguments)
    settings = ("image_size", "prompts", "threads", "detections", "rounds", "warmup", "seconds")
    settings = {name: vars(arguments)[name] for name in settings}
    add_run(arguments.output, {"environment": environment(), "settings": settings, "rows": rows})
    sys.stdout.write(f"{arguments.image_size} px, {arguments.prompts} prompts, {arguments.threads} threads\n\n")
    sys.stdout.write(f"{table(rows)}\n")
    sys.stdout.flush()


def add_run(path: Path, run: dict) -> None:
    """Adds a run to those of a result file."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1, default=str) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", nargs="+", type=read_row, help="MODEL/RUNTIME-PRECISION")
    what.add_argument("--table", action="store_true", help="all that is known of `lite`")
    options.add_argument("--minutes", type=float, default=15, help="of the table, after which no row begins")
    options.add_argument("--image-size", type=int, default=336, help="side of the input in pixels")
    options.add_argument("--prompts", type=int, default=1, help="per image")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--detections", type=int, default=10, help="masks per prompt")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    options.add_argument("--seconds", type=float, default=300, help="after which no further round of a row begins")
    options.add_argument("--folder", type=Path, default=Path("outputs/deployment"), help="of models and exports")
    options.add_argument("--output", type=Path, default=RESULTS / "deployment.json", help="JSON file to add to")
    arguments = options.parse_args()
    (run_table if arguments.table else run_rows)(arguments)


if __name__ == "__main__":
    main()
