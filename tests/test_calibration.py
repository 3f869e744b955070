import copy

import numpy as np
import pytest
import torch
from conftest import micro_config, shake, with_padding_box
from PIL import Image
from torch import nn
from transformers import Sam3Model

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.checkpoints import Checkpoint, LoadedTensors
from sam3_hf.mapping import map_checkpoint
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.mapping.calibration.images import draw_images, load_pixels
from sam3_hf.mapping.calibration.vision import embed, layer_runner, measure_vision, pyramid_cosines
from sam3_hf.mapping.depth import search_layers
from sam3_hf.mapping.least_squares import LeastSquares
from sam3_hf.mapping.refit import VIT_SITES, observe

TEACHER = {
    "vision_hidden_size": 64,
    "vision_num_attention_heads": 4,
    "vision_intermediate_size": 296,
    "vision_num_hidden_layers": 5,
    "vision_global_attn_indexes": [2, 4],
    "detr_encoder_layers": 3,
    "detr_decoder_layers": 3,
}
STUDENT = {
    "vision_hidden_size": 48,
    "vision_num_attention_heads": 3,
    "vision_intermediate_size": 222,
    "vision_num_hidden_layers": 4,
    "vision_global_attn_indexes": [1, 3],
}
PROMPTS = ["cat", "red car", "a very small house", "tree"]


@pytest.fixture(scope="module")
def teacher() -> Sam3LiteModel:
    torch.manual_seed(0)
    return shake(Sam3LiteModel(micro_config(**TEACHER))).eval()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return draw_images(24, 64, seed=5)


@pytest.fixture(scope="module")
def calibrated(teacher, pictures) -> Sam3LiteModel:
    return calibrate_mapping(teacher, pictures, config=micro_config(**STUDENT), prompts=PROMPTS)


def pixels(images, config) -> torch.Tensor:
    return Sam3LiteProcessor.from_config(config)(images=images)["pixel_values"]


@torch.no_grad()
def outputs(model, images):
    processor = Sam3LiteProcessor.from_config(model.config)
    return model(**processor(images=images, text=[PROMPTS] * len(images)))


def error(result, expected) -> float:
    return ((result - expected).norm() / (expected - expected.mean()).norm()).item()


# least squares


def test_least_squares_finds_the_map_that_made_the_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    true = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    fit = LeastSquares(6, 4, torch.device("cpu"))
    for part in x.split(90):
        fit.add(part[None], (part @ true[0].T + true[1])[None])
    weight, bias = fit.solve(torch.zeros(4, 6), ridge=1e-9)
    torch.testing.assert_close(weight, true[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, true[1], atol=1e-3, rtol=1e-3)


def test_ridge_pulls_to_the_present_weights_and_never_the_bias():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    fit = LeastSquares(3, 1, torch.device("cpu"))
    fit.add(x, x.sum(1, keepdim=True) + 7)
    present = torch.tensor([[5.0, -2.0, 0.0]])
    weight, bias = fit.solve(present, ridge=1e9)
    torch.testing.assert_close(weight, present, atol=1e-5, rtol=0)
    assert abs((x @ weight.T + bias).mean() - (x.sum(1) + 7).mean()) < 1e-4


def test_weighted_rows_count_as_often_as_they_weigh():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    y = torch.tensor([[0.0], [1.0], [5.0]])
    weighted, repeated = (LeastSquares(1, 1, torch.device("cpu")) for _ in range(2))
    weighted.add(x, y, torch.tensor([1.0, 3.0, 2.0]))
    rows = [0, 1, 1, 1, 2, 2]
    repeated.add(x[rows], y[rows])
    for a, b in zip(*(fit.solve(torch.zeros(1, 1), 1e-3) for fit in (weighted, repeated)), strict=True):
        torch.testing.assert_close(a, b)


# images


def test_drawn_pictures_repeat_and_have_natural_spectra():
    first, second = draw_images(6, 64, seed=1), draw_images(6, 64, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], draw_images(1, 64, seed=2)[0])
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    low, high = (frequency > 0.02) & (frequency < 0.1), (frequency > 0.3) & (frequency < 0.45)
    for picture in first:
        amplitude = np.abs(np.fft.fft2(np.asarray(picture, dtype=float).mean(2)))
        assert amplitude[low].mean() > 2 * amplitude[high].mean()


def test_images_may_be_a_folder_paths_pictures_arrays_or_tensors(tmp_path, pictures, config):
    processor = Sam3LiteProcessor.from_config(config)
    (tmp_path / "deeper").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "deeper" / "b.png"]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    (tmp_path / "notes.txt").write_text("no image")
    arrays = [np.asarray(picture) for picture in pictures[:2]]
    expected = load_pixels(pictures[:2], 10, processor, seed=0)
    assert len(expected) == 2 and expected[0].shape == (3, 64, 64)
    for images in (tmp_path, paths, arrays, [torch.tensor(array).permute(2, 0, 1) for array in arrays]):
        for result, wanted in zip(load_pixels(images, 10, processor, seed=0), expected, strict=True):
            torch.testing.assert_close(result, wanted)
    assert len(load_pixels(tmp_path, 1, processor, seed=0)) == 1


def test_images_that_are_not_there_are_an_error(tmp_path, teacher):
    with pytest.raises(ValueError, match="is not a folder"):
        calibrate_mapping(teacher, tmp_path / "missing", config=micro_config(**STUDENT))
    with pytest.raises(ValueError, match="holds no image"):
        calibrate_mapping(teacher, tmp_path, config=micro_config(**STUDENT))
    with pytest.raises(ValueError, match="at least two"):
        calibrate_mapping(teacher, draw_images(1, 64, 0), config=micro_config(**STUDENT))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="broken.png"):
        calibrate_mapping(teacher, tmp_path, config=micro_config(**STUDENT))


# signals


@torch.no_grad()
def test_head_scores_are_the_energies_that_heads_add(teacher, pictures):
    batch = pixels(pictures[:4], teacher.config)
    signals = measure_vision(teacher.vision_encoder, [batch[:2], batch[2:]])
    layer = teacher.vision_encoder.backbone.layers[2]
    seen = {}
    hook = layer.attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, -2)))
    stream = teacher.vision_encoder.backbone(batch).last_hidden_state.flatten(0, -2)
    hook.remove()
    values = seen["x"] - seen["x"].mean(0)
    for head in range(4):
        own = slice(head * 16, head * 16 + 16)
        added = values[:, own] @ layer.attention.o_proj.weight[:, own].T
        torch.testing.assert_close(
            signals.layers[2].head_scores[head], added.square().sum(1).mean(), rtol=1e-3, atol=0
        )
    torch.testing.assert_close(signals.final.covariance, torch.cov(stream.T, correction=0), rtol=1e-3, atol=1e-4)
    # Normalised tokens have a mean square of one per channel; two norms a layer and the end are counted.
    assert signals.moment.trace().item() == pytest.approx(64, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 3])
def test_what_is_observed_adds_up_in_whole_and_in_partial_windows(window):
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config(vision_window_size=window))).eval()
    backbone, stream = model.vision_encoder.backbone, torch.randn(2, 8, 8, 32)
    run, (layer, _) = layer_runner(backbone), backbone.layers
    assert layer.window_size == window
    (inputs, total), result = observe(layer, [*VIT_SITES[0]], lambda: run(layer, stream, 0))
    torch.testing.assert_close(stream + layer.attention.o_proj(inputs), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total + layer.mlp(layer.layer_norm2(total)), result, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 3])
def test_layers_one_by_one_are_the_whole_encoder(window):
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config(vision_window_size=window, vision_num_hidden_layers=4))).eval()
    backbone, pixels = model.vision_encoder.backbone, torch.randn(2, 3, 64, 64)
    run, stream = layer_runner(backbone), embed(model.vision_encoder, pixels)
    for layer in backbone.layers:
        stream = run(layer, stream, 0)
    expected = backbone(pixels).last_hidden_state.view_as(stream)
    torch.testing.assert_close(stream, expected, atol=1e-4, rtol=1e-4)


# the whole


def isometry(teacher, config) -> Sam3LiteModel:
    checkpoint = Checkpoint("teacher", LoadedTensors(teacher), teacher.config, is_lite=True)
    state, _ = map_checkpoint(checkpoint, config, Sam3LiteModel.parameter_shapes(config), "isometry")
    model = Sam3LiteModel(config).eval()
    model.load_state_dict(state)
    return model


def test_calibration_comes_nearer_than_rotation_alone(teacher, calibrated):
    unseen = draw_images(8, 64, seed=99)
    batch = pixels(unseen, teacher.config)
    rotated = isometry(teacher, micro_config(**STUDENT))
    with torch.no_grad():
        before, after = (
            pyramid_cosines(model.vision_encoder, teacher.vision_encoder, [batch]) for model in (rotated, calibrated)
        )
    assert all(new > old for old, new in zip(before, after, strict=True))
    expected = outputs(teacher, unseen)
    for name, gain in {"pred_masks": 0.95, "semantic_seg": 0.8}.items():
        results = [error(outputs(model, unseen)[name], expected[name]) for model in (rotated, calibrated)]
        assert results[1] < gain * results[0], (name, results)


def test_the_report_says_what_was_fitted(calibrated, teacher, tmp_path):
    report = calibrated.mapping_report
    actions = {row.group: row.action for row in report.rows if row.target_shape is not None}
    assert report.strategy == "calibrated"
    fitted = {group for group, action in actions.items() if action == "refit"}
    assert {
        "vision_encoder.backbone.layers.*.attention.o_proj",
        "vision_encoder.backbone.layers.*.mlp.fc2",
        "vision_encoder.neck.fpn_layers.2.proj1",
        "detr_encoder.layers.*.cross_attn.o_proj",
        "mask_decoder.mask_embedder.layers.*",
    } <= fitted
    reference = isometry(teacher, micro_config(**STUDENT)).state_dict()
    same_layers = report.layers["vision_encoder.backbone.layers"] == [0, 2, 3, 4]
    for name in ("detr_decoder.box_head.layer1.weight", "mask_decoder.instance_projection.weight"):
        assert torch.equal(calibrated.state_dict()[name], reference[name]), (name, same_layers)
    assert report.calibration["images_fitted"] == 21 and report.calibration["images_held_out"] == 3
    calibrated.save_pretrained(tmp_path)
    assert '"calibrated"' in (tmp_path / "mapping_report.json").read_text()


def test_the_first_decoder_layers_are_fitted_to_do_the_work_of_the_last_ones(teacher, pictures):
    """A decoder that is too short by one layer, where nothing else is smaller."""
    config = teacher.config.changed(detr_decoder_layers=2)
    model = calibrate_mapping(teacher, pictures, config=config, prompts=PROMPTS, first_decoder_layers=True)
    assert model.mapping_report.layers["detr_decoder.layers"] == [0, 1]
    cut = Sam3LiteModel(copy.deepcopy(config)).eval()
    cut.load_state_dict(teacher.state_dict(), strict=False)
    unseen = draw_images(8, 64, seed=99)
    expected = outputs(teacher, unseen)
    for name in ("pred_boxes", "pred_logits", "pred_masks"):
        fitted, unfitted = (error(outputs(each, unseen)[name], expected[name]) for each in (model, cut))
        assert fitted < unfitted, name


def test_queries_that_cannot_be_compared_are_named(teacher, pictures):
    config = micro_config(**STUDENT, num_queries=20)
    with pytest.raises(ValueError, match="`num_queries` is 20, that of the source 12"):
        calibrate_mapping(teacher, pictures, config=config, prompts=PROMPTS)


@torch.no_grad()
def test_inputs_that_do_not_vary_change_no_weights():
    """One row, as of one prompt: what rounding leaves of its variance is not fitted to."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 1)
    before = linear.weight.clone()
    fit = LeastSquares(256, 1, torch.device("cpu"))
    fit.add(torch.randn(1, 256), torch.tensor([[5.0]]))
    fit.refit(linear, 1e-2)
    assert (linear.weight - before).norm() < 0.01 * before.norm()


def test_the_result_repeats_and_the_source_stays(teacher, calibrated, pictures):
    before = copy.deepcopy(teacher.state_dict())
    again = calibrate_mapping(teacher, pictures, config=micro_config(**STUDENT), prompts=PROMPTS)
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, calibrated.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_a_standard_folder_in_half_precision_and_a_result_for_stock_transformers(teacher, pictures, tmp_path):
    copy.deepcopy(teacher).half().to_sam3().save_pretrained(tmp_path / "standard")
    model = calibrate_mapping(
        tmp_path / "standard", pictures, config=micro_config(**STUDENT), prompts=PROMPTS, search_depth=False
    )
    assert model.dtype == torch.float16
    model.float().to_sam3().save_pretrained(tmp_path / "small")
    stock = Sam3Model.from_pretrained(tmp_path / "small").eval()
    inputs = Sam3LiteProcessor.from_config(model.config)(images=pictures[:2], text=["cat", "tree"])
    with torch.no_grad():
        expected = model(**inputs)
        inputs.pop("original_sizes")
        result = stock(**with_padding_box(inputs))
    torch.testing.assert_close(result.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)


def test_a_lite_model_that_was_loaded_in_half_precision(teacher, pictures):
    """Its configuration says float16, in which the smaller model must not be made."""
    source = copy.deepcopy(teacher).half()
    source.config.dtype = source.config.text_config.dtype = torch.float16
    config = source.config.changed(**STUDENT)
    model = calibrate_mapping(source, pictures, config=config, prompts=PROMPTS, search_depth=False)
    assert model.dtype == torch.float16 and {p.dtype for p in model.parameters()} == {torch.float16}
    assert outputs(model.float(), pictures[:1]).pred_boxes.isfinite().all()


def test_a_fixed_vocabulary_is_what_is_asked_by_default(teacher, pictures):
    frozen = copy.deepcopy(teacher)
    frozen.freeze_vocabulary(["cat", "tree"], Sam3LiteProcessor.from_config(frozen.config))
    config = frozen.config.changed(**STUDENT)
    model = calibrate_mapping(frozen, pictures, config=config, search_depth=False)
    assert model.config.vocabulary == ["cat", "tree"]
    assert torch.equal(model.vocabulary.features, frozen.vocabulary.features)
    same = calibrate_mapping(frozen, pictures, config=config, search_depth=False, prompts=["cat", "tree"])
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_equal_sizes_are_copied(teacher, pictures):
    model = calibrate_mapping(teacher, pictures, config=copy.deepcopy(teacher.config))
    assert model.mapping_report.strategy == "copy"
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_resolution(teacher):
    model = calibrate_mapping(
        teacher, config=micro_config(**STUDENT), image_size=96, num_images=10, search_depth=False, prompts=PROMPTS
    )
    assert model.config.image_size == 96 and teacher.config.image_size == 64
    assert model.mapping_report.calibration["images"] == "drawn"
    assert outputs(model, draw_images(1, 96, 0)).pred_boxes.isfinite().all()


def test_the_search_drops_the_layer_that_does_nothing(teacher, pictures):
    """Of five layers the first adds nothing; without it, at full width, the others are the whole encoder."""
    idle = copy.deepcopy(teacher)
    for linear in (
        idle.vision_encoder.backbone.layers[0].attention.o_proj,
        idle.vision_encoder.backbone.layers[0].mlp.fc2,
    ):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    config = idle.config.changed(vision_num_hidden_layers=4, vision_global_attn_indexes=[1, 3])
    found, spread = (
        calibrate_mapping(idle, pictures, config=copy.deepcopy(config), prompts=PROMPTS, search_depth=search)
        for search in (True, False)
    )
    assert spread.mapping_report.layers["vision_encoder.backbone.layers"] == [0, 2, 3, 4]
    assert found.mapping_report.layers["vision_encoder.backbone.layers"] == [1, 2, 3, 4]
    cosines = found.mapping_report.calibration["pyramid_cosines"]
    assert min(cosines) > 0.9999 > max(spread.mapping_report.calibration["pyramid_cosines"])
    expected, result = (outputs(model, pictures[:2]) for model in (idle, found))
    torch.testing.assert_close(result.pred_masks, expected.pred_masks, atol=2e-2, rtol=2e-2)


def test_the_search_climbs_and_keeps_types():
    types = [False, False, False, True, False, False, False, True]
    wanted = {1, 2, 3, 5, 6, 7}
    best, tried = search_layers([0, 2, 3, 4, 6, 7], types, lambda kept: len(wanted & set(kept)))
    assert best == [1, 2, 3, 5, 6, 7]
    assert all([types[i] for i in kept] == [False, False, True, False, False, True] for kept in tried)
