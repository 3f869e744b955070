"""What is computed in another way than in stock SAM 3: equal outputs and gradients, and less of what it saves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_labels, micro_config, shake, stock_config
from counting import Counter, fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam3.modeling_sam3 import (
    Sam3DetrEncoder,
    Sam3MaskDecoder,
    Sam3SinePositionEmbedding,
    Sam3ViTModel,
)

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, detr_sam3_lite, recomputation_sam3_lite, vision_sam3_lite
from sam3_hf.detr_sam3_lite import additive_mask
from sam3_hf.masks_sam3_lite import conv_of_upsampled
from sam3_hf.precision_sam3_lite import GroupNorm, LayerNorm
from sam3_hf.recomputation_sam3_lite import recomputed


@pytest.fixture(autouse=True)
def everything_is_worth_recomputing(monkeypatch):
    """As in models of full size."""
    monkeypatch.setattr(recomputation_sam3_lite, "WORTH_IT", 0)


def saved_bytes(function) -> int:
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output is not None
    return sum(kept.values())


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    assert ours and ours.keys() <= theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5 * max(scale, 1.0), msg=name)


def weighted(*tensors: torch.Tensor) -> torch.Tensor:
    """A sum that tells every element from every other."""
    generator = torch.Generator().manual_seed(5)
    return sum((tensor * torch.randn(tensor.shape, generator=generator)).sum() for tensor in tensors)


def vit_config(**overrides):
    sizes = {"vision_num_hidden_layers": 6, "vision_global_attn_indexes": [2, 5], **overrides}
    config = micro_config(**sizes).vision_config.backbone_config
    config._attn_implementation = "sdpa"
    return config


def vits(config) -> tuple[nn.Module, nn.Module]:
    ours = shake(vision_sam3_lite.Sam3LiteViTModel(config)).train()
    stock = Sam3ViTModel(config).train()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("window", [4, 3])  # 3 does not divide the grid of 8 patches
def test_vit_equals_stock_with_gradients(window):
    ours, stock = vits(vit_config(vision_window_size=window))
    pixels = torch.randn(2, 3, 64, 64)
    outputs = [model(pixels).last_hidden_state for model in (ours, stock)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for output in outputs:
        weighted(output).backward()
    assert_same_gradients(gradients(ours), gradients(stock))


def test_tokens_go_into_windows_once_per_run_of_windowed_layers(monkeypatch):
    ours, _ = vits(vit_config())
    calls = []
    partition = vision_sam3_lite.window_partition
    monkeypatch.setattr(vision_sam3_lite, "window_partition", lambda *args: calls.append(1) or partition(*args))
    ours(torch.randn(1, 3, 64, 64))
    assert len(calls) == 2


@pytest.mark.parametrize("window", [4, 3])
def test_vit_computes_no_more_than_stock(window):
    """Nor for the tokens that fill windows over the edge: 17 beside 64 with windows of 3."""
    counts = []
    for model in vits(vit_config(vision_window_size=window)):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vit_starts_fewer_kernels_and_keeps_less_under_autocast(dtype):
    models = vits(vit_config())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        kept = [saved_bytes(lambda model=model: model(pixels)) for model in models]
        counts = []
        for model in models:
            with Counter(device="cpu") as counter:
                model(pixels)
            counts.append(counter.kernels)
    assert kept[0] < kept[1]
    assert counts[0] < 0.7 * counts[1]


def test_the_vit_makes_again_what_costs_little_and_no_wide_product():
    ours, stock = vits(vit_config())
    pixels = torch.randn(1, 3, 64, 64)
    kept, backward = [], []
    for model in (ours, stock):
        kept.append(saved_bytes(lambda model=model: model(pixels)))
        output = model(pixels).last_hidden_state.sum()
        with FlopCounterMode(display=False) as counter:
            output.backward()
        backward.append(counter.get_total_flops())
    layers, width, patches = ours.config.num_hidden_layers, ours.config.hidden_size, 64
    assert backward[0] - backward[1] == layers * 2 * patches * width**2  # the projections behind the attention
    stream_normed_activated = layers * (2 * width + ours.config.intermediate_size)
    assert kept[1] - kept[0] >= stream_normed_activated * patches * 4  # bytes


def test_detr_encoder_keeps_nothing_wider_than_the_model(model):
    encoder = model.detr_encoder.train()
    wide = model.config.detr_encoder_config.intermediate_size
    vision = torch.randn(1, 64, 64, requires_grad=True)
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder(vision, torch.tensor([0, 0]), torch.randn(2, 5, 64), torch.randn(1, 64, 64), None)
    activations = [shape for shape in shapes if shape[-1] == wide and 64 in shape[:-1] and len(shape) > 2]
    assert shapes and not activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm, ours", [(nn.LayerNorm(64), LayerNorm(64)), (nn.GroupNorm(8, 64), GroupNorm(8, 64))])
def test_norms_in_half_are_as_exact_as_those_of_autocast(norm, ours, dtype):
    """Autocast on CUDA makes float32 of half, of which the next product makes half again."""
    shake(norm)
    ours.load_state_dict(norm.state_dict())
    tensor = torch.randn(3, 64, 64, dtype=dtype) * 5 + 2
    exact = copy.deepcopy(norm).double()(tensor.double())
    as_autocast = norm(tensor.float()).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (as_autocast - exact).abs().max() <= tolerance
    with torch.autocast("cpu", dtype=dtype):
        found = ours(tensor)
    assert found.dtype == dtype and (found - exact).abs().max() <= tolerance


def test_norms_under_autocast_of_cuda_stay_in_half():
    with fake_cuda(grid_side=8), torch.autocast("cuda", torch.float16):
        tensor = torch.empty(3, 64, 64, dtype=torch.float16)
        assert nn.LayerNorm(64)(tensor).dtype == torch.float32
        assert LayerNorm(64)(tensor).dtype == torch.float16


class Layouts(TorchDispatchMode):
    """Notes whether maps of convolutions are channels-last, but for those from pixels, to one channel or of no box."""

    def __init__(self):
        super().__init__()
        self.channels_last = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_convolution = function is torch.ops.aten.convolution.default and args[0].numel() > 0
        if is_convolution and args[0].shape[1] > 3 and result.shape[1] > 1:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return result


@pytest.mark.parametrize("image_index", [[0, 1, 2], [0, 0, 0, 0, 1, 2]])
@pytest.mark.parametrize("norm_keeps_layout", [True, False])  # which on CUDA older PyTorch does not
def test_convolutions_work_on_channels_last_maps(
    config, no_cached_positions, monkeypatch, image_index, norm_keeps_layout
):
    """The layout that tensor cores want: ViT and DETR encoder leave features of a cell together."""
    if not norm_keeps_layout:
        norm = GroupNorm.forward
        monkeypatch.setattr(GroupNorm, "forward", lambda self, maps: norm(self, maps).contiguous())
    with fake_cuda(grid_side=8), Layouts() as layouts:
        Sam3LiteModel(config).eval()(
            pixel_values=torch.empty(3, 3, 64, 64),
            text_embeds=torch.empty(len(image_index), 8, 64),
            attention_mask=torch.ones(len(image_index), 8),
            image_index=torch.tensor(image_index),
        )
    assert len(layouts.channels_last) >= 9 + 2 and all(layouts.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_convolution_of_upsampled_map(size):
    conv = nn.Conv2d(6, 4, 3, padding=1, bias=False).double()
    other = copy.deepcopy(conv)
    pixels = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    twin = pixels.detach().clone().requires_grad_()
    found, expected = conv_of_upsampled(conv, pixels), other(F.interpolate(twin, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for output in (found, expected):
        weighted(output).backward()
    torch.testing.assert_close(pixels.grad, twin.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv.weight.grad, other.weight.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("image_index", [[0, 1], [0, 0, 1, 1, 1, 0]])  # each on its own, and with shared work
def test_mask_head_equals_stock_with_gradients(model, image_index):
    ours = model.mask_decoder.train()
    stock = Sam3MaskDecoder(stock_config(model.config).mask_decoder_config).train()
    stock.load_state_dict(ours.state_dict(), strict=False)
    index = torch.tensor(image_index)
    prompts = len(index)
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(2, 64, side, side, generator=generator) for side in (32, 16, 8)]
    encoded, queries = (torch.randn(prompts, n, 64, generator=generator) for n in (64, 12))
    text = torch.randn(prompts, 5, 64, generator=generator)
    mask = torch.arange(5) < torch.arange(prompts)[:, None] % 5 + 1
    inputs = [tensor.requires_grad_() for tensor in (*levels, encoded, queries)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    pixels = ours(tuple(inputs[:3]), encoded, index, text, additive_mask(mask, torch.float32))
    semantic = ours.semantic_projection(pixels)
    masks = ours.masks(queries, pixels)
    expected = stock(twins[4], [level[index] for level in twins[:3]], twins[3], text, mask)
    torch.testing.assert_close(masks, expected.pred_masks, rtol=0, atol=2e-5)
    torch.testing.assert_close(semantic, expected.semantic_seg, rtol=0, atol=1e-5)
    for outputs in ((masks, semantic), (expected.pred_masks, expected.semantic_seg)):
        weighted(*outputs).backward()
    assert_same_gradients(gradients(ours), gradients(stock))
    for ours_input, twin in zip(inputs, twins, strict=True):
        if twin.grad is not None:  # the coarsest level is only read for its size
            torch.testing.assert_close(ours_input.grad, twin.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_groups_of_prompts_share_the_convolutions_of_their_image(model, inputs):
    features = model.get_text_features(inputs["input_ids"]).pooler_output
    vision = model.get_vision_features(inputs["pixel_values"][:1])

    def convolutions(**how) -> int:
        with FlopCounterMode(display=False) as counter:
            model(vision_embeds=vision, text_embeds=torch.cat([features, features]), **how)
        return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]

    assert convolutions() == convolutions(prompt_chunk_size=2) == convolutions(prompt_chunk_size=1)


@torch.no_grad()
def test_mask_head_leaves_out_images_in_which_nothing_is_found(model, inputs, monkeypatch):
    features = model.get_text_features(inputs["input_ids"][:2]).pooler_output[[0, 0, 1, 1]]
    vision = model.get_vision_features(inputs["pixel_values"])
    prompts = {"text_embeds": features, "image_index": torch.tensor([0, 1, 1, 2])}
    expected = model(vision_embeds=vision, **prompts).pred_masks
    seen, share, predict = [], model.mask_decoder.shared_maps, model._predictions

    def watched(levels, num_prompts):
        seen.append(len(levels[0]))
        return share(levels, num_prompts)

    def present_in_the_second(found, *args):
        output = predict(found, *args)
        output.presence_logits[:] = torch.tensor([-50.0, 50.0, 50.0, -50.0])[:, None]
        output.pred_logits[:] = torch.arange(output.pred_logits.shape[1]) - 5.5
        return output

    monkeypatch.setattr(model.mask_decoder, "shared_maps", watched)
    monkeypatch.setattr(model, "_predictions", present_in_the_second)
    found = model.find(vision, **prompts, attention_mask=torch.ones(features.shape[:2]), threshold=0.5)
    assert seen == [1] and found.prompt_index.unique().tolist() == [1, 2]
    torch.testing.assert_close(found.mask_logits, expected[1:3, 6:].flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_index", [[1, 0], [0, 0, 1]])
def test_detr_encoder_equals_stock_with_gradients(model, image_index):
    ours = model.detr_encoder.train()
    stock = Sam3DetrEncoder(model.config.detr_encoder_config).train()
    stock.load_state_dict(ours.state_dict())
    index = torch.tensor(image_index)
    vision, text = torch.randn(2, 64, 64), torch.randn(len(index), 5, 64)
    position, bias = torch.randn(1, 64, 64), additive_mask(torch.arange(5)[None] < 3, torch.float32)
    found = ours(vision, index, text, position, bias)
    expected = vision[index]
    for layer in stock.layers:
        expected = layer(expected, text, position, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for output in (found, expected):
        weighted(output).backward()
    assert_same_gradients(gradients(ours), gradients(stock))


def loss_and_gradients(model, inputs: dict, **step) -> tuple[float, dict]:
    model.zero_grad()
    torch.manual_seed(4)
    loss = model(**inputs, **step, labels=[*make_labels(), *make_labels()]).loss
    loss.backward()
    return loss.item(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def test_prompts_of_one_image_train_as_those_of_copies_of_it(model, inputs):
    model.train()
    pixels = inputs.pop("pixel_values")[:1]
    six = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    together = loss_and_gradients(model, six, pixel_values=pixels)
    apart = loss_and_gradients(model, six, pixel_values=pixels.repeat(6, 1, 1, 1))
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    assert_same_gradients(together[1], apart[1])


RECOMPUTED = {  # what is made again of a step, by the function or module that makes it
    "widen": vision_sam3_lite,
    "rest": vision_sam3_lite,
    "Sam3FPNLayer": vision_sam3_lite,
    "attend_to_prompt": detr_sam3_lite,
    "transform": detr_sam3_lite,
    "attend_to_vision": detr_sam3_lite,
}


class DroppingLinear(nn.Linear):
    """A layer that draws random numbers, such as an adapter with dropout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(input), 0.3)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_changes_no_gradient_and_keeps_less(model, inputs, monkeypatch, name, adapters):
    model.train()
    for module in model.modules():
        if adapters and type(module) is nn.Linear:
            module.__class__ = DroppingLinear
    six = {key: torch.cat([value, value]) for key, value in inputs.items()}
    made_again = loss_and_gradients(model, six)
    less = saved_bytes(lambda: model(**inputs, labels=make_labels()).loss)

    def all_but_one(function, *tensors: torch.Tensor):
        called = getattr(function, "__name__", type(function).__name__)
        return function(*tensors) if called == name else recomputed(function, *tensors)

    monkeypatch.setattr(RECOMPUTED[name], "recomputed", all_but_one)
    kept = loss_and_gradients(model, six)
    assert made_again[0] == pytest.approx(kept[0], rel=1e-6)
    assert_same_gradients(made_again[1], kept[1])
    assert less < saved_bytes(lambda: model(**inputs, labels=make_labels()).loss)


def test_miniatures_are_not_recomputed(model, inputs, monkeypatch):
    model.train()
    six = {key: torch.cat([value, value]) for key, value in inputs.items()}
    again = loss_and_gradients(model, six)
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(recomputation_sam3_lite, "checkpoint", lambda *args, **kwargs: calls.append(args))
    kept = loss_and_gradients(model, six)
    assert not calls and again[0] == kept[0]
    assert_same_gradients(again[1], kept[1])


def test_a_neck_keeps_less_behind_a_frozen_vit_as_well(model, monkeypatch):
    vision = model.vision_encoder.train()
    vision.backbone.requires_grad_(False)
    pixels = torch.randn(1, 3, 64, 64)
    less = saved_bytes(lambda: vision(pixels))
    monkeypatch.setattr(vision_sam3_lite, "recomputed", lambda function, *tensors: function(*tensors))
    assert less < 0.5 * saved_bytes(lambda: vision(pixels))


def test_repeated_and_padded_words_are_encoded_once(model):
    encoder = model.text_encoder.train()
    ids = torch.randint(3, 1000, (3, 32))
    mask = (torch.arange(32) < torch.tensor([[5], [11], [7]])).long()
    ids, mask = ids[[0, 1, 2, 0]], mask[[0, 1, 2, 0]]
    shapes = []
    hook = encoder.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = encoder(ids, mask).last_hidden_state
    hook.remove()
    expected = encoder.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert shapes == [(3, 16)]
    valid = mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)
    weighted(found[valid]).backward()
    ours = {name: gradient.clone() for name, gradient in gradients(encoder).items()}
    encoder.zero_grad()
    weighted(expected[valid]).backward()
    assert_same_gradients(ours, gradients(encoder))


@pytest.fixture
def no_cached_positions(monkeypatch):
    """Position encodings made anew: a cache would mix those of fake tensors and of real ones."""
    encode = Sam3SinePositionEmbedding.build_sine_position_embedding
    uncached = staticmethod(encode.__wrapped__)
    monkeypatch.setattr(Sam3SinePositionEmbedding, "build_sine_position_embedding", uncached)


def test_inference_reads_nothing_back_from_the_device(config, no_cached_positions):
    """Fake tensors have no values: whatever reads one fails."""
    with FakeTensorMode():
        outputs = Sam3LiteModel(config).eval()(
            pixel_values=torch.empty(2, 3, 64, 64),
            text_embeds=torch.empty(4, 8, 64),
            attention_mask=torch.ones(4, 8),
            image_index=torch.zeros(4, dtype=torch.long),
        )
    assert outputs.pred_masks.shape == (4, 12, 32, 32)


def test_masks_of_matched_queries_read_nothing_back_from_the_device(config):
    """Neither have tensors on the meta device; the matching is on the CPU."""
    with torch.device("meta"):
        head = Sam3LiteModel(config).mask_decoder
        queries, pixels = torch.empty(4, 12, 64), torch.empty(4, 64, 32, 32)
    masks = head.matched_masks(queries, pixels, torch.tensor([0, 2, 2]), torch.tensor([3, 1, 0]))
    assert masks.device.type == "meta" and masks.shape == (3, 32, 32)


def test_kernels_of_a_step_hardly_grow_with_the_prompts(model, inputs):
    model.train()

    def kernels(copies: int) -> int:
        repeated = {name: torch.cat([value] * copies) for name, value in inputs.items() if name != "pixel_values"}
        index = torch.arange(3).repeat(copies)
        with Counter(device="cpu") as counter:
            model(pixel_values=inputs["pixel_values"], **repeated, image_index=index, labels=make_labels() * copies)
        return counter.kernels

    # Of each three prompts, two have masks: to take apart, move, join into a target and multiply with their pixels.
    assert kernels(8) - kernels(4) <= 4 * 2 * 15


def test_another_class_costs_less_than_a_twelfth_of_a_vision_pass():
    """By arithmetic, at full size, where the class is absent and the mask head does not run for it."""
    with torch.device("meta"), torch.no_grad():
        model = Sam3LiteModel(Sam3LiteConfig.from_preset("lite")).eval()
        with FlopCounterMode(display=False) as counter:
            levels = model.get_vision_features(torch.empty(1, 3, 1008, 1008)).fpn_hidden_states
        vision, detector = counter.get_total_flops(), []
        for prompts in (8, 9):
            index = torch.zeros(prompts, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model.detect(levels, index, torch.empty(prompts, 8, 256), None, None, None, False)
            detector.append(counter.get_total_flops())
    assert (detector[1] - detector[0]) / vision <= 0.08
