"""Low-rank adapters: where they may stand, what they cost, and the forms that they are saved in."""

import copy
import re
import sys

import pytest
import torch
from accelerate import DistributedType
from conftest import largest_difference, make_labels, micro_config, shake
from fp16_emulation import RoundedProducts
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.integrations import peft as integration

from sam3_hf import Sam3LiteModel
from sam3_hf.training.accelerator import FIRST_LOSS_SCALE
from sam3_hf.training.adapter_arguments import AdapterArguments
from sam3_hf.training.adapters import (
    adapted_layers,
    adapter_state,
    add_adapters,
    check_adapters,
    plain_weights,
    save_adapter,
)
from sam3_hf.training.arguments import OptimizationArguments, parse_arguments
from sam3_hf.training.checkpoints import load_checkpoint, save_checkpoint
from sam3_hf.training.optim import build_optimizer, parameter_groups
from sam3_hf.training.sharded import joined


def adapted(model: Sam3LiteModel, targets: str = "detector", seed: int = 3, **settings) -> Sam3LiteModel:
    """A copy with adapters of rank 2 that change its outputs."""
    model = copy.deepcopy(model)
    add_adapters(model, AdapterArguments(lora_rank=2, lora_targets=targets, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def parts_of(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name in adapted_layers(model)}


DETECTOR = {"geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder"}


@pytest.fixture(scope="module")
def model() -> Sam3LiteModel:
    """To be copied only."""
    torch.manual_seed(0)
    return shake(Sam3LiteModel(micro_config())).eval()


@pytest.mark.parametrize(
    ("targets", "parts"),
    [("detector", DETECTOR), ("vision", {"vision_encoder"}), ("all", {*DETECTOR, "vision_encoder"})],
)
def test_adapters_stand_beside_the_plain_layers_of_a_part(model, targets, parts):
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = adapted(model, targets)
    plain = re.compile(r".*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)")
    wanted = {name for name in linear if name.split(".")[0] in parts and plain.fullmatch(name)}
    assert adapted_layers(found).keys() == wanted and parts_of(found) == parts
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trained == adapter_state(found).keys() and all(".lora_" in name for name in trained)


def test_layers_are_chosen_by_whole_names(model):
    assert set(adapted_layers(adapted(model, r"detr_decoder\.layers\.0\.mlp.*"))) == {
        f"detr_decoder.layers.0.mlp.{name}" for name in ("fc1", "fc2")
    }


@pytest.mark.parametrize(
    "targets", ["decoder", "text_encoder.*", r"mask_decoder\.instance_projection", r".*\.conv_layers\..*"]
)
def test_what_takes_no_adapter_is_refused_and_what_does_is_listed(model, targets):
    with pytest.raises(ValueError, match="the whole name of no layer") as error:
        adapted(model, targets)
    message = str(error.value)
    assert "\n" not in message and "detr_decoder.layers.N.mlp.fc1" in message and "text_encoder.text" not in message


def test_no_adapter_is_passed_by(model, box_inputs):
    """Each of them has a gradient in a training step: none stands beside a weight that is read in another way."""
    model = adapted(model, "all").train()
    model(**box_inputs, labels=make_labels()).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not without
    assert all(layer.lora_B["default"].weight.grad.abs().max() > 0 for layer in adapted_layers(model).values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("targets", "keeps"), [("detector", False), ("all", True)])
def test_nothing_of_a_frozen_vision_encoder_is_kept(model, inputs, targets, keeps, checkpointing):
    model = adapted(model, targets).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    model.vision_encoder.register_forward_pre_hook(lambda *_: hooks.__enter__())
    model.vision_encoder.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    features = model.get_vision_features(inputs["pixel_values"])
    assert bool(kept) == keeps
    assert all(level.requires_grad == keeps for level in features.fpn_hidden_states)


def test_checkpointing_changes_no_gradient(model, inputs):
    models = [adapted(model, "all", lora_dropout=0.1).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    for each in models:
        torch.manual_seed(0)
        each(**inputs, labels=make_labels()).loss.backward()
    one, two = ([p.grad for p in each.parameters() if p.requires_grad] for each in models)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, two, strict=True))


def test_autocast_keeps_no_second_copy_of_an_input(model):
    layer = adapted_layers(adapted(model))["detr_encoder.layers.0.mlp.fc1"]
    half = torch.randn(5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(half)
    inputs = [tensor for tensor in kept if tensor.shape == half.shape]
    assert inputs and {tensor.data_ptr() for tensor in inputs} == {half.data_ptr()}


def test_scaled_gradients_in_half_precision_are_those_of_float32(model, inputs):
    model = adapted(model, "all").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(half: bool) -> torch.Tensor:
        torch.manual_seed(0)
        with RoundedProducts(), torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(**inputs, labels=make_labels()).loss
        with RoundedProducts():
            found = torch.autograd.grad(FIRST_LOSS_SCALE * loss, trained)
        return torch.cat([tensor.flatten() for tensor in found]) / FIRST_LOSS_SCALE

    half, whole = gradient(True), gradient(False)
    assert half.isfinite().all() and (half - whole).norm() < 0.05 * whole.norm()


def test_a_base_in_half_precision_is_refused(model):
    with pytest.raises(ValueError, match="the model is in float16: load it with"):
        adapted(copy.deepcopy(model).half())


def test_merged_weights_answer_like_the_adapter(model, inputs):
    found = adapted(model, "all", lora_alpha=3.0)
    merged, base = copy.deepcopy(model), copy.deepcopy(model)
    merged.load_state_dict(plain_weights(found, found.state_dict(), merge=True))
    base.load_state_dict(plain_weights(found, found.state_dict(), merge=False))
    with torch.no_grad():
        expected, before = found(**inputs), model(**inputs)
        assert largest_difference(merged(**inputs), expected) < 1e-4
        assert largest_difference(base(**inputs), before) == 0
        assert largest_difference(before, expected) > 1e-2


def test_a_saved_adapter_is_loaded_by_peft_and_transformers(model, inputs, saved, tmp_path, monkeypatch):
    base = Sam3LiteModel.from_pretrained(saved)
    trained = adapted(base)
    save_adapter(trained, trained.state_dict(), tmp_path, str(saved))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**20
    with torch.no_grad():
        expected = trained(**inputs)
        wrapped = PeftModel.from_pretrained(Sam3LiteModel.from_pretrained(saved), tmp_path).eval()
        assert wrapped.peft_config["default"].base_model_name_or_path == str(saved)
        assert largest_difference(wrapped(**inputs), expected) < 1e-5
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.18.0")  # some ask for one that is not out yet
        base.load_adapter(tmp_path)
        assert largest_difference(base.eval()(**inputs), expected) < 1e-5


def test_adapters_learn_at_the_rate_of_their_part(model):
    settings = OptimizationArguments(learning_rate=1.0, vision_learning_rate=0.5, vit_layer_decay=0.5)
    whole = {name: group["lr"] for group in parameter_groups(model, settings) for name in names_in(model, group)}
    model = adapted(model, "all")
    for group in parameter_groups(model, settings):
        for name in names_in(model, group):
            assert group["lr"] == whole[re.sub(r"\.lora_[AB]\.default", "", name)], name


def names_in(model: nn.Module, group: dict) -> list[str]:
    chosen = set(map(id, group["params"]))
    return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "0"], "lora_rank must be at least 1, got 0"),
        (["--lora_alpha", "8"], "lora_alpha needs --lora_rank"),
        (["--lora_targets", "all"], "lora_targets needs --lora_rank"),
        (["--merge_adapter", "false"], "merge_adapter needs --lora_rank"),
        (["--lora_rank", "4", "--lora_dropout", "1"], "lora_dropout must be from 0 to below 1"),
        (["--lora_rank", "4", "--lora_alpha", "0"], "lora_alpha must be above 0"),
        (["--lora_rank", "4", "--lora_targets", "("], "lora_targets '(' is no regular expression"),
        (["--lora_rank", "4", "--train_text_encoder", "true"], "train_text_encoder does not go with lora_rank"),
        (["--lora_rank", "4", "--merge_adapter", "false"], "merge_adapter false needs --init"),
        (
            ["--lora_rank", "4", "--merge_adapter", "false", "--init", "x", "--image_size", "64"],
            "image_size needs a whole model in final/",
        ),
        (
            ["--lora_rank", "4", "--merge_adapter", "false", "--init", "x", "--freeze_vocabulary", "true"],
            "freeze_vocabulary needs a whole model in final/",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "generated", *flags])
    assert message in capsys.readouterr().err


def test_a_run_with_adapters_needs_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    check_adapters(AdapterArguments())
    with pytest.raises(ImportError, match=r'lora_rank needs pip install "sam3-hf\[lora\]"'):
        check_adapters(AdapterArguments(lora_rank=2))


class OneProcess:
    """What checkpoints ask of an accelerator."""

    is_main_process, device, scaler = True, torch.device("cpu"), None

    def __init__(self, kind: DistributedType):
        self.distributed_type = kind

    def wait_for_everyone(self) -> None:
        pass

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        return tensor


def sharded(model: Sam3LiteModel) -> Sam3LiteModel:
    """As Accelerate does it under FSDP."""
    for layer in (*model.vision_encoder.backbone.layers, *model.detr_encoder.layers, *model.detr_decoder.layers):
        fully_shard(layer, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, mp_policy=MixedPrecisionPolicy())
    return model


def take_step(model: Sam3LiteModel, optimizer: torch.optim.Optimizer, inputs: dict) -> dict[str, torch.Tensor]:
    """The adapters after it."""
    torch.manual_seed(0)
    model(**inputs, labels=make_labels()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return {name: value.clone() for name, value in joined(adapter_state(model)).items()}


def moments_of(optimizer: torch.optim.Optimizer, name: str) -> list[torch.Tensor]:
    return [joined(own)[name].clone() for own in optimizer.state_dict()["state"].values()]


def test_sharded_adapters_train_like_whole_ones_and_go_on_from_the_same_few_files(model, inputs, tmp_path):
    whole, parts = OneProcess(DistributedType.NO), OneProcess(DistributedType.FSDP)
    settings, folder = OptimizationArguments(learning_rate=1e-2), tmp_path / "last"

    def start(accelerator: OneProcess, seed: int = 3) -> tuple:
        trained = adapted(model, seed=seed).train()
        trained = sharded(trained) if accelerator is parts else trained
        return trained, build_optimizer(trained, settings, fused=False)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trained, optimizer = start(whole)
        take_step(trained, optimizer, inputs)
        expected = moments_of(optimizer, "exp_avg")
        trained, optimizer = start(parts)
        saved = take_step(trained, optimizer, inputs)
        moments = moments_of(optimizer, "exp_avg")
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(moments, expected, strict=True))
        save_checkpoint(parts, folder, trained, optimizer, None, {"step": 1})
        names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
        assert names == {"adapter.safetensors", "optimizer.pt", "config.json", "trainer_state.json"}
        after = take_step(trained, optimizer, inputs)
        for reader in (parts, whole):
            again, optimizer = start(reader, seed=4)
            load_checkpoint(reader, folder, again, optimizer, None)
            found = joined(adapter_state(again))
            assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
            assert all(map(torch.equal, moments_of(optimizer, "exp_avg"), moments))
            if reader is parts:
                found = take_step(again, optimizer, inputs)
                assert all(torch.equal(found[name], after[name]) for name in after)
    finally:
        torch.distributed.destroy_process_group()
