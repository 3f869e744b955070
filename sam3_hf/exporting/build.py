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
_SCOPES = "pkg.torch.onnx.name_scopes"


@torch.no_grad()
def write_onnx(graph: Graph, path: Path) -> None:
    """
    Writes a graph; weights of more than 1.5 GB into a second file, `<path>.data`. Nodes are named by the module that
    they are of and their operator (`detr_decoder.box_head.layer1/MatMul`), by which quantisation leaves some out.
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
        name = f"{_module_of(node.metadata_props.get(_SCOPES))}/{node.op_type}"
        node.name = name if not counts[name] else f"{name}_{counts[name]}"
        counts[name] += 1
        node.metadata_props.clear()  # they hold the paths of this machine
    program.save(path)


def rewrite(graph, nodes: list, tensors: list) -> None:
    """Gives a graph that was read other nodes and more weights, of which those stay that are read."""
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, [*kept, *tensors])):
        del field[:]
        field.extend(values)


def save_graph(model, path: Path) -> None:
    """Writes a graph that was read; weights as `write_onnx`."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    large = model.ByteSize() > 1.5e9
    onnx.save(model, path, save_as_external_data=large, location=data.name, size_threshold=1024)


def _module_of(scopes: str | None) -> str:
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
