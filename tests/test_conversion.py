import copy
import json
import pickle
import zipfile

import pytest
import torch
from conftest import largest_difference, micro_config, shake, stock_config, with_padding_box
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Sam3Config, Sam3Model, Sam3VideoConfig, Sam3VideoModel

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.checkpoints import (
    NAME_TABLE,
    UNREAD,
    Checkpoint,
    from_native,
    lite_config,
    native_state_dict,
    open_checkpoint,
    to_native,
)
from sam3_hf.configuration_sam3_lite import parameter_sizes


def native_config() -> Sam3LiteConfig:
    """A model whose sizes can be told from its tensors: text heads of 64 channels, one hidden size of the detector."""
    return micro_config(
        text_num_attention_heads=1,
        vision_num_attention_heads=2,
        vision_num_hidden_layers=4,
        vision_global_attn_indexes=[1, 3],
    )


def native_file(model: Sam3LiteModel, prefix: str = "", wrap: bool = False) -> dict:
    """What Meta's code would save for `model`: its parameters, the rotary tables, and weights of other parts."""
    state = native_state_dict(model.state_dict())
    vit = model.config.vision_config.backbone_config
    for i in range(vit.num_hidden_layers):
        side = vit.image_size // vit.patch_size if i in vit.global_attn_indexes else vit.window_size
        table = torch.zeros(side**2, vit.hidden_size // vit.num_attention_heads // 2, dtype=torch.complex64)
        state[f"backbone.vision_backbone.trunk.blocks.{i}.attn.freqs_cis"] = table
    state["backbone.vision_backbone.sam2_convs.0.conv_1x1.weight"] = torch.zeros(4, 4, 1, 1)
    state["geometry_encoder.points_direct_project.weight"] = torch.zeros(4, 2)
    state = {prefix + name: tensor for name, tensor in state.items()}
    if prefix.endswith("detector."):
        state["tracker.maskmem_tpos_enc"] = torch.zeros(7, 1, 1, 4)
    return {"model": state, "epoch": 3, "best_meter_values": {}} if wrap else state


# --- the table -----------------------------------------------------------------------------------------------------


def full_size_names() -> list[str]:
    with torch.device("meta"):
        return list(Sam3Model(Sam3Config()).state_dict())


def test_every_parameter_of_the_standard_model_has_a_native_name_and_back():
    names = full_size_names()
    assert len(names) > 1000
    found = {}
    for name in names:
        found.setdefault(to_native(name).name, set()).add(name)
    for native, expected in found.items():
        assert set(from_native(native)) == expected
    assert sum(len(expected) == 3 for expected in found.values()) == 2 * (32 + 24 + 2 * 3 + 2 * 6 + 3 * 6 + 1)


@pytest.mark.parametrize(
    ("native", "transformers"),
    [
        ("backbone.vision_backbone.trunk.ln_pre.bias", "vision_encoder.backbone.layer_norm.bias"),
        (
            "backbone.vision_backbone.convs.1.dconv_2x2.weight",
            "vision_encoder.neck.fpn_layers.1.scale_layers.0.weight",
        ),
        ("backbone.language_backbone.resizer.weight", "text_projection.weight"),
        ("transformer.decoder.layers.5.norm2.weight", "detr_decoder.layers.5.self_attn_layer_norm.weight"),
        ("transformer.decoder.bbox_embed.layers.2.bias", "detr_decoder.box_head.layer3.bias"),
        ("geometry_encoder.encode.1.linear2.weight", "geometry_encoder.layers.1.mlp.fc2.weight"),
        ("segmentation_head.mask_predictor.mask_embed.layers.0.weight", "mask_decoder.mask_embedder.layers.0.weight"),
    ],
)
def test_names(native, transformers):
    assert list(from_native(native)) == [transformers]
    assert to_native(transformers).name == native


def test_names_of_no_parameter_are_unknown():
    for name in ("tracker.memory.weight", "transformer.decoder.bbox_embed.layers.3.bias", "lm_head.weight"):
        assert from_native(name) == {}
        assert to_native(name) is None
    assert len({row.native for row in NAME_TABLE}) == len({row.transformers for row in NAME_TABLE}) == len(NAME_TABLE)


def test_the_forms_of_stored_tensors():
    query = torch.arange(12.0).view(2, 6)
    fused = torch.cat([query, query + 100, query + 200])
    taken = from_native("transformer.encoder.layers.0.self_attn.in_proj_weight")
    assert torch.equal(taken["detr_encoder.layers.0.self_attn.k_proj.weight"].take(fused), query + 100)
    assert taken["detr_encoder.layers.0.self_attn.v_proj.weight"].shape((6, 6)) == (2, 6)
    [table] = from_native("backbone.vision_backbone.trunk.pos_embed").values()
    assert table.shape((1, 577, 8)) == (1, 576, 8)
    assert torch.equal(table.take(torch.arange(5.0).view(1, 5, 1)), torch.arange(1.0, 5.0).view(1, 4, 1))
    [projection] = from_native("backbone.language_backbone.encoder.text_projection").values()
    assert torch.equal(projection.take(query), query.T)


def test_a_lone_attention_projection_cannot_be_made_native(model):
    state = model.state_dict()
    del state["detr_encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match="2 of 3"):
        native_state_dict(state)


def test_configurations_convert_both_ways(config):
    back = lite_config(stock_config(config))
    assert back.to_dict()["vision_config"] == config.to_dict()["vision_config"]
    assert back.to_dict()["mask_decoder_config"] == config.to_dict()["mask_decoder_config"]


# --- sources -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shard_size", ["5GB", "500KB"])
def test_a_sam3_folder_gives_the_outputs_of_stock(stock_model, box_inputs, tmp_path, shard_size):
    stock_model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "500KB")
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    assert not model.training
    assert largest_difference(model(**box_inputs), stock_model(**box_inputs)) <= 1e-5
    assert model.mapping_report.strategy == "copy"
    assert set(model.mapping_report.totals) == {"copied", "dropped"}
    dropped = [row for row in model.mapping_report.rows if row.action == "dropped"]
    assert sum(row.tensors for row in dropped) == 9 and {row.reason for row in dropped} == {"read by nothing"}


@torch.no_grad()
def test_a_sam3_video_folder_gives_the_outputs_of_stock(config, inputs, tmp_path):
    video = Sam3VideoModel(Sam3VideoConfig(detector_config=stock_config(config).to_dict())).eval()
    shake(video.detector_model)
    video.save_pretrained(tmp_path)
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    assert largest_difference(model(**inputs), video.detector_model(**with_padding_box(inputs))) <= 1e-5
    assert any(row.reason == "video tracker" for row in model.mapping_report.rows)


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "wrap"), [("", False), ("detector.", False), ("module.", True), ("module.detector.", True)]
)
def test_native_files_round_trip(inputs, tmp_path, prefix, wrap):
    torch.manual_seed(0)
    expected = shake(Sam3LiteModel(native_config())).eval()
    torch.save(native_file(expected, prefix, wrap), tmp_path / "sam3.pt")
    for source in (tmp_path, tmp_path / "sam3.pt"):
        model = Sam3LiteModel.from_pretrained(source, preset="same")
        vit = model.config.vision_config.backbone_config
        assert (vit.global_attn_indexes, vit.window_size, vit.num_attention_heads) == ([1, 3], 4, 2)
        assert model.config.image_size == 64
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
        assert largest_difference(model(**inputs), expected(**inputs)) <= 1e-5
    reasons = {row.reason for row in model.mapping_report.rows if row.action == "dropped"}
    assert "neck of the tracker" in reasons and "table that the model computes" in reasons
    assert ("video tracker" in reasons) == prefix.endswith("detector.")


def test_sizes_of_the_real_native_file_are_recognised():
    with torch.device("meta"):
        state = native_state_dict(Sam3Model(Sam3Config()).state_dict())

    class Files(dict):
        def shape(self, name):
            return tuple(self[name].shape)

    standard = Sam3LiteConfig.from_preset("standard")
    checkpoint = Checkpoint("sam3.pt", Files(state))
    assert parameter_sizes(checkpoint.config) == parameter_sizes(standard)
    found = checkpoint.config.vision_config.backbone_config
    assert found.num_attention_heads == 16 and found.global_attn_indexes == [7, 15, 23, 31]
    assert checkpoint.check(Sam3LiteModel.parameter_shapes(standard)) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_source_unless_asked_for(stock_model, tmp_path, dtype):
    copy.deepcopy(stock_model).to(dtype).save_pretrained(tmp_path)
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="same", dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert Sam3LiteModel.from_pretrained(tmp_path, preset="same", torch_dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="int8"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same", dtype="int8")


def test_lite_checkpoints_load_the_ordinary_way(model, tmp_path):
    model.save_pretrained(tmp_path)
    for extra in ({}, {"preset": "same"}, {"config": model.config}, {"config": str(tmp_path)}):
        loaded = Sam3LiteModel.from_pretrained(tmp_path, **extra)
        assert loaded.mapping_report is None
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert Sam3LiteModel.from_pretrained(tmp_path, image_size=128).config.image_size == 128
    assert not (tmp_path / "mapping_report.json").exists()


@torch.no_grad()
def test_loading_arguments_keep_working(stock_model, tmp_path):
    stock_model.save_pretrained(tmp_path / "inner", variant="fp32")
    model, info = Sam3LiteModel.from_pretrained(
        tmp_path,
        preset="same",
        subfolder="inner",
        variant="fp32",
        revision="main",
        token=False,
        cache_dir=tmp_path / "cache",
        local_files_only=True,
        device_map="cpu",
        attn_implementation="eager",
        image_size=128,
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.image_size == 128
    assert model.config._attn_implementation == "eager"
    assert model.config.name_or_path == str(tmp_path)
    with pytest.raises(OSError):
        Sam3LiteModel.from_pretrained("no-such/model", local_files_only=True)


# --- refusals ------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_need_code_are_refused(model, tmp_path, capsys):
    torch.save({"model": native_file(model), "extra": Code()}, tmp_path / "sam3.pt")
    with pytest.raises(ValueError, match=r"sam3.pt is refused.*print"):
        Sam3LiteModel.from_pretrained(tmp_path / "sam3.pt")
    assert "code ran" not in capsys.readouterr().out


def test_truncated_and_foreign_files(model, tmp_path):
    torch.save(native_file(model), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"cut.pt.*truncated"):
        Sam3LiteModel.from_pretrained(tmp_path / "cut.pt")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all" * 10)
    with pytest.raises(OSError, match="noise.pt"):
        Sam3LiteModel.from_pretrained(tmp_path / "noise.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(OSError, match="archive.pt"):
        Sam3LiteModel.from_pretrained(tmp_path / "archive.pt")
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises((ValueError, OSError), match="list.pt"):
        Sam3LiteModel.from_pretrained(tmp_path / "list.pt")


def test_a_truncated_safetensors_file(stock_model, tmp_path):
    stock_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model.safetensors.*truncated"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    file.unlink()
    with pytest.raises(OSError, match="neither model.safetensors nor"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same")


def test_a_missing_shard_is_named(stock_model, tmp_path):
    stock_model.save_pretrained(tmp_path, max_shard_size="500KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(OSError, match=f"{tmp_path} is no whole model: {lost.name} is missing"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same")


def test_foreign_models_are_named(model, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        Sam3LiteModel.from_pretrained(tmp_path)
    torch.save({"model": {"sam_mask_decoder.iou.weight": torch.zeros(2)}}, tmp_path / "sam2.pt")
    with pytest.raises(ValueError, match=r"sam2.pt holds no tensor of SAM 3.*sam_mask_decoder.*SAM 2"):
        Sam3LiteModel.from_pretrained(tmp_path / "sam2.pt")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}, tmp_path / "llm.safetensors")
    with pytest.raises(ValueError, match="a language model"):
        Sam3LiteModel.from_pretrained(tmp_path / "llm.safetensors")
    some = {name: tensor for name, tensor in native_file(model).items() if "text_projection" in name}
    torch.save({**some, "other": torch.zeros(2)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="no tensor of SAM 3|recognised"):
        Sam3LiteModel.from_pretrained(tmp_path / "part.pt")


@pytest.mark.parametrize(("removed", "accepted"), [(0.05, True), (0.2, False)])
def test_incomplete_sources(stock_model, tmp_path, removed, accepted):
    stock_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    needed = [name for name in tensors if name.startswith(("detr_", "geometry"))]
    lost = needed[: int(removed * len(tensors))]
    renamed = {("renamed." + name if name in lost else name): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    if accepted:
        with pytest.raises(ValueError, match=rf"it lacks {len(lost)} of .*`{lost[0]}`.*`renamed\."):
            Sam3LiteModel.from_pretrained(tmp_path, preset="same")
        model = Sam3LiteModel.from_pretrained(tmp_path, preset="same", ignore_mismatched_sizes=True)
        totals = model.mapping_report.totals
        assert totals["initialized"]["tensors"] == len(lost)
        assert sum(row.tensors for row in model.mapping_report.rows if row.reason == "unknown name") == len(lost)
    else:
        with pytest.raises(ValueError, match=rf"missing are {len(lost)}, such as `detr.*`renamed\."):
            Sam3LiteModel.from_pretrained(tmp_path, preset="same")


def test_a_config_that_contradicts_the_file(stock_model, tmp_path):
    stock_model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["vision_config"]["backbone_config"]["intermediate_size"] += 8
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"mlp\.fc1\.\w+` has shape"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same")


def test_native_folders_with_several_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match="a.pt, b.pt"):
        Sam3LiteModel.from_pretrained(tmp_path)


# --- the way back --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_to_sam3_gives_a_folder_that_stock_loads(model, box_inputs, tmp_path):
    stock = model.to_sam3()
    assert type(stock) is Sam3Model and not stock.training
    assert largest_difference(stock(**box_inputs), model(**box_inputs)) <= 1e-5
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam3"
    loaded, info = Sam3Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(loaded(**box_inputs), model(**box_inputs)) <= 1e-5
    again = Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_to_sam3_keeps_dtype_and_owns_its_tensors(model):
    stock = model.half().train().to_sam3()
    assert stock.dtype == torch.float16 and stock.training
    before = stock.text_projection.weight.clone()
    with torch.no_grad():
        model.text_projection.weight.zero_()
    assert torch.equal(stock.text_projection.weight, before)
    extra = set(stock.state_dict()) - set(model.state_dict())
    assert len(extra) == 9 and all(any(name.startswith(p.split("\\")[0]) for p in UNREAD) for name in extra)


def test_open_checkpoint_without_config_or_native_file(tmp_path):
    assert open_checkpoint(tmp_path) is None
    with pytest.raises(OSError, match="neither a config.json"):
        Sam3LiteModel.from_pretrained(tmp_path)
