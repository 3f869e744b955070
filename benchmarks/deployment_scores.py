"""
What a runtime and a precision cost a model in AP and cgF1, one exclusion of int8 at a time, and whether it is chance.

    sam3-lite export MODEL exported
    python benchmarks/deployment_scores.py MODEL exported --output benchmarks/results/deployment_scores/tiny.json

Pictures are drawn ones of the composed world, asked for a dozen phrases, or those of a dataset (`--data`). Scores are
those of all pictures. Beside them is what sets of as many pictures gain on average over `onnx-fp32`, with
the standard error of that: a difference that is not some times as large is none of the precision.

Rows: `pytorch-fp32`, `pytorch-bf16`, and what `sam3-lite export` makes for ONNX Runtime and OpenVINO; with
`--exclusions` also `onnx-int8 with X`, where X does not stay in float, `onnx-int8 of GRAPH alone`, and `onnx-int8 by
seed N`, whose ranges are fitted to other pictures. Rows that the output has already are kept.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from common import environment, table
from suppression import predict, score

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import write_composed
from sam3_hf.exporting.calibration import Calibration
from sam3_hf.exporting.folder import Export, read_export
from sam3_hf.exporting.intermediate import convert_graphs
from sam3_hf.exporting.model import ExportedModel
from sam3_hf.exporting.quantize import is_excluded, is_product, quantize_activations, quantize_weights, stays_in_float

SET = 24  # pictures
PHRASES = 12
FIGURES = ("segm_AP", "bbox_AP", "segm_cgF1", "bbox_cgF1")
SEEDS = (1, 2, 3)  # of the pictures that ranges are fitted to; otherwise 0
RUNTIMES = ("pytorch-fp32", "pytorch-bf16", "onnx-fp32", "onnx-int8-weights", "onnx-int8")
RUNTIMES += ("openvino-fp32", "openvino-bf16", "openvino-int8")
EXCLUDED = {  # patterns of `FLOAT_ACTIVATIONS`
    "patches": r".*\.patch_embeddings",
    "scoring": r"dot_product_scoring",
    "heads of boxes and presence": r"detr_decoder\.(box_head|presence_head|ref_point_head|.*box_rpb_embed)",
    "mask embedding": r"mask_decoder\.mask_embedder",
}


def ways(graphs: list[str]) -> dict[str, dict[str, Callable]]:
    """{row of int8: {graph that is made int8: what of it stays in float}}."""
    whole = dict.fromkeys(graphs, stays_in_float)
    found = {"onnx-int8": whole, "openvino-int8": whole}
    for name, pattern in EXCLUDED.items():
        found[f"onnx-int8 with {name}"] = dict.fromkeys(graphs, all_but(pattern))
    if "masks" in graphs:  # products of attention are one operator
        products = {"masks": lambda node, weights: is_excluded(node.name)}
        found["onnx-int8 with products of the mask head"] = whole | products
    found |= {f"onnx-int8 of {graph} alone": {graph: stays_in_float} for graph in graphs}
    return found | {f"onnx-int8 by seed {seed}": whole for seed in SEEDS}


def all_but(pattern: str) -> Callable:
    """What stays in float where modules of this pattern do not."""

    def in_float(node, weights: set[str]) -> bool:
        excluded = is_excluded(node.name) and not re.match(pattern, node.name)
        return excluded or is_product(node, weights)

    return in_float


class Bench:
    """Pictures, a model, and its graphs in float32, of which all others are made."""

    def __init__(self, model: Path, export: Export, splits: dict, pictures: Path, split: str, count: int):
        self.model, self.export = model, export
        self.graphs: list[str] = self.export.facts["graphs"]
        self.processor = Sam3LiteProcessor.of_source(export.folder, self.export.config)
        rows = splits[split].select(range(min(count, len(splits[split]))))
        self.dataset = EvalDataset(rows, self.export.config.image_size)
        self.dataset.has_masks &= self.export.config.mask_supervision
        self.pictures = pictures

    def figures(self, row: str) -> dict:
        """The scores of a row on all pictures, and on each set of them."""
        accelerator = Accelerator(cpu=True)
        with self._opened(row) as model:
            pairs = predict(accelerator, model, self.processor, self.dataset, num_workers=0)
        order = list(dict.fromkeys(reference["image_id"] for _, reference in pairs))
        sets = [set(order[start : start + SET]) for start in range(0, len(order) - SET + 1, SET)]
        parts = [[pair for pair in pairs if pair[1]["image_id"] in images] for images in sets]
        scores = [self._score(accelerator, part) for part in (pairs, *parts)]
        return scores[0] | {"sets": scores[1:]}

    def _score(self, accelerator: Accelerator, pairs: list) -> dict:
        scores = score(accelerator, self.dataset, pairs)
        return {name: round(scores[name], 5) for name in FIGURES if scores.get(name) is not None}

    @contextmanager
    def _opened(self, row: str):
        runtime, _, precision = row.partition("-")
        if runtime == "pytorch":
            yield in_pytorch(self.model, precision)
            return
        with tempfile.TemporaryDirectory() as folder:
            self._write(row, Path(folder))
            export = Export(Path(folder), {"format": runtime}, self.export.config)
            yield ExportedModel(export, dtype=torch.bfloat16 if precision == "bf16" else torch.float32).eval()

    def _write(self, row: str, folder: Path) -> None:
        for path in self.export.folder.iterdir():
            shutil.copyfile(path, folder / path.name)
        if row.endswith("int8-weights"):
            for graph in self.graphs:
                quantize_weights(folder / f"{graph}.onnx")
        for graph, in_float in ways(self.graphs).get(row, {}).items():
            samples = self._samples(int(row.split()[-1]) if "by seed" in row else 0)
            quantize_activations(folder / f"{graph}.onnx", samples[graph], row.partition("-")[0], in_float)
        if row.startswith("openvino"):
            convert_graphs(folder, self.graphs)

    def _samples(self, seed: int) -> dict:
        calibration = Calibration(self.pictures / "train", self.dataset.concepts, seed=seed)
        return calibration.samples(self.export.folder, self.graphs, self.export.config, self.processor)


def in_pytorch(folder: Path, precision: str) -> Sam3LiteModel:
    """As the pipeline has it: in bf16 weights and pixels are."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = Sam3LiteModel.from_pretrained(folder, preset="same", dtype=dtype).eval()
    get = model.get_vision_features
    model.get_vision_features = lambda pixel_values: get(pixel_values.to(dtype))
    return model


def compared(rows: dict[str, dict]) -> list[dict]:
    """For each row its scores, and by what part of that of `onnx-fp32` the AP of the sets is higher or lower."""
    exact = rows["onnx-fp32"]
    kind = "segm_AP" if "segm_AP" in exact else "bbox_AP"
    found = []
    for name, row in rows.items():
        parts = [100 * (own[kind] / other[kind] - 1) for own, other in zip(row["sets"], exact["sets"], strict=True)]
        found.append({"row": name, **{figure: row[figure] for figure in FIGURES if figure in row}})
        found[-1][f"{kind}, % more than onnx-fp32"] = 100 * (row[kind] / exact[kind] - 1)
        if len(parts) > 1:
            deviation = statistics.stdev(parts)
            found[-1] |= {"mean of sets": statistics.mean(parts), "standard error": deviation / len(parts) ** 0.5}
            found[-1]["deviation of a set"] = deviation
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path, help="folder with weights")
    options.add_argument("export", type=Path, help="what `sam3-lite export` made of it, for onnx in fp32")
    options.add_argument("--rows", nargs="+", help="default: all runtimes and precisions")
    options.add_argument("--exclusions", action="store_true", help="those rows as well")
    options.add_argument("--data", type=Path, help="dataset with train and the split; default: drawn pictures")
    options.add_argument("--category-map", type=Path)
    options.add_argument("--split", default="validation")
    options.add_argument("--pictures", type=int, default=240, help="at most; of drawn ones so many")
    options.add_argument("--output", type=Path, required=True, help="JSON file to write or to add to")
    arguments = options.parse_args()
    done = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else {}
    export = read_export(arguments.export)
    with tempfile.TemporaryDirectory() as folder:
        pictures = arguments.data
        if pictures is None:
            counts = {"train": 128, "valid": arguments.pictures}
            pictures = write_composed(folder, counts, export.config.image_size, seed=77, num_phrases=PHRASES)
        splits = load_dataset_splits(pictures, None, arguments.category_map)
        bench = Bench(arguments.model, export, splits, pictures, arguments.split, arguments.pictures)
        exclusions = [row for row in ways(bench.graphs) if row not in RUNTIMES]
        for row in arguments.rows or [*RUNTIMES, *(exclusions if arguments.exclusions else [])]:
            if row not in (*RUNTIMES, *exclusions):
                raise SystemExit(f"{row!r} is none of the rows: {', '.join([*RUNTIMES, *exclusions])}")
            if row not in done:
                done[row] = bench.figures(row)
                write(arguments, bench, done)
    sys.stdout.write(table(compared(done)))


def write(arguments: argparse.Namespace, bench: Bench, rows: dict[str, dict]) -> None:
    settings = {"data": str(arguments.data or "drawn"), "split": arguments.split, "pictures": len(bench.dataset)}
    record = {"environment": environment(), "settings": settings | {"pictures of a set": SET}, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
