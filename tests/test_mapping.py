import json
import math

import pytest
import torch
from conftest import micro_config, shake, with_padding_box
from transformers import Sam3Model

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.checkpoints import open_checkpoint
from sam3_hf.mapping import MappingReport, map_checkpoint
from sam3_hf.mapping.basis import rotation, selection
from sam3_hf.mapping.depth import KNOWN_DEPTHS, depth_map
from sam3_hf.mapping.mapper import Mapper
from sam3_hf.mapping.signals import activation_moments

PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")
VIT = "vision_encoder.backbone"
NECK = "vision_encoder.neck.fpn_layers"


def relative_error(result, expected) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def wide_config(**overrides) -> Sam3LiteConfig:
    """Width 64 in four heads, four layers; the text encoder has two."""
    sizes = {
        "vision_hidden_size": 64,
        "vision_num_attention_heads": 4,
        "vision_intermediate_size": 296,
        "vision_num_hidden_layers": 4,
        "vision_global_attn_indexes": [1, 3],
        "text_num_hidden_layers": 2,
        "detr_encoder_layers": 3,
        "detr_decoder_layers": 3,
    }
    return micro_config(**{**sizes, **overrides})


def make(config: Sam3LiteConfig) -> Sam3LiteModel:
    torch.manual_seed(0)
    return shake(Sam3LiteModel(config)).eval()


@pytest.fixture
def wide() -> Sam3LiteModel:
    return make(wide_config())


@pytest.fixture
def source(wide, tmp_path):
    wide.to_sam3().save_pretrained(tmp_path / "standard")
    return tmp_path / "standard"


def narrow_config(**overrides) -> Sam3LiteConfig:
    sizes = {
        "vision_hidden_size": 48,
        "vision_num_attention_heads": 3,
        "vision_intermediate_size": 222,
        "vision_num_hidden_layers": 2,
        "vision_global_attn_indexes": [1],
        "detr_encoder_layers": 2,
        "detr_decoder_layers": 2,
        "text_num_hidden_layers": 2,
    }
    return micro_config(**{**sizes, **overrides})


# --- the algebra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 9, 2])
def test_a_rotation_commutes_with_layer_norm(size):
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(16, 5, generator=generator)
    basis = rotation(factor @ factor.T, size)
    matrix = basis.matrix
    assert matrix.shape == (16, size)
    assert torch.allclose(matrix.T @ matrix, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.sum(0), torch.full((size,), math.sqrt(16 / size)), atol=1e-5)
    stream = torch.randn(7, size, generator=generator)  # what lies in the kept directions
    normed = torch.nn.functional.layer_norm(stream, (size,), eps=0)
    wide = torch.nn.functional.layer_norm(stream @ matrix.T, (16,), eps=0)
    assert torch.allclose(normed, math.sqrt(size / 16) * wide @ matrix, atol=1e-4)


def test_a_rotation_keeps_the_strongest_directions():
    generator = torch.Generator().manual_seed(4)
    factor = torch.randn(12, 3, generator=generator)
    factor = factor - factor.mean(0)
    moment = factor @ factor.T
    full = rotation(moment, 4)
    assert full.energy == pytest.approx(1, abs=1e-5)
    assert torch.allclose(full.matrix @ (full.matrix.T @ factor), factor, atol=1e-4)
    values = torch.linalg.eigvalsh(moment).flip(0)
    assert rotation(moment, 3).energy == pytest.approx((values[:2].sum() / values.sum()).item(), abs=1e-5)


def test_a_selection_keeps_the_strongest_channels_in_order():
    basis = selection(torch.diag(torch.tensor([1.0, 5.0, 0.5, 3.0])), 2)
    assert torch.equal(basis.matrix, torch.eye(4)[:, [1, 3]])
    assert basis.energy == pytest.approx(8 / 9.5)


def test_activation_moments_against_samples():
    generator = torch.Generator().manual_seed(5)
    mean, variance = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.25, 1.0, 4.0])
    samples = torch.nn.functional.gelu(mean + variance.sqrt() * torch.randn(400000, 3, generator=generator))
    first, second = activation_moments(mean, variance, "gelu")
    assert torch.allclose(first, samples.mean(0), atol=0.01)
    assert torch.allclose(second, samples.var(0), atol=0.03)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("www", "www", [0, 1, 2]),
        ("wwwGwwwG", "wwGwwG", [0, 1, 3, 4, 6, 7]),
        ("wGwG", "wG", [0, 3]),
        ("wwwwww", "www", [0, 3, 5]),
        ("www", "w", [2]),
        ("wwwwww", "wwww", [0, 2, 3, 5]),
        ("wwwG", "G", [3]),
    ],
)
def test_depth_maps_keep_types_and_order(source, target, expected):
    kept = depth_map([c == "G" for c in source], [c == "G" for c in target])
    assert kept == sorted(set(kept)) and len(kept) == len(target)
    assert [source[i] for i in kept] == list(target)
    assert kept == expected


@pytest.mark.parametrize("preset", ["medium", "depth16", "lite", "small"])
def test_depth_maps_of_the_presets(preset):
    def types(name):
        vit = Sam3LiteConfig.from_preset(name).vision_config.backbone_config
        return [i in vit.global_attn_indexes for i in range(vit.num_hidden_layers)]

    kept = depth_map(types("standard"), types(preset))
    assert kept[0] == 0 and kept[-1] == 31 and len(kept) == len(types(preset))
    assert [types("standard")[i] for i in kept] == types(preset)


def test_the_known_depth_map_fits_its_types():
    for (depth, global_layers, new_depth, new_global_layers), kept in KNOWN_DEPTHS.items():
        assert len(kept) == new_depth and kept == sorted(set(kept)) and kept[-1] < depth
        assert tuple(j for j, i in enumerate(kept) if i in global_layers) == new_global_layers


def test_impossible_depth_maps_are_explained():
    with pytest.raises(ValueError, match="global_attn_indexes"):
        depth_map([False, True, False], [True, True])


# --- invariance ----------------------------------------------------------------------------------------------------


class FullRank(Mapper):
    """Rotates the residual streams without narrowing them."""

    def _basis(self, moment, width):
        return rotation(moment, width)

    def _narrows(self, old, new):
        return True


@torch.no_grad()
def test_full_rank_reproduces_the_outputs(wide, box_inputs, tmp_path):
    norm = wide.vision_encoder.backbone.layer_norm
    norm.weight.fill_(1.3)
    wide.save_pretrained(tmp_path)
    shapes = wide.parameter_shapes(wide.config)
    state, _ = FullRank(open_checkpoint(tmp_path), wide.config, shapes, "isometry", dtype=torch.float32).run()
    rotated = Sam3LiteModel(wide.config).eval()
    rotated.load_state_dict(state)
    name = f"{VIT}.layers.2.attention.q_proj.weight"
    assert relative_error(rotated.state_dict()[name], wide.state_dict()[name]) > 0.5  # it is another model...
    result, expected = rotated(**box_inputs), wide(**box_inputs)
    for key in PREDICTIONS:  # ...with the same outputs
        assert relative_error(result[key], expected[key]) <= 2e-5, key


def widen(narrow: Sam3LiteModel, config: Sam3LiteConfig) -> Sam3LiteModel:
    """
    A model of the sizes of `config` that computes what `narrow` does: its stream stays in a random subspace, and its
    further heads, neurons and channels are cut off.
    """
    generator = torch.Generator().manual_seed(6)
    wide = make(config)
    state, small = wide.state_dict(), narrow.state_dict()
    target, source = state[f"{VIT}.layer_norm.weight"].shape[0], small[f"{VIT}.layer_norm.weight"].shape[0]
    factor = torch.randn(target, source - 1, generator=generator)
    matrix = rotation(factor @ factor.T, source).matrix
    scale = math.sqrt(source / target)
    for name, tensor in small.items():
        if not name.startswith("vision_encoder"):
            state[name] = tensor
        elif name.endswith("proj2.weight") or name.endswith("proj2.bias"):
            state[name] = tensor
    embeddings = f"{VIT}.embeddings"
    patches = f"{embeddings}.patch_embeddings.projection.weight"
    state[patches] = torch.tensordot(matrix, small[patches], 1)
    state[f"{embeddings}.position_embeddings"] = small[f"{embeddings}.position_embeddings"] @ matrix.T
    state[f"{VIT}.layer_norm.weight"] = torch.full((target,), small[f"{VIT}.layer_norm.weight"][0] * scale)
    state[f"{VIT}.layer_norm.bias"] = matrix @ small[f"{VIT}.layer_norm.bias"]
    generous = torch.randperm(4, generator=generator)[:3].sort().values  # the heads in use
    channels = (generous[:, None] * 16 + torch.arange(16)).flatten()
    for i in range(narrow.config.vision_config.backbone_config.num_hidden_layers):
        layer = f"{VIT}.layers.{i}"
        neurons = torch.randperm(296, generator=generator)[:222]
        for norm in ("layer_norm1", "layer_norm2"):
            state[f"{layer}.{norm}.weight"].fill_(1)
            state[f"{layer}.{norm}.bias"].zero_()
        for module, rows in (
            ("attention.q_proj", channels),
            ("attention.k_proj", channels),
            ("attention.v_proj", channels),
            ("mlp.fc1", neurons),
        ):
            state[f"{layer}.{module}.weight"][rows] = scale * small[f"{layer}.{module}.weight"] @ matrix.T
            state[f"{layer}.{module}.bias"][rows] = small[f"{layer}.{module}.bias"]
        for module, columns in (("attention.o_proj", channels), ("mlp.fc2", neurons)):
            state[f"{layer}.{module}.weight"].zero_()
            state[f"{layer}.{module}.weight"][:, columns] = matrix @ small[f"{layer}.{module}.weight"]
            state[f"{layer}.{module}.bias"] = matrix @ small[f"{layer}.{module}.bias"]
    for level in (0, 1):
        name = f"{NECK}.{level}.scale_layers.0"
        middle = source // 2
        state[f"{name}.weight"][:, :middle] = torch.tensordot(matrix, small[f"{name}.weight"], 1)
        state[f"{name}.bias"][:middle] = small[f"{name}.bias"]
    name = f"{NECK}.0.scale_layers.2"
    state[f"{name}.weight"].zero_()
    state[f"{name}.weight"][: source // 2, : source // 4] = small[f"{name}.weight"]
    state[f"{name}.bias"][: source // 4] = small[f"{name}.bias"]
    for level, used in ((0, source // 4), (1, source // 2)):
        state[f"{NECK}.{level}.proj1.weight"].zero_()
        state[f"{NECK}.{level}.proj1.weight"][:, :used] = small[f"{NECK}.{level}.proj1.weight"]
        state[f"{NECK}.{level}.proj1.bias"] = small[f"{NECK}.{level}.proj1.bias"]
    coarse = f"{NECK}.2.proj1"
    state[f"{coarse}.weight"] = (small[f"{coarse}.weight"].flatten(1) @ matrix.T)[:, :, None, None]
    state[f"{coarse}.bias"] = small[f"{coarse}.bias"]
    wide.load_state_dict(state)
    return wide


def plain_norms(model: Sam3LiteModel) -> Sam3LiteModel:
    """Removes the affine part of the LayerNorms of the ViT, and makes the weight of the first one constant."""
    for name, parameter in model.vision_encoder.backbone.named_parameters():
        if ".layer_norm1." in name or ".layer_norm2." in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    model.vision_encoder.backbone.layer_norm.weight.data.fill_(0.8)
    return model


@torch.no_grad()
def test_a_low_rank_teacher_maps_without_loss(box_inputs, tmp_path):
    config = narrow_config()
    teacher_config = wide_config(
        vision_num_hidden_layers=2, vision_global_attn_indexes=[1], detr_encoder_layers=2, detr_decoder_layers=2
    )
    teacher = widen(plain_norms(make(config)), teacher_config)
    teacher.to_sam3().save_pretrained(tmp_path)
    model = Sam3LiteModel.from_pretrained(tmp_path, config=config)
    expected, result = teacher(**box_inputs), model(**box_inputs)
    for key in PREDICTIONS:
        assert relative_error(result[key], expected[key]) <= 3e-5, key
    energies = [row.energy for row in model.mapping_report.rows if row.energy is not None]
    assert energies and min(energies) == pytest.approx(1, abs=1e-4)
    # What the isometry finds, selecting channels cannot.
    selected = Sam3LiteModel.from_pretrained(tmp_path, config=config, mapping="select")
    assert relative_error(selected(**box_inputs)["pred_masks"], expected["pred_masks"]) > 0.05


@pytest.mark.parametrize("mapping", ["isometry", "auto"])
@torch.no_grad()
def test_a_low_rank_text_encoder_maps_without_loss(inputs, tmp_path, mapping):
    wide = make(wide_config(text_hidden_size=64, text_num_attention_heads=4))
    generator = torch.Generator().manual_seed(7)
    factor = torch.randn(64, 47, generator=generator)
    matrix = rotation(factor @ factor.T, 48).matrix
    for name, parameter in wide.text_encoder.named_parameters():
        if "embedding" in name:
            parameter.copy_(parameter @ matrix @ matrix.T)
        elif "out_proj" in name or "fc2" in name:
            parameter.copy_(matrix @ (matrix.T @ parameter))
        if name.endswith("out_proj.weight"):
            parameter[:, 16:32] = 0  # the second head
    wide.save_pretrained(tmp_path)
    config = wide_config(text_hidden_size=48, text_intermediate_size=256)
    model = Sam3LiteModel.from_pretrained(tmp_path, config=config, mapping=mapping)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    features = model.get_text_features(**text).pooler_output
    assert relative_error(features, wide.get_text_features(**text).pooler_output) <= 1e-4
    [row] = [r for r in model.mapping_report.rows if r.group.endswith("token_embedding")]
    assert row.action == "rotated" and row.target_shape == (1024, 48) and row.energy == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_narrower_is_closer_by_isometry_than_by_selection_than_by_skipping(wide, source, inputs):
    expected = wide.get_vision_features(inputs["pixel_values"]).fpn_hidden_states
    closeness = []
    for mapping in ("auto", "select", "skip"):
        torch.manual_seed(0)
        model = Sam3LiteModel.from_pretrained(
            source,
            mapping=mapping,
            config=wide_config(vision_hidden_size=48, vision_num_attention_heads=3, vision_intermediate_size=222),
        )
        levels = model.get_vision_features(inputs["pixel_values"]).fpn_hidden_states
        similarities = [
            torch.nn.functional.cosine_similarity(a, b, dim=1).mean() for a, b in zip(levels, expected, strict=True)
        ]
        closeness.append(sum(similarities).item() / 3)
    assert closeness[0] > closeness[1] > closeness[2]


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", ["isometry", "select"])  # auto is the former: the others have it
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"vision_num_hidden_layers": 4, "vision_global_attn_indexes": [1, 3]},
        {"vision_hidden_size": 64, "vision_num_attention_heads": 4, "vision_intermediate_size": 296},
        {"vision_hidden_size": 64, "vision_num_attention_heads": 4, "vision_intermediate_size": 100},
        {"vision_hidden_size": 16, "vision_num_attention_heads": 1, "vision_intermediate_size": 296},
        {"text_num_hidden_layers": 1, "detr_encoder_layers": 1, "num_queries": 7},
    ],
)
@torch.no_grad()
def test_width_and_depth_together_or_alone(source, inputs, mapping, sizes):
    model = Sam3LiteModel.from_pretrained(source, config=narrow_config(**sizes), mapping=mapping)
    totals = model.mapping_report.totals
    assert "initialized" not in totals
    mapped = sum(total["tensors"] for action, total in totals.items() if action != "dropped")
    assert mapped == len(model.state_dict())
    parameters = sum(total["parameters"] for action, total in totals.items() if action != "dropped")
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    outputs = model(**inputs)
    assert all(outputs[name].isfinite().all() for name in PREDICTIONS)


@torch.no_grad()
def test_depth_alone_copies_the_kept_layers(wide, source):
    config = wide_config(
        vision_num_hidden_layers=2, vision_global_attn_indexes=[1], detr_encoder_layers=2, detr_decoder_layers=2
    )
    model = Sam3LiteModel.from_pretrained(source, config=config)
    layers = model.mapping_report.layers
    assert set(model.mapping_report.totals) == {"copied", "dropped"}
    assert layers["detr_decoder.layers"] == [0, 2]
    for prefix, kept in layers.items():
        for j, i in enumerate(kept):
            new = {n: t for n, t in model.state_dict().items() if n.startswith(f"{prefix}.{j}.")}
            assert new
            for name, tensor in new.items():
                assert torch.equal(tensor, wide.state_dict()[name.replace(f"{prefix}.{j}.", f"{prefix}.{i}.")])


@torch.no_grad()
@pytest.mark.parametrize("mapping", ["auto", "select", "skip"])
def test_equal_sizes_are_an_exact_copy(wide, source, mapping):
    model = Sam3LiteModel.from_pretrained(source, preset="same", mapping=mapping)
    assert model.mapping_report.strategy == "copy"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in wide.state_dict().items())


def test_heads_are_kept_whole_and_in_order(wide, source):
    """Heads that add nothing to the stream go; the channels of the others keep their places within the head."""
    state = wide.state_dict()
    for i in range(4):
        state[f"{VIT}.layers.{i}.attention.o_proj.weight"][:, 16:32] = 0  # the second of four heads
    wide.load_state_dict(state)
    wide.to_sam3().save_pretrained(source)
    config = wide_config(vision_hidden_size=48, vision_num_attention_heads=3)
    model = Sam3LiteModel.from_pretrained(source, config=config, mapping="select")
    rows = torch.cat([torch.arange(16), torch.arange(32, 64)])
    for i in range(4):
        name = f"{VIT}.layers.{i}.attention.k_proj.bias"
        assert torch.equal(model.state_dict()[name], state[name][rows])


def test_a_lite_checkpoint_becomes_a_smaller_one(wide, tmp_path):
    wide.save_pretrained(tmp_path)
    model = Sam3LiteModel.from_pretrained(tmp_path, config=narrow_config(), image_size=128)
    assert model.config.image_size == 128
    assert model.config.vision_config.backbone_config.hidden_size == 48
    assert model.mapping_report.strategy == "isometry"


def test_presets(tmp_path):
    torch.manual_seed(0)
    standard = Sam3LiteModel(Sam3LiteConfig.from_preset("tiny-standard")).to_sam3()
    standard.save_pretrained(tmp_path)
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="tiny", image_size=64)
    assert model.config.image_size == 64
    assert model.config.vision_config.backbone_config.hidden_size == 96
    assert "initialized" not in model.mapping_report.totals
    with pytest.raises(ValueError, match="grow"):  # the default for a standard source is the preset `lite`
        Sam3LiteModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean `tiny`"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="tyny")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vision_intermediate_size": 400}, "intermediate_size` from 296 to 400"),
        ({"vision_num_hidden_layers": 5, "vision_global_attn_indexes": [1, 3]}, "num_hidden_layers` from 4 to 5"),
        ({"detr_decoder_layers": 4}, "detr_decoder_config.num_layers` from 3 to 4"),
        ({"vision_num_attention_heads": 2}, "set `num_attention_heads` to 3"),
        ({"vision_num_hidden_layers": 2, "vision_global_attn_indexes": [0, 1]}, None),
        ({"vision_num_hidden_layers": 3, "vision_global_attn_indexes": [0, 1, 2]}, "global_attn_indexes"),
        ({"text_config": {"vocab_size": 900}}, "ignore_mismatched_sizes"),
    ],
)
def test_impossible_sizes_are_explained(source, sizes, message):
    def load():
        return Sam3LiteModel.from_pretrained(source, config=narrow_config(**sizes))

    if message is None:
        assert load().mapping_report.layers[f"{VIT}.layers"] == [1, 3]
    else:
        with pytest.raises(ValueError, match=message):
            load()


def test_mismatched_sizes_can_be_initialised(source):
    model = Sam3LiteModel.from_pretrained(
        source, config=narrow_config(text_config={"vocab_size": 900}), ignore_mismatched_sizes=True
    )
    (row,) = [row for row in model.mapping_report.rows if row.action == "initialized"]
    assert row.group.endswith("token_embedding") and row.reason == "sizes differ"
    assert model.text_encoder.text_model.embeddings.token_embedding.weight.std() > 0


def test_arguments_that_exclude_each_other(source):
    with pytest.raises(ValueError, match="preset.*config"):
        Sam3LiteModel.from_pretrained(source, preset="tiny", config=narrow_config())
    with pytest.raises(ValueError, match="isometry, select, skip"):
        Sam3LiteModel.from_pretrained(source, config=narrow_config(), mapping="magic")


# --- results -------------------------------------------------------------------------------------------------------


def test_mapping_is_deterministic(source):
    first, second = (Sam3LiteModel.from_pretrained(source, config=narrow_config()) for _ in range(2))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_computed_in_float32(source, dtype):
    exact = Sam3LiteModel.from_pretrained(source, config=narrow_config()).state_dict()
    model = Sam3LiteModel.from_pretrained(source, config=narrow_config(), dtype=dtype)
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in model.state_dict().items())


def test_values_beyond_the_dtype_are_refused(wide, source):
    wide.text_projection.weight.data[0, 0] = 1e6
    wide.to_sam3().save_pretrained(source)
    with pytest.raises(ValueError, match=r"text_projection.weight.*float16"):
        Sam3LiteModel.from_pretrained(source, config=narrow_config(), dtype="float16")


@torch.no_grad()
def test_save_and_reload(source, inputs, tmp_path):
    model = Sam3LiteModel.from_pretrained(source, config=narrow_config())
    model.save_pretrained(tmp_path / "lite")
    report = json.loads((tmp_path / "lite" / "mapping_report.json").read_text())
    assert report["source"] == str(source) and report["strategy"] == "isometry"
    assert report["totals"] == model.mapping_report.totals
    again = Sam3LiteModel.from_pretrained(tmp_path / "lite")
    assert again.mapping_report is None
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.to_sam3().save_pretrained(tmp_path / "stock")
    stock = Sam3Model.from_pretrained(tmp_path / "stock")
    expected, result = model(**inputs), stock(**with_padding_box(inputs))
    assert all((expected[name] - result[name]).abs().max() <= 1e-5 for name in PREDICTIONS)


def test_source_files_may_go_after_loading(source):
    model = Sam3LiteModel.from_pretrained(source, preset="same")
    before = model.text_projection.weight.clone()
    with open(source / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert torch.equal(model.text_projection.weight, before)


def test_one_warning_and_a_table(source, caplog):
    model = Sam3LiteModel.from_pretrained(source, config=narrow_config())
    report = model.mapping_report
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [report.summary()]
    table = str(report)
    assert report.summary() in table
    lines = [line.split() for line in table.splitlines()]
    assert [f"{VIT}.layers.*.mlp.fc1", "rotated", "4", "296x64", "222x48"] in [line[:5] for line in lines]
    assert report.layers[f"{VIT}.layers"][-1] == 3
    groups = [(row.group, row.action, row.reason) for row in report.rows]
    assert len(groups) == len(set(groups))


def test_skip_initialises_and_says_so(source):
    model = Sam3LiteModel.from_pretrained(source, config=narrow_config(), mapping="skip")
    rows = {row.group: row for row in model.mapping_report.rows if row.action != "dropped"}
    assert rows[f"{VIT}.layers.*.attention.q_proj"].action == "initialized"
    assert rows["detr_decoder.layers.*.mlp.fc1"].action == "copied"
    assert model.mapping_report.layers == {}


def test_report_averages_energy_per_group():
    report = MappingReport("source", "isometry")
    report.add("a.layers.0.fc.weight", "rotated", (4, 4), (2, 2), 0.5)
    report.add("a.layers.1.fc.weight", "rotated", (4, 4), (2, 2), 0.7)
    report.add("a.layers.2.fc.weight", "initialized", (4, 4), (2, 2))
    assert [(row.group, row.tensors, row.parameters) for row in report.rows] == [
        ("a.layers.*.fc", 2, 8),
        ("a.layers.*.fc", 1, 4),
    ]
    assert report.rows[0].energy == pytest.approx(0.6)


def test_map_checkpoint_alone(source):
    config = narrow_config()
    state, report = map_checkpoint(open_checkpoint(source), config, Sam3LiteModel.parameter_shapes(config), "select")
    assert set(state) == set(Sam3LiteModel(config).state_dict())
    assert report.strategy == "select"


def test_a_part_of_the_model_can_be_mapped_alone(source):
    config = narrow_config()
    shapes = Sam3LiteModel.parameter_shapes(config)
    whole, _ = map_checkpoint(open_checkpoint(source), config, shapes)
    vision = {name: shape for name, shape in shapes.items() if name.startswith("vision_encoder.")}
    part, report = map_checkpoint(open_checkpoint(source), config, vision)
    assert part.keys() == vision.keys() and all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    assert all(row.action == "dropped" for row in report.rows if row.group.startswith("text_encoder"))
