"""What graphs take of memory where int8 is fitted to them, and where they run."""

import subprocess
import sys

from conftest import HUNG

TOKENS, LAYERS = 3072, 8
SCORES_MB = TOKENS**2 * 4 / 1e6  # of one layer
# Writes layers of attention without heads.
LAYERS_CODE = f"""
import sys
from pathlib import Path
import numpy as np, onnx, onnxruntime.quantization
from onnx import TensorProto, helper, numpy_helper

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
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", 64]) for name in ("x", x)]
path = Path(sys.argv[1])
model = helper.make_model(
    helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 20)]
)
model.ir_version = 10
onnx.save(model, path)
sample = {{"x": rng.standard_normal(shape, np.float32)}}
"""
# Quantises them, and prints how much larger the process has been than before, in MB.
QUANTIZE_CODE = f"""
from sam3_hf.exporting.quantize import quantize_activations

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
quantize_activations(path, [sample, sample], "openvino")
print(memory("VmHWM") - before)
kinds = [node.op_type for node in onnx.load(path).graph.node]
assert kinds.count("QuantizeLinear") == {LAYERS} and kinds.count("Softmax") == {LAYERS}
"""

# Runs them for a few tokens, then for all, and prints how much larger the process is after that.
RUN_CODE = """
import torch
from sam3_hf.exporting.engines import OnnxRuntimeGraph

graph = OnnxRuntimeGraph(path, "cpu", threads=1, hands_back=sys.argv[2] == "True")
x = torch.from_numpy(sample["x"])
graph(x=x[:, :256])
before = memory("VmRSS")
graph(x=x)
print(memory("VmRSS") - before)
"""


def growth(code: str, *arguments) -> float:
    command = [sys.executable, "-c", LAYERS_CODE + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def test_scores_of_attention_are_not_kept(tmp_path):
    assert growth(QUANTIZE_CODE, tmp_path / "layers.onnx") < LAYERS * SCORES_MB / 2


def test_a_graph_hands_its_memory_back(tmp_path):
    kept, handed_back = (growth(RUN_CODE, tmp_path / "layers.onnx", hands_back) for hands_back in (False, True))
    assert handed_back < kept / 2, (kept, handed_back)
