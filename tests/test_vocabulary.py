"""A fixed vocabulary in the place of the text encoder: the same outputs, everywhere that a full model goes."""

import copy
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_labels, micro_config, shake
from test_modeling import PREDICTIONS, largest_difference, load_in_a_new_process
from test_train_run import train
from transformers import AutoModel
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor, vocabulary_sam3_lite
from sam3_hf.checkpoints import open_checkpoint
from sam3_hf.cli import app
from sam3_hf.data.generated import write_dataset
from sam3_hf.sharing.model_card import RANDOM_WEIGHTS
from sam3_hf.training.export import export_final
from sam3_hf.training.phrases import TokenizedText, build_text
from sam3_hf.vocabulary_sam3_lite import encode_phrases, phrase_features

CLASSES = ["red blood cell", "cat", "a long phrase of many words"]


@pytest.fixture
def processor(config) -> Sam3LiteProcessor:
    return Sam3LiteProcessor.from_config(config)


@pytest.fixture
def frozen(model, processor) -> Sam3LiteModel:
    return copy.deepcopy(model).freeze_vocabulary(CLASSES, processor)


@pytest.fixture
def images() -> list:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8) for _ in range(2)]


def ask(processor, images, **prompts) -> dict:
    return dict(processor(images=images, **prompts))


@torch.no_grad()
def test_outputs_are_those_of_the_full_model(model, frozen, processor, images):
    inputs = ask(processor, images, text=[["cat", CLASSES[2]], ["red blood cell", "Cat"]])
    expected = model(**inputs)
    assert largest_difference(frozen(**inputs), expected) <= 1e-5
    other_words = model(**ask(processor, images, text=[["dog", "dog"], ["dog", "dog"]]))
    assert largest_difference(other_words, expected, ["pred_logits"]) > 1e-3  # what is asked for matters


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["32", "as many as the longest", "40", "one prompt without padding", "other pads"])
def test_padding_does_not_matter(model, frozen, processor, images, tokens):
    inputs = ask(processor, images[:1], text=[["cat", CLASSES[2]]])
    expected = model(**inputs)
    if tokens == "as many as the longest":
        length = int(inputs["attention_mask"].sum(dim=1).max())
        inputs["input_ids"] = inputs["input_ids"][:, :length]
        inputs["attention_mask"] = inputs["attention_mask"][:, :length]
    elif tokens == "40":
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 8))
    elif tokens == "one prompt without padding":
        length = int(inputs["attention_mask"][1].sum())
        del inputs["attention_mask"], inputs["image_index"]
        inputs["input_ids"] = inputs["input_ids"][1:, :length]
        expected = type(expected)(**{name: expected[name][1:] for name in PREDICTIONS})
    elif tokens == "other pads":
        inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
    assert largest_difference(frozen(**inputs), expected) <= 1e-5


@torch.no_grad()
def test_boxes_alone_and_with_text(model, frozen, processor, images):
    inputs = ask(
        processor,
        images,
        text=["cat", None],
        input_boxes=[[[5, 5, 30, 30], [1, 1, 9, 9]], [[10, 3, 40, 20]]],
        input_boxes_labels=[[1, 0], [1]],
    )
    expected = model(**inputs)
    assert largest_difference(frozen(**inputs), expected) <= 1e-5
    without_boxes = {name: value for name, value in inputs.items() if "boxes" not in name}
    assert largest_difference(model(**without_boxes), expected, ["pred_logits"]) > 1e-3


@torch.no_grad()
def test_features_once_encoded_serve_as_text_embeds(model, frozen, processor, images):
    tokens = processor(text=["cat", CLASSES[0]])
    vision = frozen.get_vision_features(processor(images=images)["pixel_values"])
    features = [either.get_text_features(**tokens).pooler_output for either in (model, frozen)]
    assert features[0].shape == features[1].shape
    outputs = [
        frozen(vision_embeds=vision, text_embeds=each, attention_mask=tokens["attention_mask"]) for each in features
    ]
    assert largest_difference(*outputs) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_every_class_of_every_image_in_one_call(model, frozen, processor, images, chunk, monkeypatch):
    sizes = []
    detect = frozen.detect
    monkeypatch.setattr(frozen, "detect", lambda *args: sizes.append(len(args[1])) or detect(*args))
    everything = frozen(**ask(processor, images), prompt_chunk_size=chunk)
    assert max(sizes) == (chunk or 6) and sum(sizes) == 6
    asked = ask(processor, images, text=[CLASSES, CLASSES])
    assert largest_difference(everything, model(**asked)) <= 1e-5
    by_id = frozen(
        pixel_values=asked["pixel_values"],
        class_ids=torch.tensor([0, 1, 2, 0, 1, 2]),
        image_index=asked["image_index"],
    )
    assert largest_difference(everything, by_id) <= 1e-5


@torch.no_grad()
def test_class_ids_with_boxes_and_for_all_images(model, frozen, processor, images):
    inputs = ask(processor, images, text="cat", input_boxes=[[[5, 5, 30, 30]], [[10, 3, 40, 20]]])
    expected = model(**inputs)
    del inputs["input_ids"], inputs["attention_mask"]
    assert largest_difference(frozen(**inputs, class_ids=torch.tensor([1])), expected) <= 1e-5


def test_unknown_words_are_an_error_that_lists_the_known(frozen, processor, images):
    known = "'red blood cell', 'cat', 'a long phrase of many words'"
    with pytest.raises(
        ValueError, match=f"^'Dog', 'cat  cat': not in the vocabulary of this model, which is: {known}"
    ):
        frozen(**ask(processor, images, text=[["cat", "Dog"], ["cat", "cat  cat"]]))
    with pytest.raises(ValueError, match=f"^prompt 1: not in the vocabulary of this model, which is: {known}"):
        others = torch.tensor([[510, 7, 7, 9, 511]])  # which no words were turned into
        known_ids = processor(text="cat")["input_ids"][:, :5]
        mask = processor(text="cat")["attention_mask"][:, :5]
        frozen.get_text_features(torch.cat([known_ids, others]), torch.cat([mask, torch.ones_like(mask)]))
    prefix = processor(text=["red blood cell"])
    prefix["attention_mask"][:, 2:] = 0
    with pytest.raises(ValueError, match="'red blood cell'"):
        frozen.get_text_features(**prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_ids": torch.tensor([0, 3])}, r"0 to 2.*\[0, 3\].*'cat'"),
        ({"class_ids": torch.tensor([-1])}, "0 to 2"),
        ({"class_ids": torch.tensor([[0]])}, "num_prompts"),
        ({"class_ids": torch.tensor([0.0])}, "float32"),
        ({"class_ids": torch.tensor([0]), "text_embeds": torch.zeros(1, 4, 64)}, "exactly one"),
        ({"image_index": torch.tensor([0])}, "every class"),
        ({"input_boxes": torch.full((1, 1, 4), 0.4)}, "'visual'"),
    ],
)
def test_wrong_inputs_are_named(frozen, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        frozen(pixel_values=inputs["pixel_values"], **change)


def test_full_models_take_no_ids(model, inputs):
    with pytest.raises(ValueError, match="freeze_vocabulary"):
        model(pixel_values=inputs["pixel_values"], class_ids=torch.tensor([0]))


@pytest.mark.parametrize("classes", [[], "cat", ["cat", " "], ["cat", "dog", "cat"], [1]])
def test_wrong_classes_are_named_and_change_nothing(model, processor, classes):
    with pytest.raises(ValueError, match="`vocabulary`"):
        model.freeze_vocabulary(classes, processor)
    assert model.text_encoder is not None and model.config.vocabulary is None


@torch.no_grad()
def test_a_vocabulary_can_be_narrowed_but_not_widened(frozen, processor, images):
    expected = frozen(**ask(processor, images, text="cat"))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        frozen.freeze_vocabulary(["dog"], processor)
    frozen.freeze_vocabulary(["cat", "red blood cell"], processor)
    assert frozen.config.vocabulary == ["cat", "red blood cell"]
    assert largest_difference(frozen(**ask(processor, images, text="cat")), expected) == 0


def test_a_class_may_be_called_visual(model, processor):
    model.freeze_vocabulary(["visual", "cat"], processor)
    assert len(model.vocabulary.features) == 2


@torch.no_grad()
def test_many_phrases_are_encoded_a_few_at_a_time(model, processor, monkeypatch):
    tokens = dict(processor(text=[f"phrase {i}" for i in range(5)]))
    expected = model.get_text_features(**tokens).pooler_output
    sizes, encode = [], model.get_text_features

    def counted(input_ids, attention_mask):
        sizes.append(len(input_ids))
        return encode(input_ids, attention_mask)

    monkeypatch.setattr(model, "get_text_features", counted)
    monkeypatch.setattr(vocabulary_sam3_lite, "PHRASES_AT_ONCE", 2)
    torch.testing.assert_close(encode_phrases(model, **tokens), expected)
    assert sizes == [2, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
def test_features_of_phrases_are_those_of_the_text_encoder(model, processor, padded):
    phrases = ["cat", "a small dog"]
    features, mask = phrase_features(model, processor, phrases, padded=padded)
    tokens = processor(text=phrases)
    longest = 32 if padded else int(tokens["attention_mask"].sum(1).max())
    assert torch.equal(mask, tokens["attention_mask"][:, :longest]) and features.shape[1] == longest
    expected = model.get_text_features(**tokens).pooler_output[:, :longest]
    torch.testing.assert_close(features[mask.bool()], expected[mask.bool()])
    model.freeze_vocabulary(phrases, processor)
    torch.testing.assert_close(
        phrase_features(model, processor, phrases)[0][:, :longest][mask.bool()], features[mask.bool()]
    )
    with pytest.raises(ValueError, match="'horse'"):
        phrase_features(model, processor, ["cat", "horse"])


def test_what_is_left_of_the_model(model, frozen):
    names, parts = set(model.state_dict()), ("text_encoder.", "text_projection.")
    added = {"vocabulary.features", "vocabulary.input_ids", "vocabulary.attention_mask"}
    assert set(frozen.state_dict()) == {name for name in names if not name.startswith(parts)} | added
    assert not any(name.startswith("vocabulary") for name, _ in frozen.named_parameters())  # nothing trains it


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_loaded(frozen, processor, images, tmp_path, dtype):
    expected = frozen.to(dtype).state_dict()
    frozen.save_pretrained(tmp_path)
    loaded, info = Sam3LiteModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == dtype and loaded.config.vocabulary == CLASSES
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.vocabulary.input_ids.dtype == torch.long
    inputs = ask(Sam3LiteProcessor.from_config(loaded.config), images, text="cat")
    outputs = [model.float()(**inputs) for model in (loaded, frozen)]
    assert largest_difference(*outputs) <= 5e-5  # rotary tables went through half precision in one of them
    assert isinstance(AutoModel.from_pretrained(tmp_path), Sam3LiteModel)
    other = Sam3LiteModel.from_pretrained(tmp_path, image_size=128, dtype=torch.float32)
    assert other.config.vocabulary == CLASSES and other.config.image_size == 128


def test_a_vocabulary_is_not_made_by_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="freeze_vocabulary"):
        Sam3LiteModel.from_pretrained(tmp_path, vocabulary=["cat"])
    with pytest.raises(ValueError, match="freeze_vocabulary"):
        Sam3LiteModel.from_pretrained(tmp_path, config=micro_config(vocabulary=["cat"]))


def test_a_saved_folder_loads_in_a_new_process(frozen, processor, images, tmp_path):
    frozen.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = ask(processor, images, text=[["cat"], ["red blood cell", CLASSES[2]]])
    with torch.no_grad():
        outputs = frozen(**inputs)
    torch.save({"inputs": inputs, "outputs": {name: outputs[name] for name in PREDICTIONS}}, tmp_path / "expected.pt")
    load_in_a_new_process(tmp_path)


def test_training_moves_all_but_the_vocabulary(frozen, processor, images):
    inputs = ask(processor, [*images, images[0]], text=["cat", CLASSES[0], CLASSES[2]])
    before = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.SGD(frozen.parameters(), lr=1e-3)
    loss = frozen.train()(**inputs, labels=make_labels()).loss
    loss.backward()
    assert [name for name, p in frozen.named_parameters() if p.grad is None] == []
    optimizer.step()
    moved = {name for name, tensor in frozen.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "detr_decoder.query_embed.weight" in moved and not any(name.startswith("vocabulary") for name in moved)


@torch.no_grad()
def test_compiled(frozen, processor, images):
    inputs = ask(processor, images, text=[CLASSES, ["cat"]])
    expected = frozen(**inputs)
    frozen.compile(backend="eager")
    assert largest_difference(frozen(**inputs), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, frozen, processor, images, dtype):
    inputs = ask(processor, images, text="cat")
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=dtype):
        autocast = frozen(**inputs)
    pure = frozen.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    tolerance = 20 * torch.finfo(dtype).eps
    for name in PREDICTIONS:
        scale = exact[name].abs().max()
        assert (autocast[name].float() - exact[name]).abs().max() < tolerance * scale, name
        assert (pure[name].float() - exact[name]).abs().max() < tolerance * scale, name


def test_the_stock_class_has_no_place_for_it(frozen):
    with pytest.raises(ValueError, match="restore_text_encoder"):
        frozen.to_sam3()


def test_conversion_to_half_and_to_a_smaller_model(processor, tmp_path):
    torch.manual_seed(0)
    standard = shake(Sam3LiteModel(Sam3LiteConfig.from_preset("tiny-standard", image_size=64)))
    standard.freeze_vocabulary(CLASSES, processor).save_pretrained(tmp_path / "standard")
    for target, flags in (("half", ["--dtype", "float16"]), ("small", ["--preset", "tiny", "--image-size", "64"])):
        result = CliRunner().invoke(app, ["convert", str(tmp_path / "standard"), str(tmp_path / target), *flags])
        assert result.exit_code == 0, result.output
        converted = Sam3LiteModel.from_pretrained(tmp_path / target)
        assert converted.config.vocabulary == CLASSES
        assert torch.equal(converted.vocabulary.input_ids, standard.vocabulary.input_ids)
        assert torch.equal(converted.vocabulary.features, standard.vocabulary.features.to(converted.dtype))
    assert converted.config.vision_config.backbone_config.hidden_size == 96
    with pytest.raises(ValueError, match="restore_text_encoder"):
        Sam3LiteModel.from_pretrained(tmp_path / "standard", config=Sam3LiteConfig.from_preset("tiny", image_size=64))
    assert "vocabulary.features" in open_checkpoint(tmp_path / "small")


@torch.no_grad()
@pytest.mark.parametrize("source", ["lite folder", "standard folder"])
def test_the_encoder_comes_back(model, frozen, processor, images, tmp_path, source):
    (model if source == "lite folder" else model.to_sam3()).save_pretrained(tmp_path / "full")
    frozen.save_pretrained(tmp_path / "frozen")
    restored = Sam3LiteModel.from_pretrained(tmp_path / "frozen").restore_text_encoder(tmp_path / "full")
    inputs = ask(processor, images, text=[["a dog", "cat"], ["something else"]])
    assert largest_difference(restored(**inputs), model(**inputs)) <= 1e-6
    assert restored.config.vocabulary is None and not restored.training
    restored.save_pretrained(tmp_path / "restored")
    assert largest_difference(Sam3LiteModel.from_pretrained(tmp_path / "restored")(**inputs), model(**inputs)) <= 1e-6
    with pytest.raises(ValueError, match="nothing to restore"):
        restored.restore_text_encoder(tmp_path / "full")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_encoder_comes_back_to_a_half_precision_model(model, frozen, tmp_path, dtype):
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    restored = frozen.to(dtype).restore_text_encoder(tmp_path)
    assert {p.dtype for p in restored.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("another encoder", "not the one"),
        ("frozen too", "no text encoder either"),
        ("wider detector", "128 channels.*64"),
        ("another tokenizer", "2000 tokens.*1024"),
        ("incomplete", "lacks `?text_encoder"),
    ],
)
def test_only_the_right_encoder_comes_back(model, frozen, tmp_path, source, message):
    if source == "frozen too":
        frozen.save_pretrained(tmp_path)
    elif source == "incomplete":
        state = model.state_dict()
        state.pop("text_encoder.text_model.final_layer_norm.bias")
        model.save_pretrained(tmp_path, state_dict=state)
    else:
        sizes = {"hidden_size": 128}
        wide = {name: sizes for name in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")}
        changes = {
            "another encoder": {},
            "wider detector": {
                "vision_config": {"backbone_config": {"pretrain_image_size": 32}, "fpn_hidden_size": 128},
                **{f"{name}_config": size for name, size in wide.items()},
            },
            "another tokenizer": {"text_config": {"vocab_size": 2000}},
        }
        torch.manual_seed(1)
        shake(Sam3LiteModel(micro_config(**changes[source])), seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        frozen.restore_text_encoder(tmp_path)
    assert frozen.text_encoder is None and frozen.config.vocabulary == CLASSES


def test_nothing_to_restore_from(frozen, tmp_path):
    with pytest.raises(OSError, match="neither"):
        frozen.restore_text_encoder(tmp_path)


@pytest.mark.parametrize(("preset", "megabytes"), [("lite", 450), ("small", 180)])
def test_size_with_twenty_classes(preset, megabytes):
    """In FP16, without allocating it."""
    config = Sam3LiteConfig.from_preset(preset, vocabulary=[f"class {i}" for i in range(20)])
    with torch.device("meta"):
        model = Sam3LiteModel(config).half()
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6 <= megabytes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=4, num_valid=2, image_size=64, num_concepts=3)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """One run, exported with its text encoder to `full` and with a vocabulary to `run/final`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "map.yaml").write_text("blue circle: round thing\n")
    finished = train(folder, data, category_map="map.yaml", **SHORT)
    assert finished.returncode == 0, finished.stdout
    (folder / "run" / "final").rename(folder / "full")
    finished = train(folder, data, "--freeze_vocabulary", "true", "--resume", "auto", category_map="map.yaml", **SHORT)
    assert finished.returncode == 0, finished.stdout
    return folder


SHORT = {"epochs": 1, "batch_size": 4, "prediction_images": 1}
TRAINED = ["red circle", "round thing", "red square"]


@torch.no_grad()
def test_training_exports_a_vocabulary(runs, images):
    final = Sam3LiteModel.from_pretrained(runs / "run" / "final")
    assert final.dtype == torch.float16
    assert sorted(final.config.vocabulary) == sorted(TRAINED)
    full = Sam3LiteModel.from_pretrained(runs / "full", dtype=torch.float32)
    rounded = final.vocabulary.features
    final = final.float()
    processor = Sam3LiteProcessor.from_pretrained(runs / "run" / "final")
    inputs = ask(processor, images, text=[TRAINED, ["red square"]])
    difference = largest_difference(final(**inputs), full(**inputs), ["pred_logits", "pred_boxes", "pred_masks"])
    assert difference <= 1e-2  # the features were rounded to half precision once, and those of `full` never
    full.freeze_vocabulary(final.config.vocabulary, processor)
    assert torch.allclose(full.vocabulary.features, rounded.float(), rtol=2e-3, atol=2e-3)
    final.restore_text_encoder(runs / "full")
    assert final.get_text_features(**processor(text="a dog")).pooler_output.isfinite().all()


@pytest.mark.slow
def test_training_goes_on_from_a_vocabulary(runs, data, tmp_path):
    init = runs / "run" / "final"
    (tmp_path / "map.yaml").write_text("blue circle: round thing\n")
    flags = ["--init", str(init), "--category_map", "map.yaml"]
    settings = {**SHORT, "model_overrides": {}, "box_prompt_probability": 0.9}
    finished = train(tmp_path, data, *flags, max_steps=1, **settings)
    assert finished.returncode == 0, finished.stdout
    finished = train(tmp_path, data, *flags, "--resume", "auto", max_steps=2, **settings)
    assert finished.returncode == 0 and "step 1" in finished.stdout, finished.stdout
    before, after = (Sam3LiteModel.from_pretrained(path) for path in (init, tmp_path / "run" / "final"))
    assert before.config.vocabulary == after.config.vocabulary
    assert torch.equal(before.vocabulary.features, after.vocabulary.features)
    moved = before.detr_decoder.box_head.layer1.weight != after.detr_decoder.box_head.layer1.weight
    assert moved.any()


@pytest.mark.parametrize(
    ("concepts", "train_text_encoder", "message"),
    [
        (["cat", "blue circle"], False, "'blue circle': not in the fixed"),
        (["cat"], True, "no text encoder to train"),
    ],
)
def test_training_needs_every_phrase_and_something_to_train(
    frozen, processor, tmp_path, concepts, train_text_encoder, message
):
    arguments = SimpleNamespace(
        model=SimpleNamespace(train_text_encoder=train_text_encoder), output=SimpleNamespace(output_dir=str(tmp_path))
    )
    with pytest.raises(ValueError, match=message):
        build_text(Accelerator(cpu=True), arguments, frozen, processor, concepts)


@torch.no_grad()
def test_a_trained_text_encoder_is_what_the_vocabulary_is_made_with(model, processor, images, tmp_path):
    text, provenance = TokenizedText(processor), {"origin": asdict(RANDOM_WEIGHTS), "versions": {}, "best": None}
    for name, vocabulary in (("full", None), ("frozen", CLASSES)):
        export_final(Accelerator(cpu=True), model, processor, text, tmp_path / name, provenance, vocabulary)
    assert model.config.vocabulary is None and model.dtype == torch.float32
    full, frozen = (Sam3LiteModel.from_pretrained(tmp_path / name / "final").float() for name in ("full", "frozen"))
    inputs = ask(processor, images, text=[["cat", CLASSES[2]], [CLASSES[0]]])
    exact = model(**inputs)
    for name in PREDICTIONS:
        rounding = (full(**inputs)[name] - exact[name]).abs().max()
        assert 0 < (frozen(**inputs)[name] - exact[name]).abs().max() < 2 * rounding, name
