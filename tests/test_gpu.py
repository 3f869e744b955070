"""What only a CUDA device can show: FP16 with loss scaling, filling its memory, its compiler. Run with -m gpu."""

import copy
import functools
import json
import math
import os
from pathlib import Path

import pytest
import test_train_run
import torch
import train_cases
from conftest import make_labels, micro_config, shake
from test_train_run import lines_of, start, wait_for_step

from sam3_hf import Sam3LiteModel
from sam3_hf.data.generated import write_dataset
from sam3_hf.mapping.calibration import calibrate_mapping

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
train = functools.partial(test_train_run.train, fresh=True)  # CUDA lives in no process that was forked
PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=12, num_valid=3, image_size=64, num_concepts=3)


@pytest.fixture(autouse=True)
def visible_gpu(monkeypatch):
    """Runs of the training command see one GPU, which the helpers hide from them otherwise."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for module in (test_train_run, train_cases):
        monkeypatch.setattr(module, "environment", lambda: {**os.environ, "CUDA_VISIBLE_DEVICES": visible})


def saved_state(folder: Path) -> dict:
    return json.loads((folder / "run" / "checkpoints" / "last" / "trainer_state.json").read_text())


def scaler_file(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "last" / "scaler.pt"


def scale_of(folder: Path) -> float:
    return torch.load(scaler_file(folder), weights_only=True)["scale"]


def set_scale(folder: Path, scale: float) -> None:
    """Changes the loss scale of the last checkpoint, whose files may have other names as well."""
    path = scaler_file(folder)
    state = torch.load(path, weights_only=True)
    path.unlink()
    torch.save({**state, "scale": scale}, path)


def test_a_killed_fp16_run_goes_on_with_its_loss_scale(data, tmp_path):
    settings = {"mixed_precision": "fp16", "save_every_steps": 2, "epochs": 4}
    process = start(tmp_path, data, **settings)
    wait_for_step(tmp_path, process, 5)
    process.kill()
    process.wait()
    before = saved_state(tmp_path)["overflows"]
    set_scale(tmp_path, 512.0)  # no run gets there by itself
    finished = train(tmp_path, data, "--resume", "auto", **settings)
    assert finished.returncode == 0, finished.stdout
    lines = lines_of(tmp_path, "train")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert scale_of(tmp_path) == 512.0 / 2 ** (lines[-1]["overflows"] - before)


def test_overflows_are_counted_and_lower_the_scale(data, tmp_path):
    settings = {"mixed_precision": "fp16", "epochs": 4}
    finished = train(tmp_path, data, "--max_steps", "4", **settings)
    assert finished.returncode == 0, finished.stdout
    before = lines_of(tmp_path, "train")[-1]["overflows"]
    set_scale(tmp_path, 2.0**40)
    finished = train(tmp_path, data, "--resume", "auto", "--max_steps", "8", **settings)
    assert finished.returncode == 0, finished.stdout
    assert "step 5 skipped: gradients overflowed in FP16" in finished.stdout
    overflows = lines_of(tmp_path, "train")[-1]["overflows"] - before
    assert overflows >= 1
    assert scale_of(tmp_path) == 2.0 ** (40 - overflows)


def test_batch_size_auto_takes_what_fits(data, tmp_path):
    """A model this small fits with as many images as there are, rounded down to a power of two."""
    finished = train(tmp_path, data, batch_size="auto", max_steps=1)
    assert finished.returncode == 0, finished.stdout
    assert saved_state(tmp_path)["batch_size"] == 8


def on_device(inputs: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def assert_near(found, expected, tolerance: float) -> None:
    """Compares the predictions; the tolerance is relative to the largest value of each."""
    for name in PREDICTIONS:
        difference = (found[name].float() - expected[name].float()).abs().max()
        assert difference < tolerance * expected[name].float().abs().max(), name


def test_compiles_with_the_default_backend(model, box_inputs):
    model, inputs = model.to(DEVICE), on_device(box_inputs)
    labels = [on_device(label) for label in make_labels()]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**inputs)
    model.compile()
    with torch.no_grad():
        assert_near(model(**inputs), expected, 1e-2)  # convolutions run in TF32
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.vision_encoder.backbone.layers[0].mlp.fc1.weight.grad.abs().max() > 0


@torch.no_grad()
def test_boxes_in_pure_half_equal_autocast(model, box_inputs):
    model, inputs = model.to(DEVICE), on_device(box_inputs)
    with torch.autocast(DEVICE, dtype=torch.float16):
        autocast = model(**inputs)
    pure = copy.deepcopy(model).half()(**{**inputs, "pixel_values": inputs["pixel_values"].half()})
    assert pure.pred_masks.dtype == torch.float16
    assert_near(pure, autocast, 20 * torch.finfo(torch.float16).eps)


def test_calibration_gives_what_it_gives_on_the_cpu():
    teacher = shake(Sam3LiteModel(micro_config(vision_hidden_size=64, vision_num_attention_heads=4))).eval()
    sizes = {"vision_hidden_size": 48, "vision_num_attention_heads": 3}
    config = teacher.config.changed(**sizes)
    cpu, gpu = (calibrate_mapping(teacher, config=config, num_images=16, device=device) for device in ("cpu", DEVICE))
    assert gpu.device.type == DEVICE and teacher.device.type == "cpu"
    cosines = [model.mapping_report.calibration["pyramid_cosines"] for model in (cpu, gpu)]
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-2)
