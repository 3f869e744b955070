"""How the nodes of an ONNX graph hang together."""

from __future__ import annotations

import numpy as np


class Links:
    """
    Attributes:
        makers: {tensor: the node that it comes from}.
        readers: {tensor: the nodes that read it}.
        weights: {tensor: the constant}.
        shapes: {tensor: its sizes}, of what the file says them of; a size that is free is a name.
    """

    def __init__(self, graph):
        self.makers = {name: node for node in graph.node for name in node.output}
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.shapes = {
            value.name: [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        self._results = {output.name for output in graph.output}

    def maker(self, name: str, kind: str):
        """The node of a kind that a tensor comes from; None if it comes from elsewhere."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def reader(self, name: str, kind: str):
        """The node of a kind that reads a tensor which nothing else does; None if there is none."""
        nodes = self.readers.get(name, [])
        alone = len(nodes) == 1 and nodes[0].op_type == kind and name not in self._results
        return nodes[0] if alone else None

    def constant(self, name: str) -> np.ndarray | None:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name]) if name in self.weights else None
