"""Models with a text encoder of SAM3-LiteText: fixed vocabulary, training, without the package, info, cards."""

import copy
import json

import pytest
import torch
from conftest import largest_difference, micro_config, run
from huggingface_hub import ModelCard
from test_text_encoders import KINDS, PHRASES, lite_text_model
from test_text_sources import same_text
from train_cases import state_of, train

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data.generated import write_dataset
from sam3_hf.prediction.pipeline import Sam3LitePipeline
from sam3_hf.sharing.info import model_info
from sam3_hf.training.arguments import ModelArguments, parse_arguments
from sam3_hf.training.phrases import build_text


@pytest.fixture(params=KINDS)
def model(request) -> Sam3LiteModel:
    return lite_text_model(request.param)


@pytest.fixture
def processor(model) -> Sam3LiteProcessor:
    return Sam3LiteProcessor.from_config(model.config)


def ask(processor, phrases: list[str]) -> dict:
    tokens = processor(text=phrases)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@torch.no_grad()
def test_a_fixed_vocabulary_and_back(model, processor, tmp_path):
    inputs = ask(processor, PHRASES[:2])
    model.save_pretrained(tmp_path / "full")
    frozen = copy.deepcopy(model).train().freeze_vocabulary(PHRASES[:2], processor).eval()
    assert frozen.vocabulary.features.shape == (3, 16, 64)
    frozen.save_pretrained(tmp_path / "frozen")
    loaded = Sam3LiteModel.from_pretrained(tmp_path / "frozen")
    for other in (frozen, loaded, loaded.restore_text_encoder(tmp_path / "full")):
        assert largest_difference(other(**inputs), model(**inputs)) < 1e-5
    by_id = {"pixel_values": inputs["pixel_values"], "class_ids": torch.tensor([0, 1])}
    assert largest_difference(frozen(**by_id), model(**inputs)) < 1e-5
    assert same_text(loaded, model)


@torch.no_grad()
def test_half_precision(model, processor, tmp_path):
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    loaded = Sam3LiteModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    inputs = ask(processor, PHRASES[:2])
    assert largest_difference(loaded.float()(**inputs), model(**inputs)) < 0.05


def test_info_and_cards_name_the_text_encoder(processor, model, tmp_path):
    model.save_pretrained(tmp_path / "own")
    facts = model_info(tmp_path / "own")
    counted = sum(
        tensor.numel()
        for name, tensor in model.state_dict().items()
        if name.startswith(("text_encoder.", "text_proj"))
    )
    text = facts["parts"]["text encoder"]
    assert text["parameters"] == counted and text["flops"] > 0 and facts["preset"] is None
    preset = Sam3LiteModel(Sam3LiteConfig.from_preset("tiny", text="s1"))
    preset.save_pretrained(tmp_path / "tiny")
    Sam3LiteProcessor.from_config(preset.config).save_pretrained(tmp_path / "tiny")
    assert "tiny with text encoder s1, fp32" in run("info", tmp_path / "tiny").output
    result = run("convert", tmp_path / "tiny", tmp_path / "again")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "again/README.md").text
    assert "| preset | `tiny` with text encoder `s1` |" in card and "a phrase of up to 16 tokens" in card


ALIKE = ["a photo of a very small and quite dirty old grey and white street cat" + end for end in (" left", " right")]


def test_phrases_that_are_one_to_the_model_are_named(caplog):
    model = lite_text_model("s1")
    processor = Sam3LiteProcessor.from_config(model.config)
    pipe = Sam3LitePipeline(model, processor)
    for _ in range(2):
        text = pipe.text_features([ALIKE[0], "cat", ALIKE[1]])
    assert torch.equal(text[ALIKE[0]][0], text[ALIKE[1]][0])
    said = f"{ALIKE[0]!r}, {ALIKE[1]!r}: one phrase to the model, which makes letters small and reads 16 tokens"
    assert caplog.text.count(said) == 1 and "'cat'," not in caplog.text
    model.freeze_vocabulary(["Dog", "cat", "dog", "visual"], processor)
    assert "'Dog', 'dog': one phrase to the model" in caplog.text and "'visual'" not in caplog.text


def test_categories_that_are_one_to_a_text_encoder_that_trains_are_named(caplog):
    model = lite_text_model("s0")
    arguments = parse_arguments(["--data", "x", "--train_text_encoder", "true"])
    words = [phrase.upper() for phrase in ALIKE]
    build_text(None, arguments, model, Sam3LiteProcessor.from_config(model.config), ["cat", *words, "cat"])
    assert f"{words[0]!r}, {words[1]!r}: one phrase to the model" in caplog.text and "'cat'" not in caplog.text


def test_words_in_training_need_a_model_to_join():
    with pytest.raises(ValueError, match="text_encoder takes the place.*--init"):
        ModelArguments(text_encoder="somewhere")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=4, num_valid=2, image_size=64, num_concepts=2)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A model with CLIP's text encoder, saved; and one with a text encoder of SAM3-LiteText, as Transformers does."""
    folder = tmp_path_factory.mktemp("sources")
    words = lite_text_model("s0")
    words.to_sam3().save_pretrained(folder / "words")
    Sam3LiteModel(micro_config()).save_pretrained(folder / "eyes")
    return folder


@pytest.mark.parametrize("train_text", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_and_resume(eyes, data, tmp_path, train_text):
    settings = {"model_overrides": {}, "num_workers": 0, "epochs": 2, "batch_size": 2, "save_every_steps": 1}
    settings |= {"init": str(eyes / "eyes"), "text_encoder": str(eyes / "words"), "train_text_encoder": train_text}
    for steps, flags in ((1, []), (2, ["--resume", "auto"])):
        finished = train(tmp_path, data, *flags, max_steps=steps, **settings)
        assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "run"
    assert state_of(folder / "checkpoints/last")["step"] == 2
    report = json.loads((folder / "mapping_report.json").read_text())
    assert report["text_source"] == str(eyes / "words")
    final = Sam3LiteModel.from_pretrained(folder / "final", dtype=torch.float32)
    words = Sam3LiteModel.from_pretrained(eyes / "words", preset="same")
    rounded = words.half().float()
    assert same_text(final, rounded) is not train_text
    for name, buffer in final.text_encoder.named_buffers():
        assert torch.equal(buffer, rounded.text_encoder.get_buffer(name)), name
    assert Sam3LiteProcessor.from_pretrained(folder / "final")(text="cat")["input_ids"].shape == (1, 16)
