"""The FP16 recipe without a GPU: what the loss scale starts at, and short runs in emulated FP16."""

import json
import logging
import sys
from pathlib import Path

import fp16_recipe
import pytest
import torch
from common import training_batch
from conftest import micro_config
from fp16_emulation import RoundedProducts, emulated_fp16

import sam3_hf
from sam3_hf import Sam3LiteModel
from sam3_hf.training import session as trainer
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.checkpoints import load_checkpoint, save_checkpoint

CHECKPOINT = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The accelerator of an FP16 run; what it does to the loggers of this process is undone."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    flags = ["--data", "generated", "--mixed_precision", "fp16", "--output_dir", str(tmp_path)]
    return lambda: trainer.start_accelerator(parse_arguments(flags))


def test_the_loss_scale_starts_low_and_grows_as_ever(start):
    with emulated_fp16():
        scaler = start().scaler
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (64, 2000)
    assert scaler.is_enabled() and scaler.get_growth_factor() == 1 / scaler.get_backoff_factor() == 2


def test_a_resumed_run_keeps_its_loss_scale(start, tmp_path):
    model = Sam3LiteModel(micro_config())
    optimizer = torch.optim.SGD(model.parameters())
    with emulated_fp16():
        accelerator = start()
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 5})
        save_checkpoint(accelerator, tmp_path / "last", model, optimizer, None, {})
    with emulated_fp16():
        resumed = start()
        assert resumed.scaler.get_scale() == 64
        load_checkpoint(resumed, tmp_path / "last", model, optimizer, None)
    assert resumed.scaler.state_dict() == accelerator.scaler.state_dict()
    assert resumed.scaler.get_scale() == 8


def test_products_are_added_up_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, 64, generator=generator).half() for _ in range(2))
    exact = one.float() @ other.float()
    with RoundedProducts():
        product = one @ other
        assert (product.dtype, (one.float() @ other.float()).dtype) == (torch.float16, torch.float32)
        assert torch.full((1, 2), 256.0).half() @ torch.full((2, 1), 256.0).half() == torch.inf
        *_, deviation = torch.native_layer_norm(one, [64], None, None, 1e-5)
    assert torch.equal(product, exact.half())
    assert deviation.dtype == torch.float32


def test_gradients_overflow_where_the_scale_is_too_high():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = torch.ones(4, 8)

    def gradient(scale: float) -> torch.Tensor:
        with RoundedProducts(), torch.autocast("cpu", dtype=torch.float16):
            loss = (inputs @ weight).float().sum()
            return torch.autograd.grad(scale * loss, weight)[0]

    assert torch.equal(gradient(2.0**10), torch.full((8, 8), 2.0**12))
    assert gradient(2.0**14).isinf().all()


def test_the_first_scale_is_far_from_both_ends():
    """On the model that the demo starts from, whose loss is in the hundreds from the first step on."""
    torch.manual_seed(0)
    model = Sam3LiteModel.from_pretrained(CHECKPOINT, preset="tiny", dtype=torch.float32).train()
    batch = training_batch(model, images=1, prompts=4, objects=3)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("text_")]
    with RoundedProducts():
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss

        def gradient(scale: float) -> torch.Tensor:
            found = torch.autograd.grad(scale * loss, parameters, retain_graph=True, allow_unused=True)
            return torch.cat([tensor.flatten() for tensor in found if tensor is not None]) / scale

        low, first, high, usual = (gradient(2.0**exponent) for exponent in (0, 6, 9, 16))
    assert loss > 100 and not usual.isfinite().all()
    assert (low - first).norm() < 1e-3 * first.norm() and (high - first).norm() < 1e-3 * first.norm()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Rows of the benchmark for short runs of the demo."""

    def rows(*flags: str) -> list[dict]:
        output = tmp_path_factory.mktemp("recipe") / "out.json"
        options = ["--seeds", "1", "--steps", "24", "--images", "100", "--output", str(output), *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fp16_recipe.py", *options])
            fp16_recipe.main()
        return json.loads(output.read_text())["rows"]

    return rows


@pytest.mark.slow
def test_no_step_is_skipped_and_the_loss_is_that_of_float32(recipe):
    whole, half = recipe()
    assert (whole["precision"], half["precision"]) == ("fp32", "fp16")
    assert whole["steps"] == half["steps"] == 24
    assert half["skipped"] == 0 and half["scale"] == 64
    assert half["train loss"] == pytest.approx(whole["train loss"], rel=0.05)
    assert half["valid loss"] == pytest.approx(whole["valid loss"], rel=0.1)


@pytest.mark.slow
def test_the_usual_first_scale_loses_steps(recipe):
    (row,) = recipe("--precisions", "fp16", "--init-scale", "65536")
    assert row["skipped"] >= 4
    assert row["scale"] == 2.0 ** (16 - row["skipped"])
