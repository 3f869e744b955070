"""From a model to a folder of graphs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..configuration_sam3_lite import BOX_PADDING_LABEL, Sam3LiteConfig, context_length
from ..files import write_folder
from ..mapping.calibration.images import list_images
from ..modeling_sam3_lite import Sam3LiteModel
from ..precision_sam3_lite import precision_name
from ..presets_sam3_lite import LITE_TEXT
from ..processing_sam3_lite import Sam3LiteProcessor, num_tokens
from ..sharing.model_card import (
    LICENSE_FILE,
    PROVENANCE_FILE,
    SAM_LICENSE,
    SAM_LICENSE_TEXT,
    Origin,
    folder_origin,
    origin_of,
    versions,
)
from ..sharing.sizes import sizes_of
from .attention import attend_in_blocks
from .build import OPSET, write_onnx
from .calibration import Calibration
from .card import write_export_card
from .engines import import_onnxruntime, import_openvino
from .folder import (
    EXPORT_FILE,
    LAYOUT,
    SUFFIXES,
    VOCABULARY_FILE,
    Export,
    fetch_export,
    is_export,
    read_export,
    record_files,
)
from .graphs import graphs_of
from .intermediate import convert_graphs
from .quantize import quantize_activations, quantize_weights

PRECISIONS = ("fp32", "fp16", "int8-weights", "int8")
_THRESHOLDS = {"score": 0.3, "mask": 0.5, "nms_iou": 0.7}  # those of `PredictionSettings`


class Source(NamedTuple):
    """What graphs in float are made of, or copied from."""

    config: Sam3LiteConfig
    processor: Sam3LiteProcessor
    origin: Origin
    write: Callable[[Path], list[str]]  # the graphs, and a fixed vocabulary; returns the names of the graphs


def export_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    image_size: int | None = None,
    calibration: Calibration | None = None,
    **hub_arguments,
) -> None:
    """
    Writes the graphs of a model, and what lies beside them, into a folder: whole or not at all.

    Args:
        source: what [`~Sam3LiteModel.from_pretrained`] takes, whose sizes stay; or what this function wrote for "onnx"
            in "fp32", which saves the minutes that tracing takes.
        target: replaced if there is one.
        format: "onnx" or "openvino".
        precision: "fp32", "fp16", "int8-weights" (weights in int8, arithmetic in float), or "int8".
        image_size: side in pixels of the pictures that the graphs are for. Default: that of the source.
        calibration: what "int8" fits the ranges of activations to.
        hub_arguments: `revision`, `token`, ... as in `from_pretrained`.

    Raises:
        ValueError: a format or precision that there is not, pictures that are missing or not wanted, or a source that
            cannot be loaded.
        OSError: the source is missing, or the folder cannot be written.
        ImportError: a library of the extra `export` is missing or too old.
    """
    precision = precision_name(precision)
    _check_choices(format, precision, calibration)
    if calibration is not None:
        list_images(calibration.images)  # before the minutes that tracing takes
    if is_export(source, **hub_arguments):
        folder = fetch_export(source, also=[PROVENANCE_FILE], **hub_arguments)
        start = _from_export(read_export(folder), precision, image_size)
    else:
        start = _from_model(source, torch.float16 if precision == "fp16" else torch.float32, image_size, hub_arguments)

    def write(folder: Path) -> None:
        names = start.write(folder)
        if precision.startswith("int8"):
            _quantize(folder, names, start, format, precision, calibration)
        if format == "openvino":
            convert_graphs(folder, names)
        _write_rest(folder, names, start, format, precision)

    write_folder(Path(target), write)


def _from_model(source, dtype: torch.dtype, image_size: int | None, hub_arguments: dict) -> Source:
    size = {} if image_size is None else {"image_size": image_size}
    # Attention as plain operators: fused, a ViT in FP16 loses its precision in TensorRT.
    model = Sam3LiteModel.from_pretrained(
        source, preset="same", dtype=dtype, attn_implementation="eager", **size, **hub_arguments
    ).eval()
    attend_in_blocks(model)
    processor = Sam3LiteProcessor.of_source(source, model.config, **hub_arguments)

    def write(folder: Path) -> list[str]:
        graphs = graphs_of(model)
        for name, graph in graphs.items():
            write_onnx(graph, folder / f"{name}.onnx")
        if model.vocabulary is not None:
            arrays = {name: tensor.numpy() for name, tensor in model.vocabulary.state_dict().items()}
            np.savez(folder / VOCABULARY_FILE, **arrays)
        return list(graphs)

    return Source(model.config, processor, origin_of(source, **hub_arguments), write)


def _from_export(export: Export, precision: str, image_size: int | None) -> Source:
    if (export.format, export.precision) != ("onnx", "fp32") or precision == "fp16" or image_size is not None:
        raise ValueError(
            f"{export.folder} holds graphs for {export.format} in {export.precision}: from those for onnx in fp32, "
            "other formats and int8 can be made, and nothing else; export the model itself."
        )

    def write(folder: Path) -> list[str]:
        for name in export.facts["files"]:
            shutil.copyfile(export.folder / name, folder / name)
        return list(export.facts["graphs"])

    processor = Sam3LiteProcessor.of_source(export.folder, export.config)
    return Source(export.config, processor, folder_origin(export.folder), write)


def _check_choices(format: str, precision: str, calibration: Calibration | None) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"--format {format} is none of {', '.join(SUFFIXES)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is none of {', '.join(PRECISIONS)}.")
    if precision == "int8" and calibration is None:
        raise ValueError("--precision int8 fits ranges to pictures: pass --calibration-images DIR, or int8-weights.")
    if precision != "int8" and calibration is not None:
        raise ValueError("--calibration-images is for --precision int8 alone: leave it out.")
    if format == "openvino":
        import_openvino()
    if precision.startswith("int8"):
        import_onnxruntime()
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f"{name} is not installed, which exports need: pip install 'sam3-hf[export]'") from error


def _quantize(
    folder: Path, names: list[str], start: Source, format: str, precision: str, calibration: Calibration | None
) -> None:
    if precision == "int8-weights":
        for name in names:
            quantize_weights(folder / f"{name}.onnx")
        return
    for name, samples in calibration.samples(folder, names, start.config, start.processor).items():
        quantize_activations(folder / f"{name}.onnx", samples, format)


def _write_rest(folder: Path, names: list[str], start: Source, format: str, precision: str) -> None:
    """The JSON, the tokenizer, the card and, where the weights derive from SAM 3, its licence."""
    config, processor, origin, _ = start
    files, images = record_files(folder), processor.image_processor
    facts = {
        "layout": LAYOUT,
        "format": format,
        "precision": precision,
        "operator_set": OPSET,
        "graphs": names,
        "sizes": sizes_of(config),
        "image": {"mean": list(images.image_mean), "std": list(images.image_std), "rescale": images.rescale_factor},
        "text": {"tokens": num_tokens(processor.tokenizer), "whole": config.text_config.model_type == LITE_TEXT},
        "context": context_length(config.text_config),
        "vocabulary": config.vocabulary,
        "summary_token": config.summary_token,
        "box_padding_label": BOX_PADDING_LABEL,
        "thresholds": _THRESHOLDS,
        "license": SAM_LICENSE if origin.derived else "unknown",
        "versions": versions() | _runtime_versions(format),
        "files": files,
        "config": json.loads(config.to_json_string(use_diff=False)),
    }
    (folder / EXPORT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(folder)
    provenance = {"origin": asdict(origin), "versions": facts["versions"]}
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    if origin.derived:
        shutil.copyfile(SAM_LICENSE_TEXT, folder / LICENSE_FILE)
    write_export_card(folder, facts, origin)


def _runtime_versions(format: str) -> dict[str, str]:
    import onnx

    found = {"onnx": onnx.__version__}
    if format == "openvino":
        found["openvino"] = import_openvino().__version__
    return found
