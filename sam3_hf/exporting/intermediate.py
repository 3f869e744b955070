"""Graphs for OpenVINO."""

from __future__ import annotations

from pathlib import Path

from .engines import import_openvino


def convert_graphs(folder: Path, names: list[str]) -> None:
    """Replaces `<name>.onnx` by `<name>.xml` and `<name>.bin`, in the precision that it is in."""
    openvino = import_openvino()
    for name in names:
        path = folder / f"{name}.onnx"
        model = openvino.convert_model(path)
        openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
        del model  # which holds the file open
        path.unlink()
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
