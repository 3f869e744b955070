import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from test_conversion import native_file
from transformers import AutoModel, Sam3VideoModel
from video_cases import PHRASES, TRACKER, check_same, film, follow, lite_config, stock_video_model

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor, Sam3LiteVideoConfig, Sam3LiteVideoModel
from sam3_hf.checkpoints import NECK, TRACKER_NECK, LoadedTensors, VideoCheckpoint, from_tracker, open_checkpoint
from sam3_hf.mapping import map_checkpoint
from sam3_hf.mapping.calibration import calibrate_mapping, fit_tracker_neck
from sam3_hf.mapping.calibration.images import draw_images
from sam3_hf.mapping.video import of_parts
from sam3_hf.sharing.hub import push_folder

SMALLER = {"vision_hidden_size": 16, "vision_num_attention_heads": 1, "vision_intermediate_size": 74}


@pytest.fixture(scope="module")
def stock() -> Sam3VideoModel:
    return stock_video_model()


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("sam3_video")
    stock.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def same(folder) -> Sam3LiteVideoModel:
    """Not to be changed."""
    return Sam3LiteVideoModel.from_pretrained(folder, preset="same", summary_token=False)


@pytest.fixture(scope="module")
def followed(stock) -> list[dict]:
    return follow(stock)


@pytest.fixture(scope="module")
def smaller(folder) -> Sam3LiteVideoModel:
    """Mapped to half the width; not to be changed."""
    config = Sam3LiteVideoConfig(detector_config=lite_config(**SMALLER), tracker_config={**TRACKER, **tracker_sizes()})
    return Sam3LiteVideoModel.from_pretrained(folder, config=config)


def tracker_sizes() -> dict:
    return Sam3LiteVideoConfig(detector_config=lite_config(), tracker_config=None).tracker_config.to_dict() | TRACKER


def holds(model, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a model has these parameters, to the bit."""
    state = model.state_dict()
    return bool(expected) and all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def state_of(model, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(part)}


# --- equality ------------------------------------------------------------------------------------------------------


def test_every_output_equals_that_of_stock(same, followed):
    assert sum(len(frame["object_ids"]) for frame in followed) > 20 and followed[-1]["removed_obj_ids"]
    check_same(follow(same), followed)
    assert same.mapping_report.strategy == "copy"


def test_streaming_equals_stock(stock, same):
    expected = follow(stock, frames=3, streaming=True)
    check_same(follow(same, frames=3, streaming=True), expected)
    assert expected[-1]["object_ids"]


def test_what_a_phrase_finds_does_not_depend_on_the_others(same):
    together = follow(same, [*PHRASES, "tree"], frames=4)
    for phrase in PHRASES:
        alone = follow(same, [phrase], frames=4)
        for one, many in zip(alone, together, strict=True):
            masks = list(one["obj_id_to_mask"].values())
            others = [mask for obj, mask in many["obj_id_to_mask"].items() if many["phrases"][obj] == phrase]
            assert len(masks) == len(others) > 0
            # Logits go to 15. The memory of all objects is made at once: rounding goes by their number, in stock too.
            torch.testing.assert_close(masks, others, atol=2e-3, rtol=0)


def test_the_summary_token_reaches_the_detections(same):
    with_token = copy.deepcopy(same)
    with_token.config.detector_config.summary_token = True
    boxes = []
    for model in (with_token, same):
        processor = Sam3LiteProcessor.from_config(lite_config()).to_video()
        session = processor.init_video_session(video=film(1))
        processor.add_text_prompt(session, PHRASES)
        with torch.no_grad():
            vision = model.detector_model.get_vision_features(session.get_frame(0)[None])
            found = model.run_detection(session, vision)
            prompts = [session.prompt_input_ids[key] for key in found], list(session.prompt_attention_masks.values())
            said = model.detector_model(
                vision_embeds=vision, input_ids=torch.cat(prompts[0]), attention_mask=torch.cat(prompts[1])
            )
        scores = said.pred_logits.sigmoid() * said.presence_logits.sigmoid()
        for key, detections in found.items():
            chosen = scores[key] > model.score_threshold_detection
            torch.testing.assert_close(detections["mask"], said.pred_masks[key][chosen], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(detections["scores"], scores[key][chosen])
        boxes.append(said.pred_boxes)
    assert not torch.allclose(*boxes, atol=1e-4)


def test_a_session_without_phrases_is_an_error(same):
    processor = Sam3LiteProcessor.from_config(lite_config()).to_video()
    with pytest.raises(ValueError, match="add_text_prompt"):
        same(inference_session=processor.init_video_session(video=film(1)), frame_idx=0)


# --- mapping -------------------------------------------------------------------------------------------------------


def test_a_smaller_model_has_the_tracker_and_the_report_accounts_for_every_tensor(stock, smaller, folder):
    tracker = state_of(stock, "tracker_model.")
    assert len(tracker) == 255
    assert holds(smaller, tracker)
    report = smaller.mapping_report
    assert sum(row.tensors for row in report.rows if row.action != "dropped") == len(smaller.state_dict())
    stored = set(open_checkpoint(folder, tracker=True)) | set(open_checkpoint(folder, tracker=True).dropped)
    dropped = sum(row.tensors for row in report.rows if row.action == "dropped")
    assert len(stored) == len(stock.state_dict()) == len(smaller.state_dict()) + dropped
    actions = {row.group: row.action for row in report.rows}
    assert actions["tracker_neck.fpn_layers.0.proj1"] == "rotated"
    assert actions["tracker_neck.fpn_layers.3.proj1"] == "dropped" and "initialized" not in report.totals
    assert actions["tracker_model.memory_attention.layers.*.linear1"] == "copied"
    assert any(frame["object_ids"] for frame in follow(smaller, frames=3))


def test_the_pyramid_of_the_tracker_is_mapped_as_that_of_the_detector(same, smaller):
    twins = copy.deepcopy(same)
    twins.tracker_neck.load_state_dict(twins.detector_model.vision_encoder.neck.state_dict())
    checkpoint = VideoCheckpoint("twins", LoadedTensors(twins), twins.config, is_lite=True)
    shapes = of_parts({name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()})
    state, _ = map_checkpoint(checkpoint, smaller.config.detector_config, shapes)
    neck = {name: tensor for name, tensor in state.items() if name.startswith(f"{NECK}.")}
    assert len(neck) == 18
    assert all(torch.equal(state[name.replace(NECK, TRACKER_NECK)], tensor) for name, tensor in neck.items())


def test_preset_resolution_and_thresholds_can_be_set(folder):
    model = Sam3LiteVideoModel.from_pretrained(folder, preset="same", image_size=128, hotstart_delay=0)
    assert (model.config.image_size, model.tracker_model.image_size, model.low_res_mask_size) == (128, 128, 64)
    assert model.hotstart_delay == model.config.hotstart_delay == 0
    assert follow(model, frames=2)[1]["object_ids"]


def test_a_source_without_a_tracker_is_refused(saved):
    with pytest.raises(ValueError, match="has no tracker: start a video model from `facebook/sam3`"):
        Sam3LiteVideoModel.from_pretrained(saved)
    with pytest.raises(ValueError, match="has no tracker"):
        calibrate_mapping(saved, tracker=True)


# --- native files --------------------------------------------------------------------------------------------------


def native_names() -> dict[str, list[int]]:
    """Of the tracker in Meta's code (`build_tracker` of facebookresearch/sam3 at 99d02f2), with their shapes."""
    return json.loads((Path(__file__).parent / "fixtures" / "meta_tracker_names.json").read_text())


def test_every_native_name_of_the_tracker_is_known():
    with torch.device("meta"):
        config = Sam3LiteVideoConfig(detector_config=Sam3LiteConfig.from_preset("small"))
        expected = state_of(Sam3LiteVideoModel(config), "tracker_model.")
    found = {}
    for name, shape in native_names().items():
        for target, stored in from_tracker(f"tracker.{name}").items():
            found.setdefault(target, []).append(stored.shape(tuple(shape)))
    assert found.keys() == expected.keys()
    points = found.pop("tracker_model.prompt_encoder.point_embed.weight")
    assert points == [(1, 256)] * 4
    assert all(shapes == [tuple(expected[name].shape)] for name, shapes in found.items())


def test_a_native_file_with_a_tracker(tmp_path):
    detector = lite_config(
        text_num_attention_heads=1, vision_num_hidden_layers=4, vision_global_attn_indexes=[1, 3]
    )  # sizes that can be told from the tensors
    torch.manual_seed(0)
    expected = Sam3LiteVideoModel(Sam3LiteVideoConfig(detector_config=detector))
    state = native_file(expected.detector_model, "detector.")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("tracker.") and "sam2" not in name}
    own = expected.state_dict()
    for name in (f"tracker.{name}" for name in native_names()):
        for target, stored in from_tracker(name).items():
            part = slice(stored.part, stored.part + 1) if stored.form == "stacked" else slice(None)
            state[name] = own[target][part]
    convs = {
        "0.scale_layers.0": "0.dconv_2x2_0",
        "0.scale_layers.2": "0.dconv_2x2_1",
        "1.scale_layers.0": "1.dconv_2x2",
    }
    for name, tensor in expected.tracker_neck.fpn_layers.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        module = convs.get(module, module.replace("proj1", "conv_1x1").replace("proj2", "conv_3x3"))
        state[f"detector.backbone.vision_backbone.sam2_convs.{module}.{leaf}"] = tensor
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "sam3.pt")
    model = Sam3LiteVideoModel.from_pretrained(tmp_path / "sam3.pt", preset="same")
    tables = [
        f"tracker_model.{name}.positional_embedding"
        for name in ("shared_image_embedding", "prompt_encoder.shared_embedding")
    ]
    own[tables[0]] = own[tables[1]]  # one in Meta's code
    assert holds(model, own)
    assert set(model.mapping_report.totals) == {"copied", "dropped"}


# --- saving --------------------------------------------------------------------------------------------------------


def test_save_and_load(same, tmp_path):
    same.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(same.state_dict())
    assert (tmp_path / "mapping_report.json").is_file()
    loaded = Sam3LiteVideoModel.from_pretrained(tmp_path, hotstart_delay=0, max_num_objects=3)
    assert (loaded.hotstart_delay, loaded.max_num_objects) == (0, 3)
    for model in (loaded, AutoModel.from_pretrained(tmp_path)):
        assert type(model) is Sam3LiteVideoModel and not model.training
        assert holds(model, same.state_dict())
        assert model.config.to_dict()["tracker_config"] == same.config.to_dict()["tracker_config"]
    detector = Sam3LiteModel.from_pretrained(tmp_path)
    assert not detector.config.summary_token
    assert holds(detector, same.detector_model.state_dict())


# --- on the Hub ----------------------------------------------------------------------------------------------------


def test_a_video_model_is_pushed_with_processor_card_and_licence(hub, smaller, tmp_path, monkeypatch, capsys):
    smaller.push_to_hub("me/film", private=True)
    repository = hub.repositories["me/film"]
    files = repository.branches["main"][-1].files
    assert repository.private and hub.count("POST .*/commit/") == 1
    assert {name for name in files if not name.endswith(".py")} == {
        "LICENSE",
        "README.md",
        "config.json",
        "mapping_report.json",
        "model.safetensors",
        "processor_config.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = Sam3LiteVideoModel.from_pretrained("me/film")
    assert holds(loaded, smaller.state_dict())
    loaded.push_to_hub("me/again")
    again = hub.repositories["me/again"].branches["main"][-1].files
    assert again["LICENSE"] == files["LICENSE"] and again["tokenizer.json"] == files["tokenizer.json"]
    (snippet,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.S)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(film(2)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    first, second = (line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert (first[0], second[0]) == ("0", "1") and "red blood cell" in first[1]


def test_the_card_of_a_video_model_says_what_it_is_made_of(hub, smaller, folder, tmp_path):
    smaller.save_pretrained(tmp_path)
    push_folder(tmp_path, "me/film")
    text = hub.repositories["me/film"].branches["main"][-1].files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license_name == "sam-license" and "sam3_lite_video" in card.data.tags
    tracker = sum(value.numel() for name, value in smaller.state_dict().items() if name.startswith("tracker_"))
    assert f"| parameters | {smaller.num_parameters() / 1e6:.1f}M" in text
    assert f"| tracker | {tracker / 1e6:.1f}M of the parameters |" in text
    words = smaller.detector_model.text_encoder.num_parameters()
    assert f"{(smaller.num_parameters() - words) / 1e6:.1f}M of them beside the text encoder" in text
    assert f"They started from `{folder.name}`" in text and "`isometry`, without data" in text
    for action, total in json.loads(smaller.mapping_report.to_json())["totals"].items():
        assert f"| {total['tensors']} ({total['parameters'] / 1e6:.2f}M parameters) | {action} |" in text
    assert "Sam3LiteModel" not in text and str(folder.parent) not in text


def test_the_base_of_a_video_model_from_the_hub_is_named(hub, smaller):
    model = copy.deepcopy(smaller)
    model.mapping_report = replace(model.mapping_report, source="facebook/sam3")
    model.push_to_hub("me/film", processor=Sam3LiteProcessor.from_config(lite_config()).to_video())
    card = ModelCard(hub.repositories["me/film"].branches["main"][-1].files["README.md"].decode())
    assert card.data.base_model == "facebook/sam3"


# --- another detector ----------------------------------------------------------------------------------------------


def test_a_fine_tuned_detector_can_be_put_into_a_video_model(smaller, caplog):
    model, tuned = copy.deepcopy(smaller), copy.deepcopy(smaller.detector_model)
    with torch.no_grad():
        tuned.detr_decoder.query_embed.weight += 1
    assert model.replace_detector(tuned) is model
    assert model.detector_model is tuned and model.config.detector_config is tuned.config
    assert not [record for record in caplog.records if "pyramid" in record.message]
    first, second = follow(model, frames=2), follow(smaller, frames=2)
    assert first[0]["obj_id_to_score"] != second[0]["obj_id_to_score"]
    with torch.no_grad():
        for parameter in (moved := copy.deepcopy(tuned)).vision_encoder.parameters():
            parameter *= 1.1
    model.replace_detector(moved)
    assert "differs by 10.0% from the one that the tracker's pyramid was made for" in caplog.text


def test_a_replaced_detector_brings_its_resolution_and_vocabulary(smaller, tmp_path):
    model, tuned = copy.deepcopy(smaller), copy.deepcopy(smaller.detector_model)
    larger = Sam3LiteModel(tuned.config.changed(image_size=128))
    larger.load_state_dict(tuned.state_dict())
    larger.freeze_vocabulary(PHRASES, Sam3LiteProcessor.from_config(tuned.config))
    model.replace_detector(larger.eval())
    assert (model.config.image_size, model.tracker_model.image_size) == (128, 128)
    outputs = follow(model, frames=1)
    model.save_pretrained(tmp_path)
    check_same(follow(Sam3LiteVideoModel.from_pretrained(tmp_path), frames=1), outputs)


def test_a_detector_that_does_not_fit_is_refused(smaller):
    model = copy.deepcopy(smaller)
    with pytest.raises(ValueError, match=r"ViT of the detector \(32 x 2\) has other sizes .* \(16 x 2\)"):
        model.replace_detector(Sam3LiteModel(lite_config()))
    boxes_only = Sam3LiteModel(lite_config(**SMALLER, mask_supervision=False))
    with pytest.raises(ValueError, match="trained on boxes alone"):
        model.replace_detector(boxes_only)


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="more than the 64 of its memory"):
        Sam3LiteVideoConfig.from_preset("tiny")
    with pytest.raises(ValueError, match="`tracker_config.prompt_encoder_config.image_size` is 1008"):
        Sam3LiteVideoConfig(detector_config=lite_config(), tracker_config={})


# --- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_fits_the_pyramid_of_the_tracker(same, smaller):
    teacher, pictures = same, draw_images(16, 64, seed=5)
    model = calibrate_mapping(teacher, pictures, config=smaller.config, prompts=PHRASES, search_depth=False)
    assert type(model) is Sam3LiteVideoModel
    actions = {row.group: row.action for row in model.mapping_report.rows}
    assert actions["tracker_neck.fpn_layers.1.proj1"] == actions["vision_encoder.neck.fpn_layers.1.proj1"] == "refit"
    assert actions["tracker_neck.fpn_layers.1.proj2"] == actions["tracker_model.mask_downsample"] == "copied"
    assert sum(row.tensors for row in model.mapping_report.rows if row.action != "dropped") == len(model.state_dict())
    assert holds(model, state_of(teacher, "tracker_model."))
    others = draw_images(4, 64, seed=6)
    assert distance(model, teacher, others) < distance(smaller, teacher, others)


@torch.no_grad()
def distance(model, teacher, pictures) -> float:
    """Of the pyramids of two trackers, relative."""
    pixels = Sam3LiteProcessor.from_config(lite_config())(images=pictures)["pixel_values"]
    levels = []
    for side in (model, teacher):
        tokens = side.detector_model.vision_encoder.backbone(pixels).last_hidden_state
        levels.append(side.tracker_neck(tokens.transpose(1, 2).unflatten(2, (8, 8)))[0][:3])
    return sum(((a - b).norm() / b.norm()).item() for a, b in zip(*levels, strict=True))


def test_the_pyramid_can_be_fitted_after_the_vit_moved(smaller):
    moved = copy.deepcopy(smaller)
    with torch.no_grad():
        for parameter in moved.detector_model.vision_encoder.backbone.layers.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    pictures = draw_images(4, 64, seed=6)
    before = distance(moved, smaller, pictures)
    cosines = fit_tracker_neck(moved, smaller, draw_images(24, 64, seed=5))
    assert len(cosines) == 3 and all(0 < cosine <= 1 for cosine in cosines)
    assert distance(moved, smaller, pictures) < before
    with pytest.raises(ValueError, match="`image_size` of the model is 64, of the teacher 128"):
        fit_tracker_neck(moved, Sam3LiteVideoModel(larger_config(smaller.config)), pictures)


def larger_config(config: Sam3LiteVideoConfig) -> Sam3LiteVideoConfig:
    return config.with_detector(config.detector_config.changed(image_size=128))
