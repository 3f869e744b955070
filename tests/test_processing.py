import numpy as np
import pytest
import torch
from conftest import micro_config
from PIL import Image
from transformers import AutoProcessor, Sam3Processor

from sam3_hf import Sam3LiteModel, Sam3LiteOutput, Sam3LiteProcessor, processing_sam3_lite
from sam3_hf.processing_sam3_lite import clean_phrase, clip_tokenizer, tokenize


@pytest.fixture(scope="module")
def processor():
    return Sam3LiteProcessor.from_config(micro_config())


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),  # published encodings of CLIP
        ("red blood cell", [49406, 736, 3590, 5533, 49407]),
    ],
)
def test_full_vocabulary_is_clips(text, ids):
    assert clip_tokenizer()(text)["input_ids"] == ids


def test_cut_vocabulary_still_encodes_everything():
    tokenizer = clip_tokenizer(600)
    ids = tokenizer("red blood cell, größer 血球")["input_ids"]
    assert max(ids) == tokenizer.eos_token_id == 599
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "redbloodcell,größer血球"
    with pytest.raises(ValueError, match="514..49408"):
        clip_tokenizer(500)


def test_equals_stock_processor(processor, image):
    stock = Sam3Processor(processor.image_processor, processor.tokenizer)
    boxes = [[[8.0, 4.0, 40.0, 20.0], [0.0, 0.0, 80.0, 40.0]], [[10.0, 10.0, 20.0, 20.0]]]
    labels = [[1, 0], [1]]
    ours = processor(images=[image] * 2, text=["cat", None], input_boxes=boxes, input_boxes_labels=labels)
    theirs = stock(
        images=[image] * 2, text=["cat", None], input_boxes=boxes, input_boxes_labels=labels, return_tensors="pt"
    )
    valid = ours["input_boxes_labels"] != -10
    assert torch.allclose(ours["input_boxes"][valid], theirs["input_boxes"][valid])
    for name in ("pixel_values", "input_ids", "attention_mask", "input_boxes_labels", "original_sizes"):
        assert torch.equal(ours[name], theirs[name]), name


def test_several_prompts_per_image(processor, image):
    encoded = processor(images=[image, image], text=[["cat", "dog"], ["car"]])
    assert encoded["image_index"].tolist() == [0, 0, 1]
    assert encoded["pixel_values"].shape == (2, 3, 64, 64)
    assert processor(images=image, text=["cat", "dog"])["image_index"].tolist() == [0, 0]
    assert processor(images=[image, image], text="cat")["input_ids"].shape[0] == 2


def test_output_goes_into_the_model_and_back(processor, image):
    model = Sam3LiteModel(micro_config()).eval()
    encoded = processor(images=image, text=["cat", None], input_boxes=[None, [[1.0, 1.0, 9.0, 9.0]]])
    with torch.no_grad():
        outputs = model(**encoded)
    results = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(40, 80)] * 2)
    assert [result["masks"].shape for result in results] == [(12, 40, 80)] * 2
    assert results[0]["masks"].dtype == torch.bool


def test_annotations_become_labels(processor, image):
    masks = np.zeros((1, 40, 80), dtype=bool)
    annotations = [{"boxes": [[8, 4, 40, 20]], "masks": masks}, {"boxes": []}]
    labels = processor(images=image, text=["cat", "dog"], annotations=annotations)["labels"]
    assert torch.allclose(labels[0]["boxes"], torch.tensor([[0.3, 0.3, 0.4, 0.4]]))
    assert labels[0]["masks"].shape == (1, 40, 80)
    assert labels[1]["boxes"].shape == (0, 4) and "masks" not in labels[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": [["cat"], ["dog"]]}, "2 images, `images` has 1"),
        ({"text": [None]}, "Prompt 0 has neither"),
        ({"text": ["cat"], "input_boxes": [None, None]}, "2 entries for 1 prompts"),
        ({"text": ["cat"], "input_boxes": [[[0, 0, 1, 1]]], "input_boxes_labels": [[1, 1]]}, "1 boxes and 2"),
        ({"text": ["cat"], "annotations": []}, "0 entries for 1 prompts"),
        ({"text": ["cat"], "annotations": [{"bbox": []}]}, "needs `boxes`"),
    ],
)
def test_wrong_inputs_are_named(processor, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(images=image, **arguments)


def test_long_prompts_are_cut_with_a_warning(processor, image, monkeypatch):
    warnings = []
    monkeypatch.setattr(processing_sam3_lite.logger, "warning", warnings.append)
    processor(images=image, text="short")
    assert not warnings
    encoded = processor(images=image, text="a " * 50)
    assert "longer than 32 tokens" in warnings[0]
    assert encoded["input_ids"].shape == (1, 32)
    assert encoded["input_ids"][0, -1] == processor.tokenizer.eos_token_id


def make_output() -> Sam3LiteOutput:
    logits = torch.tensor([[3.0, -3.0, 2.0]])
    boxes = torch.tensor([[[-0.1, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.2]]])
    masks = torch.full((1, 3, 4, 4), -5.0)
    masks[0, 0, :2, :2] = 5.0
    return Sam3LiteOutput(
        pred_logits=logits, pred_boxes=boxes, pred_masks=masks, presence_logits=torch.tensor([[4.0]])
    )


def test_post_processing_by_hand(processor):
    (result,) = processor.post_process_instance_segmentation(make_output(), threshold=0.5, target_sizes=[(40, 80)])
    presence = torch.tensor(4.0).sigmoid()
    assert torch.allclose(result["scores"], torch.tensor([3.0, 2.0]).sigmoid() * presence)
    assert result["boxes"].tolist() == [[0.0, 0.0, 40.0, 20.0], [40.0, 20.0, 80.0, 40.0]]
    assert result["masks"].shape == (2, 40, 80)
    assert result["masks"][0, :20, :40].float().mean() > 0.9
    assert not result["masks"][0, 22:].any() and not result["masks"][1].any()


def test_post_processing_equals_stock(processor):
    outputs = make_output()
    stock = Sam3Processor(processor.image_processor, processor.tokenizer)
    (ours,) = processor.post_process_instance_segmentation(outputs, threshold=0.01, target_sizes=[(41, 83)])
    (theirs,) = stock.post_process_instance_segmentation(outputs, threshold=0.01, target_sizes=[(41, 83)])
    assert torch.equal(ours["scores"], theirs["scores"])
    assert torch.equal(ours["masks"].long(), theirs["masks"])


def test_post_processing_without_masks_says_why(processor):
    outputs = make_output()
    outputs.pred_masks = None
    with pytest.raises(ValueError, match="training step"):
        processor.post_process_instance_segmentation(outputs)
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        processor.post_process_instance_segmentation(make_output(), target_sizes=[(4, 4), (4, 4)])


def test_save_and_load(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Sam3LiteProcessor)
    first, second = (one(images=image, text="red cat") for one in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("phrase", "clean"),
    [
        ("dog’s “bowl”", 'dog\'s "bowl"'),
        ("ｆｕｌｌ　ｗｉｄｔｈ１", "full width1"),
        ("fish &amp; chips &amp;lt;3", "fish & chips <3"),
        ("cafÃ©", "café"),
        ("  Red\tCAR \n", "red car"),
        ("ΟΔΟΣ", "οδος"),
        ("ﬁne m²", "fine m²"),
    ],
)
def test_text_is_cleaned_as_for_sam3(phrase, clean):
    assert clean_phrase(phrase) == clean
    tokenizer = clip_tokenizer()
    first, second = (tokenize(tokenizer, [text])["input_ids"] for text in (phrase, clean))
    assert torch.equal(first, second)


def test_special_tokens_in_a_phrase_are_text_and_token_0_is_padding():
    tokens = tokenize(clip_tokenizer(), ["a <|endoftext|> b", "cat!;"])
    assert (tokens["input_ids"][0] == 49407).nonzero()[0].item() > 4
    zero = tokens["input_ids"][1] == 0
    assert zero.sum() == 1 and tokens["attention_mask"][1][zero].tolist() == [0]
    assert tokens["attention_mask"][1].nonzero().max() > zero.nonzero().max()  # and words go on behind it


@pytest.mark.parametrize("missing", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_its_tokenizer_is_an_error(config, tmp_path, missing):
    """Transformers would make an empty one, to which all phrases are the same."""
    Sam3LiteProcessor.from_config(config).save_pretrained(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(OSError, match="has no tokenizer: tokenizer.json is missing"):
        Sam3LiteProcessor.from_pretrained(tmp_path)
