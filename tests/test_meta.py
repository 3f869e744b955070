"""Outputs of a native checkpoint against those of Meta's own code; see `meta_cases`."""

import json
from pathlib import Path

import pytest
import torch
from meta_cases import CASES, CONFIG, packed_boxes, pixel_values, seeded_weights

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.checkpoints import native_state_dict
from sam3_hf.processing_sam3_lite import clip_tokenizer, tokenize

META = json.loads((Path(__file__).parent / "meta_outputs.json").read_text())
OUTPUTS = ("pred_logits", "pred_boxes", "presence_logits", "pred_masks", "semantic_seg")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Sam3LiteModel:
    """From a file as Meta writes it: nothing but tensors under native names tells what it is."""
    empty = Sam3LiteModel(Sam3LiteConfig(**CONFIG))
    shapes = {name: tuple(tensor.shape) for name, tensor in native_state_dict(empty.state_dict()).items()}
    tensors = {f"detector.{name}": tensor for name, tensor in seeded_weights(shapes).items()}
    for layer, side in enumerate((4, 8, 4, 8)):
        name = f"detector.backbone.vision_backbone.trunk.blocks.{layer}.attn.freqs_cis"
        tensors[name] = torch.zeros(side**2, 8, dtype=torch.complex64)
    file = tmp_path_factory.mktemp("native") / "sam3.pt"
    torch.save({"model": tensors}, file)
    return Sam3LiteModel.from_pretrained(file, preset="same", dtype=torch.float32)


def ask(model: Sam3LiteModel, case: list, **kwargs) -> dict[str, torch.Tensor]:
    words = tokenize(clip_tokenizer(49408), [phrase for phrase, _, _ in case])
    boxes, labels = packed_boxes(case)
    if boxes.shape[1]:
        words |= {"input_boxes": boxes, "input_boxes_labels": labels}
    owners = torch.tensor([image for _, image, _ in case])
    with torch.no_grad():
        return model(pixel_values=pixel_values(), image_index=owners, **words, **kwargs)


def differences(outputs, expected: dict) -> dict[str, float]:
    found = {name: outputs[name] for name in OUTPUTS}
    for name in ("pred_masks", "semantic_seg"):
        found[name] = found[name][..., 3::8, 5::8]
    return {name: (found[name].flatten() - torch.tensor(expected[name])).abs().max().item() for name in OUTPUTS}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_metas(model, name):
    difference = differences(ask(model, CASES[name]), META[name])
    masks = difference.pop("pred_masks")
    assert max(difference.values()) <= 1e-5 and masks <= 1e-4, (difference, masks)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_metas(name):
    tokens = tokenize(clip_tokenizer(49408), [phrase for phrase, _, _ in CASES[name]])
    expected = torch.tensor(META[name]["input_ids"])
    assert torch.equal(tokens["input_ids"] * tokens["attention_mask"], expected)


def test_without_the_token_phrases_are_answered_differently(model):
    model.config.summary_token = False
    try:
        assert differences(ask(model, CASES["phrases"]), META["phrases"])["pred_logits"] > 0.01
    finally:
        model.config.summary_token = True


def test_the_epsilon_of_the_vit_is_metas(model):
    assert model.config.vision_config.backbone_config.layer_norm_eps == 1e-5
    assert {layer.layer_norm1.eps for layer in model.vision_encoder.backbone.layers} == {1e-5}
