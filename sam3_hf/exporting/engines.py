"""What computes a graph: ONNX Runtime or OpenVINO."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OLDEST_OPENVINO = (2025, 0)  # as in pyproject.toml
_EXTRA = "pip install 'sam3-hf[export]'"
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": bool}


class OnnxRuntimeGraph:
    """
    An `.onnx` file, ready to be called with tensors by the names of its inputs; floats may be of any precision.

    Args:
        device: "cpu" or "cuda".
        threads: of one operator.
        hands_back: whether memory goes back to the system after each call.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it cannot read the file, or knows no such device.
    """

    def __init__(self, path: Path, device: str, threads: int, hands_back: bool = False):
        ort = import_onnxruntime()
        options = thrifty_options()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
        if provider not in ort.get_available_providers():
            raise ValueError(
                f"onnxruntime {ort.__version__} here has no device {device!r}: take 'cpu', or install it."
            )
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # it has a class of its own for each way to fail
            raise ValueError(_why_not(path, error, f"onnxruntime {ort.__version__}")) from error
        self._types = {one.name: _NUMPY[one.type] for one in self._session.get_inputs()}
        self._calls = ort.RunOptions()
        if hands_back:
            self._calls.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """The outputs of the graph in their order, on the CPU."""
        arrays = {name: inputs[name].numpy().astype(kind, copy=False) for name, kind in self._types.items()}
        return [torch.from_numpy(array) for array in self._session.run(None, arrays, self._calls)]


class OpenVinoGraph:
    """
    As `OnnxRuntimeGraph`, for an `.xml` file with its `.bin`.

    Args:
        device: "cpu" or another that OpenVINO knows.
        threads: of the CPU.
        bfloat16: compute products in this precision, where the processor has it.
    """

    def __init__(self, path: Path, device: str, threads: int, bfloat16: bool = False):
        openvino = import_openvino()
        settings = {"INFERENCE_NUM_THREADS": threads} if device == "cpu" else {}
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if bfloat16 else "f32"
        try:
            self._model = _openvino_core().compile_model(str(path), device.upper(), settings)
        except RuntimeError as error:
            raise ValueError(_why_not(path, error, f"openvino {openvino.__version__}")) from error
        self._types = {port.any_name: port.element_type.to_dtype() for port in self._model.inputs}

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        arrays = {name: inputs[name].numpy().astype(kind, copy=False) for name, kind in self._types.items()}
        found = self._model(arrays)
        return [torch.from_numpy(found[port].copy()) for port in self._model.outputs]  # its buffers are used again


def import_onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"onnxruntime is not installed, which runs this model: {_EXTRA}") from error
    return onnxruntime


def thrifty_options():
    """
    Session options of ONNX Runtime by which blocks of attention come one after the other, as they are in the file, and
    memory that is free again is used by what comes next.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.execution_order, options.enable_mem_pattern = ort.ExecutionOrder.PRIORITY_BASED, False
    return options


def import_openvino():
    """
    Raises:
        ImportError: OpenVINO is not installed, or too old.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"openvino is not installed, which this needs: {_EXTRA}") from error
    found = tuple(int(part) for part in re.findall(r"\d+", openvino.__version__)[:2])
    if found < OLDEST_OPENVINO:
        oldest = ".".join(map(str, OLDEST_OPENVINO))
        raise ImportError(f"openvino {openvino.__version__} is too old, {oldest} is needed: pip install -U openvino")
    return openvino


@functools.cache
def _openvino_core():
    """
    The only one, kept to the end: each gives the thread that uses it a stack for signals and frees that at its end.
    Of two that end in the order of their beginning, the last puts the freed one back; the next signal that Python
    handles would then end the process without a word (openvino 2026.4).
    """
    return import_openvino().Core()


def _why_not(path: Path, error: Exception, runtime: str) -> str:
    reason = " ".join(str(error).split())
    if "opset" in reason.lower():
        text = f"has a newer operator set than {runtime} reads: update that, or export the model again"
    else:
        text = f"cannot be read by {runtime}, it is damaged or another program's: export the model again"
    return f"{path} {text} ({reason})"
