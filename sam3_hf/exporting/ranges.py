"""Between which values those tensors of a graph lie that int8 is for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .engines import thrifty_options


def ranges_of(path: Path, tensors: set[str], samples: list[dict[str, np.ndarray]]):
    """
    Runs a graph in float32, and notes the smallest and largest value of some of its tensors.

    Each is looked at as soon as it is there, and forgotten when nothing else reads it, so that this takes little more
    memory than running the graph. `quantize_static` of ONNX Runtime looks at the scores of attention as well, and
    keeps them all until the end: more than 20 GB for the vision encoder of `lite` at 1008 pixels, and here 3.3 GB.

    Args:
        samples: inputs of the graph.

    Returns:
        `TensorsData` of ONNX Runtime, as its quantizers take it.
    """
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, MinMaxCalibrater

    class Calibrater(MinMaxCalibrater):
        def select_tensors_to_calibrate(self, model):
            return tensors, {}

        def create_inference_session(self):
            options = thrifty_options()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.infer_session = onnxruntime.InferenceSession(
                self.augmented_model_path, options, providers=["CPUExecutionProvider"]
            )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(samples)

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        augmented = str(Path(scratch) / path.name)
        calibrater = Calibrater(path, augmented_model_path=augmented, use_external_data_format=True)
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(Reader())
        found = calibrater.compute_data()
        del calibrater.infer_session  # which has the file open
    return found
