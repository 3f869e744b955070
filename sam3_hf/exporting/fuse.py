"""Fewer operators for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .build import rewrite, save_graph


def biases_into_products(path: Path) -> None:
    """
    Rewrites a graph with each product by a weight and the addition of its bias as one `Gemm`: ONNX Runtime has that in
    int8, and need not go through the result once more. It takes matrices: what has more dimensions is reshaped, which
    moves nothing.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name: tensor.dims for name, tensor in tensors.items()}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results = {output.name for output in graph.output}
    nodes, constants, rows, done = [], {}, {}, set()

    def constant(values: list[int]) -> str:
        name = "sizes_" + "_".join(map(str, values))
        constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    for node in graph.node:
        if node.output[0] in done:
            continue
        addition = _addition_of_bias(node, weights, readers, results)
        if addition is None:
            nodes.append(node)
            continue
        source, (inputs, outputs) = node.input[0], weights[node.input[1]]
        if source not in rows:
            rows[source] = f"{source}_rows", f"{source}_leading"
            nodes.append(helper.make_node("Reshape", [source, constant([-1, inputs])], [rows[source][0]]))
            nodes.append(helper.make_node("Shape", [source], [rows[source][1]], start=0, end=-1))
        flat, leading = rows[source]
        (shared,) = (name for name in addition.input if name != node.output[0])
        total = addition.output[0]
        product, sizes, bias = f"{total}_product", f"{total}_sizes", f"{total}_bias"
        # A copy, as its scale in int8 is that of this product alone.
        constants[bias] = numpy_helper.from_array(numpy_helper.to_array(tensors[shared]), bias)
        nodes.append(helper.make_node("Gemm", [flat, node.input[1], bias], [product], node.name))
        nodes.append(helper.make_node("Concat", [leading, constant([outputs])], [sizes], axis=0))
        nodes.append(helper.make_node("Reshape", [product, sizes], [total]))
        done.add(total)
    rewrite(graph, nodes, list(constants.values()))
    save_graph(model, path)


def _addition_of_bias(node, weights: dict, readers: dict[str, list], results: set[str]):
    """The node that adds a bias to the product of `node`, and is the only one that reads it; None if there is none."""
    if node.op_type != "MatMul" or len(weights.get(node.input[1], ())) != 2 or node.output[0] in results:
        return None
    following = readers.get(node.output[0], [])
    if len(following) != 1 or following[0].op_type != "Add":
        return None
    others = [name for name in following[0].input if name != node.output[0]]
    return following[0] if others and list(weights.get(others[0], ())) == [weights[node.input[1]][1]] else None
