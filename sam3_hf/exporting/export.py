"""From a model to a folder of graphs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..configuration_sam3_lite import BOX_PADDING_LABEL, context_length
from ..files import write_folder
from ..modeling_sam3_lite import Sam3LiteModel
from ..presets_sam3_lite import LITE_TEXT
from ..processing_sam3_lite import Sam3LiteProcessor, num_tokens
from ..sharing.model_card import (
    LICENSE_FILE,
    PROVENANCE_FILE,
    SAM_LICENSE,
    SAM_LICENSE_TEXT,
    Origin,
    origin_of,
    versions,
)
from ..sharing.sizes import sizes_of
from .build import OPSET, write_onnx
from .calibration import Calibration
from .card import write_export_card
from .engines import import_onnxruntime, import_openvino
from .folder import EXPORT_FILE, LAYOUT, SUFFIXES, VOCABULARY_FILE, record_files
from .graphs import graphs_of

PRECISIONS = ("fp32", "fp16", "int8-weights", "int8")
_THRESHOLDS = {"score": 0.3, "mask": 0.5, "nms_iou": 0.7}  # those of `PredictionSettings`


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
        source: what [`~Sam3LiteModel.from_pretrained`] takes. Sizes stay those of the source.
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
    _check_choices(format, precision, calibration)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    size = {} if image_size is None else {"image_size": image_size}
    # Attention as plain operators: fused, a ViT in FP16 loses its precision in TensorRT.
    model = Sam3LiteModel.from_pretrained(
        source, preset="same", dtype=dtype, attn_implementation="eager", **size, **hub_arguments
    ).eval()
    processor = Sam3LiteProcessor.of_source(source, model.config, **hub_arguments)
    origin = origin_of(source, **hub_arguments)

    def write(folder: Path) -> None:
        names = _write_graphs(model, folder)
        if precision.startswith("int8"):
            _quantize(folder, names, model, processor, precision, calibration)
        if format == "openvino":
            from .intermediate import convert_graphs

            convert_graphs(folder, names)
        _write_rest(folder, names, model, processor, format, precision, origin)

    write_folder(Path(target), write)


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


def _write_graphs(model: Sam3LiteModel, folder: Path) -> list[str]:
    names = []
    for name, graph in graphs_of(model).items():
        write_onnx(graph, folder / f"{name}.onnx")
        names.append(name)
    if model.vocabulary is not None:
        arrays = {name: tensor.numpy() for name, tensor in model.vocabulary.state_dict().items()}
        np.savez(folder / VOCABULARY_FILE, **arrays)
    return names


def _quantize(folder: Path, names: list[str], model, processor, precision: str, calibration) -> None:
    from .quantize import quantize_activations, quantize_weights

    if precision == "int8-weights":
        for name in names:
            quantize_weights(folder / f"{name}.onnx")
        return
    for name, samples in calibration.samples(folder, names, model, processor).items():
        quantize_activations(folder / f"{name}.onnx", samples)


def _write_rest(folder: Path, names: list[str], model, processor, format: str, precision: str, origin: Origin) -> None:
    """The JSON, the tokenizer, the card and, where the weights derive from SAM 3, its licence."""
    files, images, config = record_files(folder), processor.image_processor, model.config
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
