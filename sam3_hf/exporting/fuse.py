"""Fewer operators for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .build import module_of, rewrite, save_graph
from .links import Links

CONTRIB = "com.microsoft"  # operators that ONNX Runtime has beside those of ONNX


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
    links = Links(graph)
    nodes, constants, rows, done = [], {}, {}, set()

    def constant(values: list[int]) -> str:
        name = "sizes_" + "_".join(map(str, values))
        constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    for node in graph.node:
        if node.output[0] in done:
            continue
        addition = _addition_of_bias(node, links)
        if addition is None:
            nodes.append(node)
            continue
        source, (inputs, outputs) = node.input[0], links.weights[node.input[1]].dims
        if source not in rows:
            rows[source] = f"{source}_rows", f"{source}_leading"
            nodes.append(helper.make_node("Reshape", [source, constant([-1, inputs])], [rows[source][0]]))
            nodes.append(helper.make_node("Shape", [source], [rows[source][1]], start=0, end=-1))
        flat, leading = rows[source]
        (shared,) = (name for name in addition.input if name != node.output[0])
        total = addition.output[0]
        product, sizes, bias = f"{total}_product", f"{total}_sizes", f"{total}_bias"
        # A copy, as its scale in int8 is that of this product alone.
        constants[bias] = numpy_helper.from_array(links.constant(shared), bias)
        nodes.append(helper.make_node("Gemm", [flat, node.input[1], bias], [product], node.name))
        nodes.append(helper.make_node("Concat", [leading, constant([outputs])], [sizes], axis=0))
        nodes.append(helper.make_node("Reshape", [product, sizes], [total]))
        done.add(total)
    rewrite(graph, nodes, list(constants.values()))
    save_graph(model, path)


def _addition_of_bias(node, links: Links):
    """The node that adds a bias to the product of `node`, and is the only one that reads it; None if there is none."""
    weight = links.weights.get(node.input[1]) if node.op_type == "MatMul" else None
    addition = links.reader(node.output[0], "Add")
    if weight is None or len(weight.dims) != 2 or addition is None:
        return None
    others = [name for name in addition.input if name != node.output[0]]
    bias = links.weights.get(others[0]) if others else None
    return addition if bias is not None and list(bias.dims) == [weight.dims[1]] else None


def join_attention(path: Path) -> None:
    """
    Rewrites a graph with each attention without a mask as one `MultiHeadAttention`, whose scores are never in memory
    all at once, and the rotary positions of its queries and keys as `RotaryEmbedding`. Blocks of `attend_in_blocks`
    become one again. The operators take tokens as they come from products, so that nothing is transposed.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    links = Links(graph)
    found = [attention for node in graph.node if (attention := _attention_of(node, links)) is not None]
    joined = {attention.output: attention for attention in found}  # its blocks have one output
    constants = {"three_axes": np.array([0, 0, -1]), "first_position": np.array([0])}
    nodes = []

    def add(kind: str, inputs: list[str], output: str, name: str = "", **attributes) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    for node in graph.node:
        attention = joined.get(node.output[0])
        if attention is None:
            nodes.append(node)
            continue
        output, heads, module = attention.output, attention.heads, module_of(node.name)
        given = []
        for part, tokens in zip(("query", "key", "value"), attention.tokens, strict=True):
            name = add("Reshape", [tokens.name, "three_axes"], f"{output}_{part}")
            if tokens.rotation is not None:
                cos, signed_sin = tokens.rotation
                constants |= {f"{cos}_pairs": links.constant(cos)[0, :, ::2]}
                constants |= {f"{signed_sin}_pairs": links.constant(signed_sin)[0, :, 1::2]}
                inputs = [name, "first_position", f"{cos}_pairs", f"{signed_sin}_pairs"]
                settings = {"domain": CONTRIB, "num_heads": heads, "interleaved": 1}
                own = f"{module}/RotaryEmbedding_{part}"
                name = add("RotaryEmbedding", inputs, f"{output}_{part}_turned", own, **settings)
            given.append(name)
        settings = {"domain": CONTRIB, "num_heads": heads, "scale": attention.scale}
        own = f"{module}/MultiHeadAttention"
        attended = add("MultiHeadAttention", given, f"{output}_joined", own, **settings)
        # Of a kind that is not ONNX's, so that nothing can be told of its output.
        graph.value_info.append(helper.make_tensor_value_info(attended, TensorProto.FLOAT, None))
        constants[f"{heads}_heads"] = np.array([0, 0, heads, -1])
        add("Reshape", [attended, f"{heads}_heads"], output)
    if found:
        tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
        rewrite(graph, nodes, tensors)
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        save_graph(model, path)


class _Tokens(NamedTuple):
    name: str  # of `(batch, tokens, heads, width)`
    rotation: tuple[str, str] | None  # of `PlainRotation`: cosines and signed sines


class _Attention(NamedTuple):
    tokens: tuple[_Tokens, _Tokens, _Tokens]  # queries, keys and values
    heads: int
    scale: float
    output: str  # `(batch, tokens, heads, width)`


def _attention_of(softmax, links: Links) -> _Attention | None:
    """
    The attention that a node is the softmax of, or of a block of: `eager_attention_forward` of Transformers without a
    mask. None if it is another.
    """
    if softmax.op_type != "Softmax":
        return None
    scaled = links.maker(softmax.input[0], "Mul")
    scale = None if scaled is None else links.constant(scaled.input[1])
    scores = links.maker(scaled.input[0], "MatMul") if scale is not None and scale.size == 1 else None
    turned = None if scores is None else links.maker(scores.input[1], "Transpose")
    product = links.reader(softmax.output[0], "MatMul")
    back = None if product is None else links.reader(product.output[0], "Transpose")
    if turned is None or not _permutes(back, 0, 2, 1, 3):
        return None
    query, output = scores.input[0], back.output[0]
    blocks, whole = links.maker(query, "Split"), links.reader(output, "Concat")
    if blocks is not None:
        query = blocks.input[0]
        if len(blocks.output) > 1:
            if whole is None or len(whole.input) != len(blocks.output):
                return None
            output = whole.output[0]
    tokens = [_tokens(query, links), _keys(turned, links), _tokens(product.input[1], links)]
    heads = links.shapes.get(query, [None, None])[1]
    if None in tokens or not isinstance(heads, int):
        return None
    return _Attention(tuple(tokens), heads, scale.item(), output)


def _tokens(name: str, links: Links) -> _Tokens | None:
    """What heads `(batch, heads, tokens, width)` are, before they were turned and transposed."""
    heads, rotation = name, None
    total = links.maker(name, "Add")
    if total is not None:
        plain, crossed = (links.maker(one, "Mul") for one in total.input)
        swapped = None if crossed is None else links.maker(crossed.input[0], "MatMul")
        if plain is None or swapped is None or swapped.input[0] != plain.input[0]:
            return None
        heads, rotation = plain.input[0], (plain.input[1], crossed.input[1])
        if not all(table in links.weights for table in (*rotation, swapped.input[1])):
            return None
    transposed = links.maker(heads, "Transpose")
    return _Tokens(transposed.input[0], rotation) if _permutes(transposed, 0, 2, 1, 3) else None


def _keys(transposed, links: Links) -> _Tokens | None:
    """As `_tokens`, of the node that makes `(batch, heads, width, tokens)`."""
    if _permutes(transposed, 0, 2, 3, 1):
        return _Tokens(transposed.input[0], None)
    return _tokens(transposed.input[0], links) if _permutes(transposed, 0, 1, 3, 2) else None


def _permutes(node, *axes: int) -> bool:
    return node is not None and tuple(node.attribute[0].ints) == axes
