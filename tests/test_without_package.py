"""Saved folders load and give the same outputs where this package is not installed, and what needs it says so."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import HUNG, PREDICTIONS, micro_config, shake
from test_conversion import native_file
from test_text_encoders import KINDS, PHRASES, lite_text_model
from video_cases import lite_config

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor, Sam3LiteVideoConfig, Sam3LiteVideoModel

NAMES = ("plain", "vocabulary", *KINDS)
CODE = """
    import json, sys
    from pathlib import Path
    import torch
    from safetensors.torch import load_file

    class Block:
        def find_spec(self, name, *args):
            if name.split(".")[0] == "sam3_hf":
                raise ImportError("blocked")

    sys.meta_path.insert(0, Block())
    from transformers import AutoModel, AutoProcessor

    native, video, *folders = map(Path, sys.argv[1:])
    found = {}
    model, expected = AutoModel.from_pretrained(video, trust_remote_code=True), load_file(video / "model.safetensors")
    processor = AutoProcessor.from_pretrained(video, trust_remote_code=True)
    session = processor.init_video_session(video=torch.zeros(1, 3, 48, 64, dtype=torch.uint8))
    processor.add_text_prompt(session, ["cat", "red car"])
    found["video"] = {
        "module": type(model).__module__,
        "weights": all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()),
        "frames": [output.frame_idx for output in model.propagate_in_video_iterator(session)],
    }
    for folder in folders:
        saved, weights = torch.load(folder / "expected.pt"), load_file(folder / "model.safetensors")
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            outputs = model(**saved["inputs"])
        state = model.state_dict()
        found[folder.name] = {
            "module": type(model).__module__,
            "difference": max((outputs[name] - value).abs().max().item() for name, value in saved["outputs"].items()),
            "weights": state.keys() == weights.keys() and all(torch.equal(state[n], weights[n]) for n in weights),
            "tokens": AutoProcessor.from_pretrained(folder, trust_remote_code=True).tokenizer("cat")["input_ids"],
        }
    found["errors"] = {}
    model = AutoModel.from_pretrained(folders[0], trust_remote_code=True)
    again = type(model).from_pretrained(folders[0], preset="same")
    found["same"] = all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for name, call in {
        "preset": lambda: type(model).from_pretrained(folders[0], preset="tiny"),
        "native": lambda: type(model).from_pretrained(native),
        "to_sam3": model.to_sam3,
    }.items():
        try:
            call()
        except ImportError as error:
            found["errors"][name] = str(error)
    print(json.dumps(found))
"""


def models() -> dict[str, Sam3LiteModel]:
    torch.manual_seed(0)
    plain = shake(Sam3LiteModel(micro_config())).eval()
    frozen = copy.deepcopy(plain).freeze_vocabulary(PHRASES[:2], Sam3LiteProcessor.from_config(plain.config))
    return {"plain": plain, "vocabulary": frozen, **{kind: lite_text_model(kind) for kind in KINDS}}


@torch.no_grad()
def save(model: Sam3LiteModel, folder: Path) -> None:
    """With `expected.pt`, which holds inputs and outputs."""
    processor = Sam3LiteProcessor.from_config(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    tokens = processor(text=PHRASES[:2])
    inputs = {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    outputs = model.eval()(**inputs)
    torch.save({"inputs": inputs, "outputs": {name: outputs[name] for name in PREDICTIONS}}, folder / "expected.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a process without the package found: one for all, as it takes long to import Transformers."""
    folder = tmp_path_factory.mktemp("saved")
    made = models()
    for name, model in made.items():
        save(model, folder / name)
    torch.save(native_file(made["plain"]), folder / "sam3.pt")
    video = Sam3LiteVideoModel(Sam3LiteVideoConfig(detector_config=lite_config()))
    video.save_pretrained(folder / "video")
    Sam3LiteProcessor.from_config(video.config.detector_config).to_video().save_pretrained(folder / "video")
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder / name) for name in ("sam3.pt", "video", *NAMES)]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HUNG,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_loads(found, name):
    assert found[name]["module"].startswith("transformers_modules")
    assert found[name]["difference"] <= 1e-6 and found[name]["weights"]
    assert len(found[name]["tokens"]) > 2


def test_a_saved_video_model_loads(found):
    assert found["video"]["module"].startswith("transformers_modules")
    assert found["video"]["weights"] and found["video"]["frames"] == [0]


def test_what_needs_the_package_says_so(found):
    assert found["same"] and found["errors"].keys() == {"preset", "native", "to_sam3"}
    assert all("pip install sam3-hf" in message for message in found["errors"].values())
