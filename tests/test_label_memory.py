"""What labelling many pictures takes of memory: `pytest -m slow -s tests/test_label_memory.py` prints it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import HUNG

PICTURES = 20_000
# Labels pictures of 8 x 8 pixels, in each of which a stand-in for the model finds ten things of 300 bytes, and prints
# how much larger the process has been than it was after the first few, in MB.
CODE = """
import io, json, sys, types
from pathlib import Path
import numpy as np, torch
from PIL import Image
from sam3_hf.prediction.detections import Detections
from sam3_hf.picture_files import find_pictures
from sam3_hf.prediction.label_folder import LabelFolder
from sam3_hf.prediction.pipeline import PredictionSettings, Prompt
from sam3_hf.prediction.processes import Processes
from sam3_hf.prediction.run import predict_files
from sam3_hf.rle import encode_masks
import sam3_hf.files

sam3_hf.files.sync = lambda path: None  # waiting for the disk takes no memory

def memory(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1000

folder, count = Path(sys.argv[1]), int(sys.argv[2])
(folder / "pictures").mkdir()
data = io.BytesIO()
Image.new("RGB", (8, 8)).save(data, "PNG")
for index in range(count):
    (folder / "pictures" / f"{index:06d}.png").write_bytes(data.getvalue())

class Pipe:
    processor = types.SimpleNamespace(image_processor=lambda pixels, return_tensors: {"pixel_values": pixels[None]})

    def detect(self, prepared, prompts, text, settings, batch_size):
        rle = encode_masks(np.random.default_rng(0).random((10, 8, 8)) > 0.5)
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(10, 1)
        return [Detections(boxes, torch.rand(10), ["cat"] * 10, rle, (8, 8), ["cat"]) for _ in prepared]

def label(inputs, output):
    settings = PredictionSettings()
    pictures = find_pictures(inputs, output)
    choices = {"images": "refer", "masks": "rle", "valid_share": 0.2, "seed": 0}
    target = LabelFolder(output, {"prompts": ["cat"]}, False, **choices)
    common = dict(prompts=[Prompt("cat")], text={}, settings=settings, max_pixels=100, batch_size=4, workers=0)
    outcome = predict_files(Pipe(), pictures, target, Processes(), **common)
    labels = target.write_coco()
    assert outcome.new == len(pictures) == labels.images.total() and not labels.broken
    return labels.annotations.total()

label([str(folder / "pictures" / "0000*.png")], folder / "few")
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
annotations = label([str(folder / "pictures")], folder / "all")
written = sum(path.stat().st_size for path in (folder / "all").glob("*/_annotations.coco.json")) / 1e6
print(json.dumps({"growth_mb": memory("VmHWM") - before, "annotations": annotations, "written_mb": written}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_annotations(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(PICTURES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout)
    sys.stdout.write(f"\n{PICTURES} pictures: {figures}\n")
    assert figures["annotations"] == 10 * PICTURES
    assert figures["growth_mb"] < 60  # names and paths; the annotations alone would be several times as much
