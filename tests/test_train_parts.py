"""The parts of training/, each by itself."""

import json
import logging
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import micro_config
from data_cases import annotation, image, write_coco
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import BatchKeys, epoch_order
from sam3_hf.evaluation import prediction_row
from sam3_hf.evaluation.loop import outputs_by_chunk, prediction_rows, prompt_chunks
from sam3_hf.files import copy_folder
from sam3_hf.modeling_sam3_lite import Sam3LiteOutput
from sam3_hf.training import checkpoints
from sam3_hf.training.arguments import OptimizationArguments, parse_arguments
from sam3_hf.training.batch_size import choose_batch_size, largest_size
from sam3_hf.training.compatibility import check_compatible
from sam3_hf.training.data import load_data
from sam3_hf.training.loop import MAX_OVERFLOWS, TrainingLoop
from sam3_hf.training.model import build_model, load_frozen_text
from sam3_hf.training.objectives import Labels, Objective
from sam3_hf.training.optim import MovingAverage, Schedule, build_optimizer, vit_scale
from sam3_hf.training.parts import Parts
from sam3_hf.training.phrases import FrozenText, TokenizedText
from sam3_hf.training.reporting import Metrics, truncate_metrics
from sam3_hf.training.run import Run
from sam3_hf.training.stopping import StopSignal

TRAINING = Path(__file__).parents[1] / "training"


def write_yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def error_of(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        parse_arguments(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err


# Arguments


def test_flags_win_over_the_yaml_file_which_wins_over_defaults(tmp_path):
    path = write_yaml(
        tmp_path,
        "data: somewhere\nlearning_rate: 2e-4\nbatch_size: auto\nmixed_precision: no\ncompile: true\n"
        "image_size: null\nmodel_overrides: {num_queries: 7}\n",
    )
    arguments = parse_arguments([path, "--batch_size", "3", "--learning-rate=1e-3", "--ema_decay", "0.9"])
    assert arguments.data.data == "somewhere"
    assert arguments.optimization.batch_size == 3
    assert arguments.optimization.learning_rate == 1e-3
    assert arguments.optimization.mixed_precision == "no"
    assert arguments.model.compile is True
    assert arguments.model.image_size is None
    assert arguments.model.model_overrides == {"num_queries": 7}
    assert arguments.optimization.epochs == 30
    assert parse_arguments([path]).optimization.batch_size == "auto"
    assert parse_arguments([path]).optimization.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("learning_rat: 1", [], "learning_rat; did you mean learning_rate?"),
        ("data: x", ["--batchsize", "2"], "--batchsize; did you mean --batch_size?"),
        ("data: x\nbatch_size: many", [], "batch_size must be a number or 'auto', got 'many'"),
        ("data: x\nepochs: 1.5", [], "--epochs: invalid int value: '1.5'"),
        ("data: x\nepochs: 0", [], "epochs must be at least 1, got 0"),
        ("data: x\nnegative_ratio: 2", [], "negative_ratio must be from 0 to 1, got 2.0"),
        ("data: x\nsmallest_side: 0", [], "smallest_side must be above 0"),
        ("data: x\ncolor_jitter: 1", [], "color_jitter must be below 1"),
        ("data: generated\ngenerated_concepts: 13", [], "generated_concepts must be from 2 to 12, got 13"),
        ("data: x\nvision_learning_rate: -1", [], "vision_learning_rate must be at least 0, got -1.0"),
        ("data: x\nmixed_precision: fp8", [], "invalid choice: 'fp8'"),
        ("data: x\nmodel_overrides: '{bad'", [], "model_overrides must be a JSON object"),
        ("data: [x, y]", [], "data must be one value"),
        ("epochs: 1", [], "data is not set"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, yaml, flags, message):
    path = write_yaml(tmp_path, yaml)
    error = error_of(capsys, [path, *flags])
    assert message in error
    assert len(error.splitlines()) == 2  # the message is not buried under a usage of seventy flags


def test_missing_yaml_file_is_named(capsys):
    assert "there is no configuration file nowhere.yaml" in error_of(capsys, ["nowhere.yaml"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_arguments(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "data:", "optimization:", "output:"):
        assert f"\n{group}\n" in text
    for name in parse_arguments(["--data", "x"]).flat():
        assert f"--{name} " in text
    assert "(default: None)" not in text


@pytest.mark.parametrize("path", sorted((TRAINING / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    arguments = parse_arguments([str(path), "--data", "x"])
    if path.stem == "lite_fp16":
        settings = arguments.optimization
        assert (settings.learning_rate, settings.batch_size, settings.epochs) == (2e-4, 4, 30)
        assert (settings.mixed_precision, arguments.output.eval_batch_size) == ("fp16", 4)
    if path.stem == "standard_fp16":
        assert arguments.model.preset == "standard"


# Optimizer, schedule, moving average


@pytest.mark.parametrize(
    ("num_classes", "shown", "flags", "expected"),
    [
        (10, {1: [0, 1, 2], 2: [3]}, [], 0.75),  # 16 of 20 pairs are absent
        (5, {1: [0, 1, 2], 2: [3]}, [], 0.6),  # 6 of 10
        (3, {1: [0, 1, 2], 2: [2]}, [], 0.5),  # 2 of 6
        (5, {1: [0, 1, 2], 2: [3]}, ["--negative_ratio", "0.2"], 0.2),
    ],
)
def test_as_many_absent_classes_are_asked_for_as_the_pictures_lack(tmp_path, num_classes, shown, flags, expected):
    categories = [{"id": number, "name": f"part {number}"} for number in range(num_classes)]
    pairs = [(picture, number) for picture, numbers in shown.items() for number in numbers]
    annotations = [annotation(place, picture, number) for place, (picture, number) in enumerate(pairs, start=1)]
    for split in ("train", "valid"):
        write_coco(tmp_path / split, [image(picture) for picture in shown], annotations, categories)
    train, _ = load_data(Accelerator(cpu=True), parse_arguments(["--data", str(tmp_path), *flags]), image_size=64)
    assert train.sampling.negative_ratio == expected


def test_layers_of_the_vit_learn_slower_the_lower_they_are():
    depth, decay = 4, 0.5
    vit = "vision_encoder.backbone."
    assert vit_scale(vit + "layers.3.mlp.fc1.weight", depth, decay) == 0.5
    assert vit_scale(vit + "layers.0.mlp.fc1.weight", depth, decay) == 0.5**4
    assert vit_scale(vit + "embeddings.patch_embeddings.projection.weight", depth, decay) == 0.5**5
    assert vit_scale(vit + "layer_norm.weight", depth, decay) == 0.5**5
    assert vit_scale(vit + "embeddings.position_embeddings", depth, decay) == 1
    assert vit_scale("vision_encoder.neck.fpn_layers.0.proj1.weight", depth, decay) == 1
    assert vit_scale("detr_encoder.layers.0.mlp.fc1.weight", depth, decay) == 1


def test_optimizer_groups_cover_each_trained_parameter_once():
    model = Sam3LiteModel(micro_config())
    model.text_encoder.requires_grad_(False)
    settings = OptimizationArguments(
        learning_rate=1.0, vision_learning_rate=0.5, vit_layer_decay=0.9, weight_decay=0.1
    )
    optimizer = build_optimizer(model, settings, fused=False)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder."):
            assert id(parameter) not in found
            continue
        group = found[id(parameter)]
        is_plain = name.endswith(".bias") or "norm" in name
        assert group["weight_decay"] == (0.0 if is_plain and parameter.ndim == 1 else 0.1), name
        part = 0.5 if name.startswith("vision_encoder.") else 1.0
        assert group["lr"] == part * vit_scale(name, 2, 0.9), name


def test_a_part_with_learning_rate_0_stands_still():
    model = Sam3LiteModel(micro_config())
    optimizer = build_optimizer(model, OptimizationArguments(learning_rate=1.0, vision_learning_rate=0.0), fused=False)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.0 if name.startswith("vision_encoder.") else 1.0), name


def test_fused_steps_are_those_of_plain_adamw_and_overflows_change_nothing():
    """As on a GPU, where a loss scaler tells the optimizer to leave out a step."""
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(model, OptimizationArguments(learning_rate=0.1), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for factor in (1.0, math.inf, 3.0):
            scaler.scale(model(torch.ones(2, 4)).square().sum() * factor).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = model.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert norm.isfinite() != torch.equal(model.weight, before)
        assert scaler.get_scale() == 2.0**7
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_schedule_warms_up_and_follows_a_cosine():
    settings = OptimizationArguments(warmup_ratio=0.1, final_learning_rate_ratio=0.2)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.5}])
    schedule = Schedule(optimizer, settings)
    scales = [schedule.scale(step, 100) for step in range(1, 101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == 1 == max(scales)
    assert scales[54] == pytest.approx((1 + 0.2) / 2)
    assert scales[99] == pytest.approx(0.2)
    assert all(after < before for before, after in zip(scales[9:], scales[10:], strict=False))
    assert schedule.apply(optimizer, 5, 100) == pytest.approx(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.25])
    assert Schedule(optimizer, OptimizationArguments(warmup_ratio=1.0)).scale(4, 4) == 1  # nothing but warm-up


def test_moving_average_follows_the_formula_and_gives_the_weights_back():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.9)
    model.weight.data.fill_(2.0)
    average.update(step=1)
    decay = 2 / 11  # (1 + step) / (10 + step) is below 0.9 at first
    expected = decay * 1.0 + (1 - decay) * 2.0
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0
    average.update(step=1000)
    with pytest.raises(KeyboardInterrupt), average.applied():
        assert model.weight.item() == pytest.approx(0.9 * expected + 0.1 * 2.0)
        raise KeyboardInterrupt
    assert model.weight.item() == 2.0

    other = MovingAverage(torch.nn.Linear(1, 1, bias=False), decay=0.9)
    other.load_state_dict(average.state_dict())
    assert other.average["weight"].item() == average.average["weight"].item()
    with pytest.raises(ValueError, match="bias"):
        MovingAverage(torch.nn.Linear(1, 1), decay=0.9).load_state_dict(average.state_dict())


# Order of the data


def keys_of(count, batch_size, accumulation=1, first=1, last=6, rank=0, world=1):
    return list(BatchKeys(count, batch_size, 3, first, last, accumulation, rank, world))


def test_each_epoch_sees_each_image_and_differs_from_the_last():
    first, second = epoch_order(10, 4, seed=3, epoch=0), epoch_order(10, 4, seed=3, epoch=1)
    assert first.shape == (3, 4)
    assert sorted(first.flatten()[:10]) == list(range(10))
    assert (first.flatten()[10:] == first.flatten()[:2]).all()  # filled up from the start
    assert (first != second).any()
    assert keys_of(10, 4)[3] == [(1, index) for index in second[0]]
    assert epoch_order(3, 8, seed=0, epoch=0).shape == (1, 8)  # a batch larger than the dataset


def test_a_resumed_run_gets_the_batches_that_are_left():
    whole = keys_of(10, 2, accumulation=2, last=9)
    assert len(whole) == 18 == len(BatchKeys(10, 2, 3, 1, 9, accumulation=2))
    assert keys_of(10, 2, accumulation=2, first=5, last=9) == whole[8:]


def test_processes_and_accumulation_split_the_same_steps():
    whole = keys_of(10, 8)
    halves = [keys_of(10, 4, rank=rank, world=2) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    accumulated = keys_of(10, 4, accumulation=2)
    assert [accumulated[i] + accumulated[i + 1] for i in range(0, len(accumulated), 2)] == whole


def test_many_prompts_are_asked_in_chunks_about_their_images(monkeypatch):
    monkeypatch.setattr("sam3_hf.evaluation.loop.PROMPTS_AT_ONCE", 4)
    batch = {
        "image_index": torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]),
        "phrases": [str(i) for i in range(9)],
        "labels": list(range(9)),
        "references": list(range(9)),
        "original_sizes": [(1, 1), (2, 2), (3, 3)],
    }
    chunks = prompt_chunks(batch)
    assert sum((chunk["labels"] for chunk in chunks), []) == batch["labels"]
    assert [len(chunk["phrases"]) for chunk in chunks] == [4, 4, 1]
    for chunk in chunks:
        expected = [int(number) // 3 for number in chunk["phrases"]]
        assert chunk["image_index"].tolist() == expected
        assert chunk["original_sizes"] == [(image + 1, image + 1) for image in expected]


@torch.no_grad()
def test_chunks_give_the_outputs_of_the_whole_and_encode_images_once(model, inputs, monkeypatch):
    monkeypatch.setattr("sam3_hf.evaluation.loop.PROMPTS_AT_ONCE", 2)
    encoded = []
    model.vision_encoder.register_forward_hook(lambda module, pixels, _: encoded.append(len(pixels[0])))
    owners = torch.tensor([0, 0, 1, 2, 2])
    phrases = ["one", "two", "three", "four", "five"]
    text = TokenizedText(Sam3LiteProcessor.from_config(model.config))
    expected = model(pixel_values=inputs["pixel_values"], image_index=owners, **text(phrases))
    labels = [{"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 64, 64, dtype=torch.bool)}] * 5
    batch = {"pixel_values": inputs["pixel_values"], "image_index": owners, "phrases": phrases, "labels": labels}
    batch |= {"references": [{}] * 5, "original_sizes": [(9, 9)] * 3}
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, unwrap_model=lambda model: model)
    parts = list(outputs_by_chunk(accelerator, model, text, batch))
    assert encoded == [3, 3]
    assert [chunk["phrases"] for chunk, _ in parts] == [["one", "two"], ["three", "four"], ["five"]]
    for name in ("pred_logits", "pred_boxes", "pred_masks", "presence_logits"):
        found = torch.cat([outputs[name] for _, outputs in parts])
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_masks", [True, False])
def test_prediction_rows_are_those_of_all_detections(with_masks):
    """More than 100 queries; in one prompt, more than that are confident, in another there are ties."""
    torch.manual_seed(0)
    logits = torch.randn(3, 130) * 3
    logits[1] += 12
    logits[2, ::2] = 0.5
    outputs = Sam3LiteOutput(
        pred_logits=logits,
        pred_boxes=torch.rand(3, 130, 4),
        pred_masks=torch.randn(3, 130, 8, 8),
        presence_logits=torch.tensor([[-1.0], [9.0], [2.0]]),
    )
    processor = Sam3LiteProcessor.from_config(micro_config())
    sizes = [(20, 30), (16, 16), (25, 10)]
    references = [{"image_id": number, "category": 7} for number in range(3)]
    rows = prediction_rows(processor, outputs, {"references": references, "original_sizes": sizes}, with_masks)
    found = processor.post_process_instance_segmentation(outputs, threshold=0.01, target_sizes=sizes)
    assert [len(row["scores"]) > 100 for row in rows] == [False, True, False]
    for number, (row, all_of_it) in enumerate(zip(rows, found, strict=True)):
        masks = all_of_it["masks"] if with_masks else None
        expected = prediction_row(number, 7, all_of_it["boxes"], all_of_it["scores"], masks)
        assert row["masks"] == expected["masks"]
        for key in ("boxes", "scores"):
            torch.testing.assert_close(torch.tensor(row[key]), torch.tensor(expected[key]))


# Checkpoints


def folder_with(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / checkpoints.STATE).write_text(json.dumps({"content": content}))
    return path


def content_of(path: Path) -> str:
    return checkpoints.read_state(path)["content"]


def test_a_new_state_leaves_other_names_of_the_checkpoint_as_they_are(tmp_path):
    last = folder_with(tmp_path / "last", "saved")
    copy_folder(last, tmp_path / "epoch_1")
    checkpoints.replace_state(last, {"content": "evaluated"})
    assert (content_of(last), content_of(tmp_path / "epoch_1")) == ("evaluated", "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "last"]


def test_a_folder_without_state_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        checkpoints.read_state(tmp_path)


def saved_state(**arguments) -> dict:
    flat = parse_arguments(["--data", "x"]).flat() | arguments
    return {"arguments": flat, "images_per_step": 4, "dataset": {"training images": 10, "concepts": ["a"]}}


def test_resuming_with_other_settings_is_refused_or_logged(caplog):
    check_compatible(saved_state(), saved_state())
    assert not caplog.records
    changed = saved_state(preset="tiny", ema_decay=0.9)
    changed["dataset"] = {"training images": 9, "concepts": ["a"]}
    changed["images_per_step"] = 8
    with pytest.raises(ValueError) as raised:
        check_compatible(saved_state(), changed)
    for part in ("preset: lite there, tiny here", "ema_decay", "training images 10 there, 9 here", "4 there, 8 here"):
        assert part in str(raised.value)
    with caplog.at_level(logging.WARNING):
        check_compatible(saved_state(), saved_state(learning_rate=1.0, resume="auto"))
    assert [record.getMessage() for record in caplog.records] == [
        "learning_rate was 0.0002 up to the checkpoint and is 1.0 from here on"
    ]


# Text


def test_stored_text_gives_the_outputs_of_the_text_encoder():
    torch.manual_seed(0)
    model = Sam3LiteModel(micro_config()).eval()
    processor = Sam3LiteProcessor.from_config(model.config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = ["red circle", "a much longer phrase than that", "visual", "red circle"]
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "image_index": torch.tensor([0, 1, 1, 1])}
    with torch.no_grad():
        expected = model(**inputs, **TokenizedText(processor)(asked))
        frozen = FrozenText(model, processor, asked, torch.device("cpu"))
        found = model(**inputs, **frozen(asked))
    torch.testing.assert_close(found.pred_logits, expected.pred_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    assert not any(name.startswith("text_") for name in model.state_dict())
    rejoined = {**model.state_dict(), **frozen.weights()}
    assert rejoined.keys() == weights.keys()
    assert all(torch.equal(rejoined[name], weights[name]) for name in weights)
    assert frozen(["visual"])["text_embeds"].shape[1] < 32  # no longer than the longest phrase
    with pytest.raises(KeyError, match="unheard"):
        frozen(["unheard"])


def test_frozen_text_of_a_checkpoint_must_be_whole(tmp_path):
    model = Sam3LiteModel(micro_config())
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("text_")}
    path = tmp_path / checkpoints.FROZEN
    other = Sam3LiteModel(micro_config())
    with pytest.raises(FileNotFoundError, match="frozen_text.safetensors is missing"):
        load_frozen_text(other, path)
    save_file(weights, path)
    load_frozen_text(other, path)
    assert torch.equal(other.text_projection.weight, model.text_projection.weight)
    save_file({**weights, "surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 unexpected tensors, such as surplus"):
        load_frozen_text(other, path)
    del weights["text_projection.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="1 missing tensors, such as text_projection.weight"):
        load_frozen_text(other, path)


# Where the first weights come from


def test_a_checkpoint_without_text_encoder_does_not_start_a_run(tmp_path):
    """Such as checkpoints/best of a run with a frozen text encoder."""
    model = Sam3LiteModel(micro_config())
    model.save_pretrained(tmp_path / "final")
    arguments = parse_arguments(["--data", "x", "--init", str(tmp_path / "final")])
    found = build_model(arguments, None).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

    model.text_encoder = model.text_projection = None
    model.config.save_pretrained(tmp_path / "best")
    save_file(model.state_dict(), tmp_path / "best" / "model.safetensors", metadata={"format": "pt"})
    arguments = parse_arguments(["--data", "x", "--init", str(tmp_path / "best")])
    with pytest.raises(ValueError, match="missing tensors, such as text_encoder.* use the folder final/"):
        build_model(arguments, None)


def test_a_standard_model_is_mapped_to_the_preset(tmp_path):
    torch.manual_seed(0)
    Sam3LiteModel(micro_config()).to_sam3().save_pretrained(tmp_path)
    smaller = micro_config(detr_decoder_layers=1).to_dict()
    overrides = {name: value for name, value in smaller.items() if name.endswith("_config")}
    flags = ["--preset", "tiny", "--model_overrides", json.dumps(overrides), "--image_size", "128"]
    model = build_model(parse_arguments(["--data", "x", "--init", str(tmp_path), *flags]), None)
    assert model.config.image_size == 128
    assert model.config.detr_decoder_config.num_layers == 1
    assert "copied" in model.mapping_report.totals


# Sharded weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_sharded_float32_weights(dtype):
    """As FSDP runs under Accelerate with the policy that `start_accelerator` sets."""
    torch.manual_seed(0)
    model = Sam3LiteModel(micro_config())
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": [{"boxes": torch.full((1, 4), 0.5)}] * 2}
    pixels = torch.randn(2, 3, 64, 64)
    expected = model.train()(pixel_values=pixels, **inputs).loss
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.detr_decoder.layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy())
        fully_shard(model, mp_policy=MixedPrecisionPolicy())
        register_fsdp_forward_method(model, "get_vision_features")
        with torch.autocast("cpu", dtype=dtype):
            loss = model(pixel_values=pixels, **inputs).loss
        loss.backward()
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            vision = model.get_vision_features(pixels)
            again = model(vision_embeds=vision, **inputs).loss
            direct = model(pixel_values=pixels, **inputs).loss
    finally:
        torch.distributed.destroy_process_group()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(p.grad is None or p.grad.to_local().isfinite().all() for p in model.parameters())
    assert again.item() == direct.item()


# Metrics, batch size, signals, non-finite losses


def test_metrics_of_a_killed_run_are_cut_at_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, step=0, evaluated=0)
    for step in range(1, 6):
        metrics.write("train", step, {"loss": float(step), "table": {"a": 1}})
        metrics.write("eval", step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # the kill came here
    truncate_metrics(tmp_path / "metrics.jsonl", 3, evaluated=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((1, "train"), (1, "eval"), (2, "train"), (2, "eval"), (3, "train"))
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_batch_size_backs_off_when_memory_runs_out():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    assert largest_size(attempt) == 8
    assert tried == [64, 32, 16, 8]
    with pytest.raises(RuntimeError, match="not even one image fits"):
        largest_size(lambda size: attempt(100))
    with pytest.raises(ZeroDivisionError):  # other errors are not taken for it
        largest_size(lambda size: 1 / 0)


def test_first_signal_asks_to_stop_and_a_later_ctrl_c_interrupts(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    try:
        stop = StopSignal()
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passes on what the terminal has sent already
        now = 103.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Rows(Objective):
    """The mean output of a linear model for rows of numbers; counts its calls, and refuses zeros."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch, inputs):
        self.calls += 1
        if not inputs["pixel_values"].any():
            raise ValueError("nothing but zeros")
        loss = model(inputs["pixel_values"]).mean()
        return loss, {"largest": loss.detach() * 10, f"call {self.calls}": loss.detach()}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def rows(*values: float, ids: list[int]) -> dict:
    return {"pixel_values": torch.tensor([values]), "phrases": ["a"], "image_ids": ids}


@pytest.fixture
def loop() -> TrainingLoop:
    """Over a linear model with weights 1 that learns at rate 0.5 with momentum 0.5."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    flags = ["--warmup_ratio", "0", "--final_learning_rate_ratio", "1", "--max_grad_norm", "0", "--ema_decay", "0.9"]
    parts = Parts(
        arguments=parse_arguments(["--data", "x", *flags]),
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        objective=Rows(),
        processor=SimpleNamespace(tokenizer=None),
        text=lambda phrases: {},
        train_data=None,
        valid_data=None,
    )
    return TrainingLoop(parts)


def test_the_loop_minimises_its_objective_and_tells_its_terms(loop):
    batches = [(rows(1.0, 2.0, ids=[1]),), (rows(0.0, 1.0, ids=[2]),)]
    steps, seen = loop.steps(batches, 2, lambda: loop.step == 2), []
    for done in steps:
        seen.append((loop.step, done.terms, done.rate, done.stopped))
    assert seen[0] == (1, {"call 1": 3, "largest": 30, "loss": 3, "grad_norm": pytest.approx(5**0.5)}, 0.5, False)
    assert seen[1] == (2, {"call 2": 0, "largest": 0, "loss": 0, "grad_norm": 1}, 0.5, True)
    assert loop.model.weight.tolist() == [[0.25, -1.0]]  # gradients (1, 2), then half of that and (0, 1)
    assert loop.ema.average["weight"].tolist() != [[1.0, 1.0]]


def test_checkpoints_hold_the_state_of_the_objective(loop, tmp_path):
    loop.model.config = micro_config()
    list(loop.steps([(rows(1.0, 2.0, ids=[1]),)] * 3, 3))
    loop.save(tmp_path / "last", {"step": 3, "overflows": 1})
    weight = loop.model.weight.tolist()
    list(loop.steps([(rows(1.0, 2.0, ids=[1]),)], 4))
    assert (loop.step, loop.parts.objective.calls) == (4, 4) and loop.model.weight.tolist() != weight
    loop.resume(tmp_path / "last", checkpoints.read_state(tmp_path / "last"))
    assert (loop.step, loop.overflows, loop.parts.objective.calls) == (3, 1, 3)
    assert loop.model.weight.tolist() == weight
    assert Labels().state_dict() == {}
    with pytest.raises(ValueError, match="Labels has no state.*calls"):
        Labels().load_state_dict({"calls": 3})


def test_a_batch_that_the_objective_refuses_is_named(loop):
    batches = [(rows(1.0, 1.0, ids=[1]),), (rows(0.0, 0.0, ids=[2, 3]),)]
    with pytest.raises(
        RuntimeError, match=r"step 2 failed: nothing but zeros; ids of the images: \[2, 3\]. Nothing was"
    ):
        list(loop.steps(batches, 2))


def test_a_loss_that_is_not_finite_names_the_images(loop):
    batches = [rows(1.0, 1.0, ids=[1, 2]), rows(math.nan, 1.0, ids=[3, 4])]
    with pytest.raises(RuntimeError, match=r"loss of step 1 .* ids of the images: \[3, 4\]"):
        list(loop.steps([batches], 1))
    losses = [torch.tensor(1.0)] * 2
    with pytest.raises(RuntimeError, match=r"gradient norm of step 1 .* \[1, 2, 3, 4\]"):
        loop.check_finite(1.0, torch.tensor(math.inf), losses, batches)
    loop.accelerator.scaler = torch.amp.GradScaler("cpu")  # in FP16, the scaler skips such a step
    loop.check_finite(1.0, torch.tensor(math.inf), losses, batches)


def test_overflows_without_end_stop_the_run(loop):
    loop.overflows = 3
    batches = [rows(1.0, 1.0, ids=[1, 2]), rows(1.0, 1.0, ids=[3])]
    for loop.step in range(1, MAX_OVERFLOWS):
        loop.count_overflow(1.0, torch.tensor(math.inf), batches)
    loop.step += 1
    with pytest.raises(RuntimeError, match=rf"the last of which is {loop.step} .* ids of the images: \[1, 2, 3\]"):
        loop.count_overflow(1.0, torch.tensor(math.inf), batches)
    assert loop.overflows == 3 + MAX_OVERFLOWS


def test_batch_size_auto_is_for_one_process():
    parts = SimpleNamespace(model=None, train_data=[])
    parts.accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    with pytest.raises(ValueError, match="one process only"):
        choose_batch_size(parts)
    parts.accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        choose_batch_size(parts)


@pytest.mark.parametrize(("metric", "values", "best_step"), [("segm_AP", [0.1, 0.3, 0.2], 2), ("loss", [3, 2, 4], 2)])
def test_best_evaluation_is_remembered(metric, values, best_step):
    run = SimpleNamespace(best=None, epoch=1.0, step=0, metric_for_best=lambda: metric)
    for value in values:
        run.step += 1
        Run.note_if_best(run, {metric: float(value), "table": {}})
    assert run.best["step"] == best_step
    assert run.best["scores"] == {metric: float(values[best_step - 1])}
