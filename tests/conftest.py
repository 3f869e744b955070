"""Sizes at which the model runs in milliseconds, and stock models that share its weights."""

import gc
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# what tests and the processes they start remember of images is not left in the user's cache
os.environ["HF_DATASETS_CACHE"] = os.path.join(tempfile.gettempdir(), f"sam3-hf-tests-{os.getuid()}")

import huggingface_hub
import numpy as np
import pytest
import torch
from film_cases import drawn_frames, write_film
from hub_stand_in import TOKEN, HubStandIn
from transformers import Sam3Config, Sam3Model
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.cli import app

HUNG = 3600  # seconds after which a process is taken to hang, far from what any takes on a slow machine
PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")


def pytest_collection_finish():
    gc.freeze()  # whoever looks for garbage need not go through all that was imported


@pytest.fixture(autouse=True)
def logs_as_before():
    """What a trainer in the test's process set up does not write into the output of the next."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def micro_config(**overrides) -> Sam3LiteConfig:
    """The preset tiny at 64 px with two layers everywhere: every layer kind, a tenth of the time."""
    sizes = {
        "image_size": 64,
        "vision_hidden_size": 32,
        "vision_num_attention_heads": 2,
        "vision_num_hidden_layers": 2,
        "vision_global_attn_indexes": [1],
        "vision_window_size": 4,
        "text_num_hidden_layers": 1,
        "detr_encoder_layers": 2,
        "detr_decoder_layers": 2,
        "num_queries": 12,
        "vision_config": {"backbone_config": {"pretrain_image_size": 32}},  # position embeddings are tiled
    }
    return Sam3LiteConfig.from_preset("tiny", **{**sizes, **overrides})


def stock_config(config: Sam3LiteConfig) -> Sam3Config:
    """The stock configuration of the same sizes, with the parts that Sam3Lite leaves out."""
    parts = config.to_dict()
    return Sam3Config(
        vision_config={**parts["vision_config"], "scale_factors": [4.0, 2.0, 1.0, 0.5]},
        text_config=parts["text_config"],
        geometry_encoder_config=parts["geometry_encoder_config"],
        detr_encoder_config=parts["detr_encoder_config"],
        detr_decoder_config=parts["detr_decoder_config"],
        mask_decoder_config={**parts["mask_decoder_config"], "num_upsampling_stages": 3},
    )


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter off its initial value, so that none is zero, one, or equal to another by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder with a model and its processor, to be read and copied only."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = shake(Sam3LiteModel(micro_config())).eval()
    model.save_pretrained(folder)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def frames() -> list[np.ndarray]:
    """Those of `film`, (48, 64, 3) uint8."""
    return drawn_frames()


@pytest.fixture(scope="session")
def film(frames, tmp_path_factory) -> Path:
    """A film to be read only."""
    return write_film(frames, tmp_path_factory.mktemp("film") / "clip.mp4")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the Hub that this process pushes to and loads from."""
    with HubStandIn() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
        yield hub


def run(*arguments):
    """A command of `sam3-lite` in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def config() -> Sam3LiteConfig:
    return micro_config()


@pytest.fixture
def model(config) -> Sam3LiteModel:
    torch.manual_seed(0)
    return shake(Sam3LiteModel(config)).eval()


@pytest.fixture
def stock_model(config, model) -> Sam3Model:
    stock = Sam3Model(stock_config(config)).eval()
    result = stock.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    return stock


@pytest.fixture
def inputs() -> dict:
    """Three images, one prompt each, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 6:] = 0
    return {
        "pixel_values": torch.randn(3, 3, 64, 64, generator=generator),
        "input_ids": torch.randint(3, 1000, (3, 8), generator=generator),
        "attention_mask": mask,
    }


@pytest.fixture
def box_inputs(inputs) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {
        **inputs,
        "input_boxes": torch.rand(3, 2, 4, generator=generator) * 0.3 + 0.3,
        "input_boxes_labels": torch.tensor([[1, 0], [1, -10], [-10, -10]]),
    }


def largest_difference(first, second, names=PREDICTIONS) -> float:
    """Relative to the largest value of an output where that is above 1, as float32 rounds: mask logits go to 9."""

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()

    return max(difference(first[name].float(), second[name].float()) for name in names)


def with_padding_box(inputs: dict) -> dict:
    """What brings stock to give the summary token to prompts without boxes, as Meta's model and ours do."""
    count = len(inputs["input_ids"])
    return {
        **inputs,
        "input_boxes": torch.zeros(count, 1, 4),
        "input_boxes_labels": torch.full((count, 1), -10),
    }


def make_labels(with_masks: bool = True) -> list[dict]:
    """Labels for three prompts at 64 px: two objects, none, one."""
    boxes = [[[0.25, 0.25, 0.25, 0.25], [0.7, 0.6, 0.2, 0.4]], [], [[0.5, 0.5, 0.5, 0.5]]]
    labels = []
    for per_prompt in boxes:
        label = {"boxes": torch.tensor(per_prompt).reshape(-1, 4)}
        if with_masks:
            masks = torch.zeros(len(per_prompt), 64, 64, dtype=torch.bool)
            for mask, (x, y, w, h) in zip(masks, per_prompt, strict=True):
                mask[int((y - h / 2) * 64) : int((y + h / 2) * 64), int((x - w / 2) * 64) : int((x + w / 2) * 64)] = (
                    True
                )
            label["masks"] = masks
        labels.append(label)
    return labels
