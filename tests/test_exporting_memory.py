"""What fitting the ranges of int8 takes of memory."""

import subprocess
import sys

from conftest import HUNG

TOKENS, LAYERS = 2048, 16
SCORES_MB = TOKENS**2 * 4 / 1e6  # of one layer
# Quantises layers of attention without heads, and prints how much larger the process has been than before, in MB.
CODE = f"""
import sys
from pathlib import Path
import numpy as np, onnx, onnxruntime.quantization
from onnx import TensorProto, helper, numpy_helper
from sam3_hf.exporting.quantize import quantize_activations

def memory(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1000

rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
for layer in range({LAYERS}):
    def add(kind, *inputs, **attributes):
        name = f"{{layer}}/{{len(nodes)}}"
        nodes.append(helper.make_node(kind, inputs, [f"{{name}} of {{kind}}"], name, **attributes))
        return nodes[-1].output[0]
    weights.append(numpy_helper.from_array(rng.standard_normal((64, 64), np.float32) / 8, f"w{{layer}}"))
    turned = add("Transpose", x, perm=[0, 2, 1])
    x = add("MatMul", add("MatMul", add("Softmax", add("MatMul", x, turned)), x), f"w{{layer}}")
shape = [1, {TOKENS}, 64]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", x)]
path = Path(sys.argv[1])
model = helper.make_model(
    helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 20)]
)
model.ir_version = 10
onnx.save(model, path)
samples = [{{"x": rng.standard_normal(shape, np.float32)}}] * 2
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
quantize_activations(path, samples, "openvino")
print(memory("VmHWM") - before)
kinds = [node.op_type for node in onnx.load(path).graph.node]
assert kinds.count("QuantizeLinear") == {LAYERS} and kinds.count("Softmax") == {LAYERS}
"""


def test_scores_of_attention_are_not_kept(tmp_path):
    command = [sys.executable, "-c", CODE, tmp_path / "layers.onnx"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < LAYERS * SCORES_MB / 2
