"""A graph as an ONNX file."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from .graphs import Graph

OPSET = 20  # with GELU in one operator; ONNX Runtime reads it from 1.17 on
# Bytes of weights from which on they are in a file of their own. ONNX Runtime maps that into memory; of what is within
# the graph it makes a second copy, and keeps the room: 0.6 instead of 0.4 GB for the text of `lite` in int8.
WEIGHTS_BESIDE = 100_000_000
_SCOPES = "pkg.torch.onnx.name_scopes"


@torch.no_grad()
def write_onnx(graph: Graph, path: Path) -> None:
    """
    Writes a graph; weights from `WEIGHTS_BESIDE` on into a second file, `<path>.data`. Nodes are named by the module
    that they are of and their operator (`detr_decoder.box_head.layer1/MatMul`), by which quantisation leaves some out.
    """
    with _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=graph.inputs,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.free_sizes(),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    counts: Counter[str] = Counter()
    for node in program.model.graph:
        name = f"{_innermost(node.metadata_props.get(_SCOPES))}/{node.op_type}"
        node.name = name if not counts[name] else f"{name}_{counts[name]}"
        counts[name] += 1
        node.metadata_props.clear()  # they hold the paths of this machine
    weights = program.model.graph.initializers.values()
    program.save(path, external_data=sum(weight.const_value.nbytes for weight in weights) >= WEIGHTS_BESIDE)


def rewrite(graph, nodes: list, tensors: list) -> None:
    """Gives a graph that was read other nodes and more weights. Of both those stay that are of use to its outputs."""
    used, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):  # which come after what they read
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    weights = [tensor for tensor in (*graph.initializer, *tensors) if tensor.name in used]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, weights)):
        del field[:]
        field.extend(values)


def save_graph(model, path: Path) -> None:
    """Writes a graph that was read; weights as `write_onnx`."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    large = model.ByteSize() >= WEIGHTS_BESIDE
    onnx.save(model, path, save_as_external_data=large, location=data.name, size_threshold=1024)
    if large:
        data.chmod(path.stat().st_mode)  # onnx writes it for its owner alone


def module_of(node_name: str) -> str:
    """The module that a node is named by."""
    return node_name.rsplit("/", 1)[0]


def _innermost(scopes: str | None) -> str:
    """The innermost module of a node; the last of its scopes is the operator itself."""
    names = ast.literal_eval(scopes) if scopes else []
    return names[-2] if len(names) > 1 else ""


@contextmanager
def _quiet():
    """Without what the exporter says of its own workings, to whoever listens to all loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
