"""
What Transformers asks of every configuration and model. Its own common cases (`ConfigTester`, `ModelTesterMixin`) are
not part of the installed library; these are the ones that apply.
"""

import copy
import inspect
import json
import pickle

import pytest
import torch
from conftest import largest_difference, make_labels, micro_config
from torch import nn
from transformers import AutoConfig, AutoModel, set_seed
from transformers.modeling_outputs import ModelOutput

from sam3_hf import Sam3LiteConfig, Sam3LiteModel

PARTS = (
    "vision_config",
    "text_config",
    "geometry_encoder_config",
    "detr_encoder_config",
    "detr_decoder_config",
    "mask_decoder_config",
)

# What does not hold yet.


def assert_equal(first, second) -> None:
    """Of outputs, dicts, tuples and tensors in them."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, atol=0, rtol=0)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (tuple, list)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@torch.no_grad()
def outputs_of(model, inputs, **kwargs):
    set_seed(0)
    return model(**inputs, **kwargs)


class TestConfig:
    def test_common_properties(self, config):
        assert set(Sam3LiteConfig.sub_configs) >= set(PARTS)
        for name in (*PARTS, "loss_config", "image_size", "initializer_range"):
            value = getattr(config, name)
            setattr(config, name, value)
            assert getattr(config, name) == value

    def test_without_arguments(self):
        assert Sam3LiteConfig().to_dict() == Sam3LiteConfig().to_dict()

    def test_to_json_string(self, config):
        fields = json.loads(config.to_json_string(use_diff=False))
        assert fields["model_type"] == "sam3_lite" and fields["initializer_range"] == config.initializer_range
        assert fields["detr_decoder_config"]["num_queries"] == 12

    def test_to_json_file(self, config, tmp_path):
        config.to_json_file(tmp_path / "config.json")
        assert Sam3LiteConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()

    @pytest.mark.parametrize("subfolder", ["", "sub"])
    def test_save_and_load(self, config, tmp_path, subfolder):
        config.save_pretrained(tmp_path / subfolder)
        for config_class in (Sam3LiteConfig, AutoConfig):
            loaded = config_class.from_pretrained(tmp_path, subfolder=subfolder)
            assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
            assert type(loaded) is Sam3LiteConfig

    def test_parts_load_from_the_file_of_the_whole(self, config, tmp_path):
        config.save_pretrained(tmp_path)
        for name in PARTS:
            part = getattr(config, name)
            if type(part).base_config_key:
                loaded = {**type(part).from_pretrained(tmp_path).to_dict(), "_name_or_path": ""}
                assert loaded == part.to_dict(), name

    def test_parts_keep_their_classes(self, config, tmp_path):
        config.save_pretrained(tmp_path)
        loaded = Sam3LiteConfig.from_pretrained(tmp_path)
        assert [type(getattr(loaded, name)) for name in PARTS] == [type(getattr(config, name)) for name in PARTS]

    def test_loading_with_keywords(self, config, tmp_path):
        config.save_pretrained(tmp_path)
        loaded, unused = Sam3LiteConfig.from_pretrained(
            tmp_path, initializer_range=0.5, nothing_of_the_kind=1, return_unused_kwargs=True
        )
        assert loaded.initializer_range == 0.5 and unused == {"nothing_of_the_kind": 1}

    def test_num_labels(self):
        config = Sam3LiteConfig(num_labels=5)
        assert len(config.id2label) == len(config.label2id) == 5
        config.num_labels = 3
        assert len(config.id2label) == len(config.label2id) == 3

    @pytest.mark.parametrize(
        "common", [{"output_hidden_states": True}, {"return_dict": False}, {"dtype": "float16"}, {"name_or_path": "x"}]
    )
    def test_common_keywords(self, common):
        ((name, value),) = common.items()
        config = Sam3LiteConfig(**common)
        found = getattr(config, name)
        assert found == value or found == getattr(torch, str(value))

    def test_copies(self, config):
        for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), Sam3LiteConfig(**config.to_dict())):
            assert other.to_dict() == config.to_dict() and other.detr_decoder_config is not config.detr_decoder_config

    def test_attention_reaches_the_parts(self):
        config = micro_config(attn_implementation="eager")
        assert config._attn_implementation == "eager"
        assert {getattr(config, name)._attn_implementation for name in PARTS} == {"eager"}


class TestForward:
    def test_signature(self, model):
        names = list(inspect.signature(model.forward).parameters)
        assert names[0] == model.main_input_name == "pixel_values"
        assert {"input_ids", "attention_mask", "labels"} <= set(names)

    def test_further_keywords_are_taken(self, model):
        kinds = [parameter.kind for parameter in inspect.signature(Sam3LiteModel.forward).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds

    def test_determinism(self, model, box_inputs):
        first, second = (outputs_of(model, box_inputs) for _ in range(2))
        assert_equal(first, second)
        assert all(value.isfinite().all() for value in first.values())

    @pytest.mark.parametrize("with_labels", [False, True])
    def test_tuples_equal_outputs(self, model, inputs, with_labels):
        given = {**inputs, "labels": make_labels()} if with_labels else inputs
        output, plain = outputs_of(model, given), outputs_of(model, given, return_dict=False)
        assert isinstance(output, ModelOutput) and isinstance(plain, tuple)
        assert_equal(output.to_tuple(), plain)
        if with_labels:
            assert plain[0] is not None and plain[0].ndim == 0  # the loss comes first

    def test_tuples_by_the_configuration(self, model, inputs):
        expected = outputs_of(model, inputs).to_tuple()
        model.config.return_dict = False
        assert_equal(outputs_of(model, inputs), expected)

    def test_outputs_are_pickled(self, model, inputs):
        output = outputs_of(model, inputs)
        assert_equal(pickle.loads(pickle.dumps(output)), output)

    def test_a_batch_gives_what_its_rows_give(self, model, inputs):
        whole = outputs_of(model, inputs)
        for row in range(3):
            alone = outputs_of(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
            assert largest_difference(alone, {name: tensor[row : row + 1] for name, tensor in whole.items()}) < 1e-4

    @pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
    @pytest.mark.parametrize("by", ["argument", "config"])
    def test_what_is_asked_for_is_recorded_or_refused(self, config, inputs, name, by):
        config._attn_implementation = "eager"
        recorded = {"output_attentions": "attentions", "output_hidden_states": "hidden_states"}[name]
        try:
            if by == "config":
                setattr(config, name, True)
            model = Sam3LiteModel(config).eval()
            output = outputs_of(model, inputs, **({name: True} if by == "argument" else {}))
        except (ValueError, TypeError) as error:
            assert name in str(error)
        else:
            assert any(key.endswith(recorded) and len(value) for key, value in output.items() if value is not None)


class TestAttention:
    @pytest.mark.parametrize("with_boxes", [False, True])
    def test_eager_equals_sdpa(self, config, model, inputs, box_inputs, tmp_path, with_boxes):
        given = box_inputs if with_boxes else inputs
        model.save_pretrained(tmp_path)
        outputs = {}
        for name in ("eager", "sdpa"):
            loaded = Sam3LiteModel.from_pretrained(tmp_path, attn_implementation=name)
            used = {module.config._attn_implementation for module in loaded.modules() if hasattr(module, "config")}
            assert used == {name}
            outputs[name] = outputs_of(loaded, given)
        assert largest_difference(outputs["eager"], outputs["sdpa"]) < 1e-4

    def test_it_can_be_set_later(self, model, inputs):
        before = outputs_of(model, inputs)
        model.set_attn_implementation("eager")
        used = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
        assert used == {"eager"}
        assert largest_difference(outputs_of(model, inputs), before) < 1e-4

    def test_one_that_does_not_exist_is_refused(self, config):
        with pytest.raises((ValueError, ImportError), match="no_such_attention"):
            Sam3LiteModel._from_config(config, attn_implementation="no_such_attention")


class TestInitialisation:
    def test_parameters_are_in_range(self, config):
        for name, parameter in Sam3LiteModel(config).named_parameters():
            assert parameter.isfinite().all() and parameter.mean().abs() <= 1.0, name
            assert parameter.std(correction=0) < 2, name

    def test_the_seed_decides(self, config):
        models = []
        for seed in (0, 0, 1):
            set_seed(seed)
            models.append(Sam3LiteModel(copy.deepcopy(config)))
        first, second, third = (model.state_dict() for model in models)
        assert_equal(dict(first), dict(second))
        assert any(not torch.equal(tensor, third[name]) for name, tensor in first.items())

    def test_what_a_file_lacks_is_initialised(self, config, tmp_path):
        set_seed(0)
        model = Sam3LiteModel(config)
        weights = {name: tensor for name, tensor in model.state_dict().items() if "detr_decoder" not in name}
        loaded, info = Sam3LiteModel.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
        assert info["missing_keys"] == set(model.state_dict()) - set(weights)
        for name, tensor in loaded.state_dict().items():
            expected = model.state_dict()[name]
            assert tensor.device.type == "cpu" and tensor.isfinite().all(), name
            if name in weights or expected.std(correction=0) == 0:
                assert torch.equal(tensor, expected), name
            elif tensor.numel() > 500:
                assert tensor.std() == pytest.approx(expected.std().item(), rel=0.2), name
            assert (tensor.std(correction=0) == 0) == (expected.std(correction=0) == 0), name

    def test_buffers_that_are_not_saved_are_made_when_loading(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert_equal(dict(Sam3LiteModel.from_pretrained(tmp_path).named_buffers()), dict(model.named_buffers()))


class TestSaving:
    def test_outputs_are_equal(self, model, box_inputs, tmp_path):
        expected = outputs_of(model, box_inputs)
        model.save_pretrained(tmp_path)
        for model_class in (Sam3LiteModel, AutoModel):
            assert_equal(outputs_of(model_class.from_pretrained(tmp_path), box_inputs), expected)

    def test_shards(self, model, inputs, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_equal(outputs_of(Sam3LiteModel.from_pretrained(tmp_path), inputs), outputs_of(model, inputs))

    def test_nothing_is_missing_or_unexpected(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        _, info = Sam3LiteModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info

    @pytest.mark.parametrize("whole", [False, True])
    def test_torch_save(self, model, inputs, tmp_path, whole):
        expected = outputs_of(model, inputs)
        torch.save(model if whole else model.state_dict(), tmp_path / "model.bin")
        loaded = torch.load(tmp_path / "model.bin", weights_only=not whole)
        if not whole:
            other = Sam3LiteModel(model.config).eval()
            other.load_state_dict(loaded)
            loaded = other
        assert_equal(outputs_of(loaded, inputs), expected)

    def test_no_parameter_is_stored_twice(self, model):
        places = [parameter.data_ptr() for parameter in model.parameters()]
        assert len(places) == len(set(places))

    def test_other_sizes_are_refused_unless_told(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises((RuntimeError, ValueError), match="vocab_size|text_encoder|token_embedding"):
            Sam3LiteModel.from_pretrained(tmp_path, config=micro_config(text_config={"vocab_size": 1030}))
        loaded = Sam3LiteModel.from_pretrained(
            tmp_path, config=micro_config(text_config={"vocab_size": 1030}), ignore_mismatched_sizes=True
        )
        assert loaded.config.text_config.vocab_size == 1030
        assert torch.equal(loaded.text_projection.weight, model.text_projection.weight)


class TestPrecisionAndDevices:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dtype(self, model, tmp_path, dtype):
        model.to(dtype).save_pretrained(tmp_path)
        for given, expected in ((None, dtype), ("auto", dtype), (torch.float32, torch.float32), ("float32",) * 2):
            loaded = Sam3LiteModel.from_pretrained(tmp_path, **({} if given is None else {"dtype": given}))
            expected = getattr(torch, expected) if isinstance(expected, str) else expected
            floats = {p.dtype for p in loaded.parameters()}
            assert floats == {expected} and loaded.dtype == loaded.config.dtype == expected

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_it_runs_in_half(self, model, inputs, dtype):
        expected = outputs_of(model, inputs)
        model = model.half() if dtype == torch.float16 else model.bfloat16()
        output = outputs_of(model, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        assert output.pred_masks.dtype == dtype
        assert largest_difference(output, expected) < (0.05 if dtype == torch.float16 else 0.5)

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
    def test_device_map(self, model, inputs, tmp_path, device_map):
        model.save_pretrained(tmp_path)
        loaded = Sam3LiteModel.from_pretrained(tmp_path, device_map=device_map)
        assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))

    def test_on_the_meta_device(self, config, model, tmp_path):
        with torch.device("meta"):
            empty = Sam3LiteModel(copy.deepcopy(config))
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
        model.save_pretrained(tmp_path)
        mapped = Sam3LiteModel.from_pretrained(tmp_path, device_map="meta")
        assert {parameter.device.type for parameter in mapped.parameters()} == {"meta"}

    def test_layers_that_stay_on_one_device_exist(self, model):
        classes = {type(module).__name__ for module in model.modules()}
        assert set(Sam3LiteModel._no_split_modules) <= classes


class TestTraining:
    def test_every_parameter_gets_a_gradient(self, config, box_inputs):
        model = Sam3LiteModel(config).train()
        model(**box_inputs, labels=make_labels()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_gradient_checkpointing_is_switched(self, model):
        assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
        model.gradient_checkpointing_enable()
        switched = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        assert switched and all(module.gradient_checkpointing for module in switched)
        assert model.is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
        assert not any(module.gradient_checkpointing for module in switched)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_gradient(self, model, inputs, use_reentrant):
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.zero_grad()
            model.train()
            set_seed(0)
            model(**inputs, labels=make_labels()).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        largest = max(gradient.abs().max() for gradient in gradients[0].values())
        for name, gradient in gradients[0].items():
            scale = gradient.abs().max().clamp(min=1e-3 * largest)  # that of a key's bias is zero but for rounding
            assert (gradients[1][name] - gradient).abs().max() / scale < 1e-3, name

    def test_a_frozen_part_stays_as_it_is(self, model, inputs):
        model.vision_encoder.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.train()(**inputs, labels=make_labels()).loss.backward()
        optimizer.step()
        moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
        assert "vision_encoder" not in moved and {"text_encoder", "detr_decoder", "mask_decoder"} <= moved

    def test_the_loss_goes_down(self, config, inputs):
        set_seed(0)
        model = Sam3LiteModel(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            loss = model(**inputs, labels=make_labels()).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[-3:]) < losses[0]
