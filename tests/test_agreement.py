"""A teacher's answers as ground truth."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import micro_config, shake

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import load_dataset_splits
from sam3_hf.data.generated import write_dataset
from sam3_hf.training import agreement
from sam3_hf.training.agreement import agreement_data
from sam3_hf.training.teacher import Teacher

PHRASES = ["red circle", "blue square", "green star"]


@pytest.fixture
def model() -> Sam3LiteModel:
    """Sees what it is asked for, and is sure of it."""
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config()))
    with torch.no_grad():
        model.detr_decoder.presence_head.layer3.bias.fill_(9.0)
        model.dot_product_scoring.query_proj.bias.zero_()
    return model


def test_answers_are_kept_until_something_else_is_asked(tmp_path, model, monkeypatch):
    rows = load_dataset_splits(write_dataset(tmp_path / "data", 2, 3, image_size=64, num_concepts=2))
    asked, ask = [], agreement._ask
    monkeypatch.setattr(agreement, "CONFIDENT", 0.2)
    monkeypatch.setattr(agreement, "_ask", lambda *given: asked.append(1) or ask(*given))

    def answers(model: Sam3LiteModel, split: str = "validation", phrases: list[str] = PHRASES[:2]) -> list[list[dict]]:
        processor = Sam3LiteProcessor.from_config(model.config)
        teacher = Teacher(copy.deepcopy(model), processor, PHRASES, 0.3)
        given = (rows[split], phrases, 64, 2, 0, tmp_path / "run" / "validation.json")
        return agreement_data(Accelerator(cpu=True), teacher, processor, *given).rows["objects"]

    first = answers(model)
    assert sum(map(len, first)) > 0 and len(asked) == 1
    assert answers(model) == first and len(asked) == 1
    (tmp_path / "run" / "validation.json").write_text('{"key": ')
    assert answers(model) == first and len(asked) == 2
    answers(model, phrases=PHRASES[1:])
    answers(model, phrases=PHRASES[1:])
    assert len(asked) == 3
    answers(model, split="train")
    with torch.no_grad():
        model.detr_decoder.query_embed.weight.add_(0.1)
    answers(model, split="train")
    assert len(asked) == 5
