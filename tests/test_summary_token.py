"""The token by which the box encoder sums up an image: who gets it, and that neighbours change nothing."""

import copy
import json

import pytest
import torch
from conftest import largest_difference, make_labels, micro_config
from PIL import Image

from sam3_hf import Prompt, Sam3LiteConfig, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data import PromptCollator
from sam3_hf.data.torch_dataset import Sample

BOXES = {"positive": (1, [0.4, 0.5, 0.3, 0.4]), "negative": (0, [0.4, 0.5, 0.3, 0.4])}


@pytest.fixture(params=[True, False], ids=["with the token", "without"])
def asked(request, model) -> Sam3LiteModel:
    model.config.summary_token = request.param
    return model


def rows(values: dict, index) -> dict:
    return {name: value[index] for name, value in values.items()}


@torch.no_grad()
def test_a_phrase_with_the_token_equals_stock_with_a_padding_box(model, stock_model, inputs):
    """As Meta's model answers; stock does so only beside boxes."""
    padding = {"input_boxes": torch.zeros(3, 1, 4), "input_boxes_labels": torch.full((3, 1), -10)}
    expected = stock_model(**inputs, **padding)
    assert largest_difference(model(**inputs), expected) <= 1e-5
    assert largest_difference(stock_model(**inputs), expected) > 0.01
    found = model.find(
        model.get_vision_features(inputs["pixel_values"]),
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        inputs["attention_mask"],
        torch.arange(3),
        threshold=0.0,
    )
    scores = (expected.pred_logits.sigmoid() * expected.presence_logits.sigmoid()).flatten()
    assert torch.allclose(found.scores, scores, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("neighbour", BOXES)
def test_no_prompt_depends_on_its_neighbours(asked, inputs, neighbour):
    """Phrases, phrases with a box, and boxes alone; each beside the others, alone, and beside more boxes."""
    label, box = BOXES[neighbour]
    padding = [[0.0] * 4] * 2
    given = torch.tensor([padding, [box, padding[0]], padding, [box, [0.7, 0.2, 0.2, 0.3]]])
    labels = torch.tensor([[-10, -10], [label, -10], [-10, -10], [label, 1]])
    words = rows(inputs, [0, 0, 1, 2])
    del words["pixel_values"]
    together = asked(
        pixel_values=inputs["pixel_values"],
        image_index=torch.tensor([0, 0, 1, 0]),
        input_boxes=given,
        input_boxes_labels=labels,
        **words,
    )
    for prompt, image in enumerate([0, 0, 1, 0]):
        own = labels[prompt] != -10
        boxes = {}
        if own.any():
            boxes = {"input_boxes": given[prompt][own][None], "input_boxes_labels": labels[prompt][own][None]}
        alone = asked(pixel_values=inputs["pixel_values"][[image]], **rows(words, [prompt]), **boxes)
        assert largest_difference(rows(together, [prompt]), alone) <= 1e-5, prompt


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=generator).numpy())


def test_no_neighbours_through_the_processor(asked):
    processor = Sam3LiteProcessor.from_config(asked.config)
    boxes = [None, [[5, 5, 30, 30], [20, 8, 50, 35]], None]
    with torch.no_grad():
        together = asked(**processor(images=picture(0), text=["cat", "dog", "red car"], input_boxes=boxes))
        for index, phrase in ((0, "cat"), (2, "red car")):
            alone = asked(**processor(images=picture(0), text=phrase))
            assert largest_difference(rows(together, [index]), alone) <= 1e-5


@pytest.mark.parametrize(
    "beside", [["dog"], [Prompt("dog", boxes=[[5, 5, 30, 30]])], [Prompt(boxes=[[9, 9, 20, 20]]), "dog"]]
)
def test_no_neighbours_through_the_pipeline(asked, beside):
    pipe = Sam3LitePipeline(asked, Sam3LiteProcessor.from_config(asked.config))
    alone = pipe(picture(1), ["cat"], threshold=0.0, nms_iou=None)
    together = pipe(picture(1), ["cat", *beside], threshold=0.0, nms_iou=None)
    own = [row for row, label in enumerate(together.labels) if label == "cat"]
    assert len(alone) == len(own) == asked.config.detr_decoder_config.num_queries
    assert torch.allclose(together.scores[own], alone.scores, atol=1e-5)


def test_no_neighbours_through_the_collator(asked):
    tokenizer = Sam3LiteProcessor.from_config(asked.config).tokenizer
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3))

    def sample(*boxes) -> Sample:
        phrases = ["cat", "dog"][: len(boxes)]
        return Sample(pixels, phrases, make_labels()[: len(boxes)], list(boxes), image_id=1)

    collate = PromptCollator(tokenizer, model_inputs_only=True)
    names = ("pred_logits", "pred_boxes", "pred_masks")
    with torch.no_grad():
        together = asked(**collate([sample(None, torch.tensor([0.4, 0.5, 0.3, 0.4]))]))
        alone = asked(**collate([sample(None)]))
    assert largest_difference(rows({name: together[name] for name in names}, [0]), alone, names) <= 1e-5


@torch.no_grad()
def test_it_is_made_once_for_each_image(model, inputs, monkeypatch):
    made = []
    summarize = model.geometry_encoder.summarize
    monkeypatch.setattr(
        model.geometry_encoder, "summarize", lambda maps, *args: made.append(len(maps)) or summarize(maps, *args)
    )
    words = rows(inputs, [0, 1, 2, 0, 1, 2])
    del words["pixel_values"]
    features = model.get_vision_features(inputs["pixel_values"][:2])
    owners = torch.tensor([0, 0, 0, 1, 1, 1])
    for size in (None, 2):
        model(vision_embeds=features, image_index=owners, prompt_chunk_size=size, **words)
    assert made == [2]


def test_who_gets_it(tmp_path):
    assert Sam3LiteConfig().summary_token and Sam3LiteConfig.from_preset("tiny").summary_token
    config = micro_config()
    config.save_pretrained(tmp_path)
    assert Sam3LiteConfig.from_pretrained(tmp_path).summary_token
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["summary_token"]  # as written before there was such a field
    file.write_text(json.dumps(fields))
    old = Sam3LiteConfig.from_pretrained(tmp_path)
    assert not old.summary_token
    assert not old.changed(num_queries=5).summary_token and not old.at_preset("tiny").summary_token
    assert not copy.deepcopy(old).summary_token


def test_sam3_sources_get_it_and_our_own_keep_what_they_have(model, stock_model, tmp_path, caplog):
    stock_model.save_pretrained(tmp_path / "stock")
    loaded = Sam3LiteModel.from_pretrained(tmp_path / "stock", preset="same")
    assert loaded.config.summary_token and loaded.config.vision_config.backbone_config.layer_norm_eps == 1e-5
    model.config.summary_token = False
    model.to_sam3().save_pretrained(tmp_path / "without")
    back = Sam3LiteModel.from_pretrained(tmp_path / "without", preset="same")
    assert not back.config.summary_token


def test_to_sam3_says_what_stock_leaves_out(model, caplog):
    model.to_sam3()
    assert "summary token" in caplog.text
    caplog.clear()
    model.config.summary_token = False
    model.to_sam3()
    assert "summary token" not in caplog.text


def test_every_parameter_has_a_gradient_in_a_step_of_phrases(asked, inputs):
    asked.train()
    asked(**inputs, labels=make_labels()).loss.backward()
    missing = [name for name, parameter in asked.geometry_encoder.named_parameters() if parameter.grad is None]
    assert not missing
    learns = any(parameter.grad.any() for parameter in asked.geometry_encoder.parameters())
    assert learns == asked.config.summary_token


def test_output_recording_and_unknown_arguments_are_refused_by_name(model, inputs):
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(TypeError, match=name):
            model(**inputs, **{name: True})
    with pytest.raises(TypeError, match="input_idz"):
        model(**inputs, input_idz=None)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=False, output_hidden_states=None)
        assert torch.equal(model(**inputs, return_dict=False)[1], plain.pred_boxes)
