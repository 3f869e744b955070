"""Graphs in int8: their weights alone, or what their products read as well."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .build import module_of, rewrite, save_graph
from .fuse import biases_into_products, join_attention
from .ranges import ranges_of

# Modules whose products stay in float where activations are int8, with what tiny-standard loses of its scores (segm AP
# 0.7595, bbox AP 0.6736, cgF1 0.630 on 24 drawn pictures) where they do not.
FLOAT_ACTIVATIONS: dict[str, str] = {
    r".*\.patch_embeddings": "patches: the vision features of a calibrated `tiny` are 5.2% off instead of 3.1%",
    r"dot_product_scoring": "scores: cgF1 0.627",
    r"detr_decoder\.(box_head|presence_head|ref_point_head|.*box_rpb_embed)": "boxes: bbox AP 0.6689, segm AP 0.7573",
    r"mask_decoder\.mask_embedder": "masks: segm AP 0.7582; so have the products that it enters: 0.7586",
}
SMALLEST = 4096  # elements of a weight that is worth it
_PRODUCTS = ("MatMul", "Gemm")
# Operators with weights: which input it is, and the axis of its output channels.
_WEIGHTS = {"MatMul": (1, 1), "Conv": (1, 0), "ConvTranspose": (1, 1), "Gather": (0, 1)}


def quantize_weights(path: Path) -> None:
    """
    Rewrites a graph with the weights of its products, convolutions and embeddings in int8, with a scale for each
    output channel; they are float again before they are used.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, new = [], {}
    for node in graph.node:
        place, axis = _axis_of(node)
        name = None if axis is None else node.input[place]
        if name not in weights or not _is_worth_it(weights[name]) or _swaps_channels(node):
            nodes.append(node)
            continue
        if name not in new:
            new[name] = _to_int8(numpy_helper.to_array(weights[name]), axis)
        nodes += _with_dequantized(node, place, axis, name)
    tensors = []
    for name, (integers, scales) in new.items():
        tensors += [
            numpy_helper.from_array(integers, f"{name}.int8"),
            numpy_helper.from_array(scales, f"{name}.scale"),
        ]
    rewrite(graph, nodes, tensors)
    save_graph(model, path)


def stays_in_float(node, weights: set[str]) -> bool:
    """Whether a node of a graph with these weights computes in float: a product of activations, or excluded."""
    return is_excluded(node.name) or is_product(node, weights)


def quantize_activations(
    path: Path,
    samples: list[dict[str, np.ndarray]],
    format: str,
    in_float: Callable[[object, set[str]], bool] = stays_in_float,
) -> None:
    """
    Rewrites a graph with its products and convolutions by weights in int8, of weights and of what they read. Norms,
    softmax, products of activations and `FLOAT_ACTIVATIONS` stay in float; the weights of the latter and of embeddings
    are int8 in the file.

    Args:
        samples: inputs of the graph, whose ranges become those of int8.
        format: that of `export_model` which the graph is for.
        in_float: of a node and the names of the weights of the graph, whether the node stays in float.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    if format == "onnx":
        join_attention(path)  # of operators that OpenVINO has not
        biases_into_products(path)  # OpenVINO adds a bias by itself, and is slower with what is reshaped
    model = load_model_with_shape_infer(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    candidates = [node for node in model.graph.node if node.op_type in (*_PRODUCTS, "Conv")]
    excluded = {node.name for node in candidates if in_float(node, weights)}
    read = {name for node in candidates if node.name not in excluded for name in _in_int8(node)} - weights
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges_of(path, read, samples),
        nodes_to_quantize=[],
        nodes_to_exclude=list(excluded),
        op_types_to_quantize=[*_PRODUCTS, "Conv"],
        extra_options={
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),  # what follows is in float
            "DedicatedQDQPair": True,  # else whoever reads the same reads it rounded
        },
    )
    with _quiet():
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    save_graph(quantizer.model.model, path)
    quantize_weights(path)


def is_excluded(node_name: str) -> bool:
    """Whether a node is of `FLOAT_ACTIVATIONS`; it is named `<module>/<operator>`."""
    return any(re.match(pattern, module_of(node_name)) for pattern in FLOAT_ACTIVATIONS)


def is_product(node, weights: set[str]) -> bool:
    """Whether a node is a product of activations, as those of attention and of masks are, or swaps channels."""
    return node.op_type == "MatMul" and (node.input[1] not in weights or _swaps_channels(node))


def _swaps_channels(node) -> bool:
    """Whether a node is the product in attention by which channels swap places for rotary positions."""
    return module_of(node.name).endswith(".attention")


def _in_int8(node) -> list[str]:
    """The tensors beside a node that are rounded where it is in int8."""
    return list(node.input) if node.op_type in _PRODUCTS else [*node.input, *node.output]


def _axis_of(node) -> tuple[int, int | None]:
    if node.op_type == "Gemm":
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        return 1, 0 if transposed else 1
    return _WEIGHTS.get(node.op_type, (0, None))


def _is_worth_it(tensor) -> bool:
    return tensor.data_type == 1 and len(tensor.dims) > 1 and np.prod(tensor.dims) >= SMALLEST  # 1 is float32


def _to_int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers in -127..127, and the scale of each channel."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    scales = np.abs(values).max(axis=others) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    shape = [-1 if own == axis else 1 for own in range(values.ndim)]
    return np.rint(values / scales.reshape(shape)).astype(np.int8), scales


def _with_dequantized(node, place: int, axis: int, name: str) -> list:
    """The node, reading a weight that is int8; of an embedding only the rows that are looked up become float."""
    from onnx import helper

    integers, scales = f"{name}.int8", f"{name}.scale"
    if node.op_type == "Gather":
        output, rows = node.output[0], f"{node.output[0]}.int8"
        node.input[place], node.output[0] = integers, rows
        return [node, helper.make_node("DequantizeLinear", [rows, scales], [output], f"{node.name}.float", axis=-1)]
    floats = f"{node.name}.weight"
    node.input[place] = floats
    return [helper.make_node("DequantizeLinear", [integers, scales], [floats], f"{node.name}.float", axis=axis), node]


@contextmanager
def _quiet():
    """Without warnings that biases have no scale for each channel, which they need not have."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
