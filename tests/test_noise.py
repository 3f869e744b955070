"""Nothing is computed from noise: weights, words, numbers and scores that mean nothing are named, not used."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import micro_config
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.data.generated import write_dataset
from sam3_hf.evaluation import CGF1, prediction_row, reference_row
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.processing_sam3_lite import clip_tokenizer
from sam3_hf.sharing.model_card import model_card
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.model import build_model
from sam3_hf.training.parts import build_parts, write_parts
from sam3_hf.training.reporting import log_scores, main_scores
from sam3_hf.training.run import Run


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def last_line(result) -> str:
    assert result.exit_code == 1 and "Traceback" not in result.output
    return result.output.strip().splitlines()[-1]


def change(folder, edit):
    """Rewrites the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", {"format": "pt"})


# --- weights -------------------------------------------------------------------------------------------------------


def without(names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def poisoned(names, value):
    def edit(tensors):
        for name in names:
            tensors[name].flatten()[-1] = value
        return tensors

    return edit


def test_missing_tensors_are_named_and_not_made_up(folder):
    whole = load_file(folder / "model.safetensors")
    lost = [name for name in sorted(whole) if name.startswith("detr_decoder.layers.0")]
    change(folder, without(lost))
    with pytest.raises(ValueError) as error:
        Sam3LiteModel.from_pretrained(folder)
    message = str(error.value)
    assert f"it lacks {len(lost)} of {len(whole)} tensors: `{lost[0]}`" in message and "\n" not in message
    assert all(f"`{name}`" in message for name in lost[:10]) and lost[10] not in message
    assert "ignore_mismatched_sizes=True" in message
    _, info = Sam3LiteModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == set(lost)
    assert Sam3LiteModel.from_pretrained(folder, ignore_mismatched_sizes=True).config.model_type == "sam3_lite"


def test_missing_tensors_of_shards_pickles_and_state_dicts(model, tmp_path):
    name = "mask_decoder.mask_embedder.layers.0.weight"
    state = without([name])(model.state_dict())
    model.save_pretrained(tmp_path / "shards", state_dict=dict(state), max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match=rf"shards is no whole model: it lacks 1 of \d+ tensors: `{name}`"):
        Sam3LiteModel.from_pretrained(tmp_path / "shards")
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(state, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=name):
        Sam3LiteModel.from_pretrained(tmp_path / "pickle", use_safetensors=False)
    with pytest.raises(ValueError, match=f"`state_dict` is no whole model.*{name}"):
        Sam3LiteModel.from_pretrained(None, config=model.config, state_dict=state)


def test_a_standard_source_that_lacks_tensors(stock_model, tmp_path):
    stock_model.save_pretrained(tmp_path)
    change(tmp_path, without(["text_projection.bias"]))
    with pytest.raises(ValueError, match=r"it lacks 1 of \d+ tensors: `text_projection.bias`.*ignore_mismatched"):
        Sam3LiteModel.from_pretrained(tmp_path, preset="same")
    model = Sam3LiteModel.from_pretrained(tmp_path, preset="same", ignore_mismatched_sizes=True)
    assert model.mapping_report.totals["initialized"]["tensors"] == 1


def test_weights_that_hold_nothing_of_the_model(folder, caplog):
    change(folder, lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ValueError, match=r"it lacks (\d+) of \1 tensors.*and \d+ more. \1 tensors have names that.*`oth"
    ):
        Sam3LiteModel.from_pretrained(folder)
    assert "REPORT" not in caplog.text


def test_tensors_too_many_are_one_line(folder, caplog):
    change(folder, lambda tensors: tensors | {"nothing": torch.zeros(3)})
    Sam3LiteModel.from_pretrained(folder)
    assert "1 tensors have names that this model does not know: `nothing`" in caplog.text
    assert "REPORT" not in caplog.text


def test_tensors_of_another_size_are_one_line(folder):
    change(folder, lambda tensors: tensors | {"text_projection.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"`text_projection.bias` is \(3,\) there, \(64,\) in the model.*ignore_mism"):
        Sam3LiteModel.from_pretrained(folder)
    assert Sam3LiteModel.from_pretrained(folder, ignore_mismatched_sizes=True).text_projection.bias.shape == (64,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder, value):
    names = sorted(load_file(folder / "model.safetensors"))[:12]
    change(folder, poisoned(names, value))
    with pytest.raises(ValueError, match="12 tensors hold values that are not finite in torch.float32") as error:
        Sam3LiteModel.from_pretrained(folder)
    assert "\n" not in str(error.value) and all(f"`{name}`" in str(error.value) for name in names[:10])
    assert "and 2 more" in str(error.value)


def test_values_beyond_half_precision(folder):
    change(folder, poisoned(["text_projection.bias"], 1e6))
    Sam3LiteModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="not finite in torch.float16: `text_projection.bias`.*another `dtype`"):
        Sam3LiteModel.from_pretrained(folder, dtype="float16")


@pytest.mark.parametrize("edit", [without(["text_projection.bias"]), poisoned(["text_projection.bias"], float("nan"))])
def test_commands_refuse_such_weights(folder, tmp_path, edit):
    change(folder, edit)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for arguments in (
        ["predict", tmp_path, "--model", folder, "--prompt", "cat", "--output", tmp_path / "out"],
        ["convert", folder, tmp_path / "converted"],
    ):
        assert "text_projection.bias" in last_line(command(*arguments))
    assert not (tmp_path / "converted").exists()


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=2, num_valid=2, image_size=64, num_concepts=2)


def with_letters_only(folder):
    """A folder with another tokenizer of as many tokens: its merges are in another order, and so are the ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    vocab = {token: index for token, index in content["model"]["vocab"].items() if index < 512 or index >= 1022}
    for index, merge in enumerate(reversed(merges)):
        vocab["".join(merge if isinstance(merge, list) else merge.split(" "))] = 512 + index
    content["model"]["vocab"] = vocab
    path.write_text(json.dumps(content))


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(folder, data, tmp_path):
    clip_tokenizer(2000).save_pretrained(folder)
    message = "tokenizer has 2000 tokens with ids up to 1999, the text embedding of the model has 1024 rows"
    with pytest.raises(ValueError, match=message):
        Sam3LitePipeline.from_pretrained(folder)
    model, processor = Sam3LiteModel.from_pretrained(folder), Sam3LiteProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        model.freeze_vocabulary(["cat"], processor)
    for arguments in (
        ["evaluate", "--model", folder, "--data", data, "--workers", 0],
        ["predict", data, "--model", folder, "--prompt", "cat", "--output", tmp_path / "out"],
        ["convert", folder, tmp_path / "converted"],
    ):
        assert message in last_line(command(*arguments))
    arguments = parse_arguments(["--init", str(folder), "--data", str(data), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        build_parts(arguments, Accelerator(cpu=True), None)


def test_commands_use_the_tokenizer_of_the_folder(folder, tmp_path):
    with_letters_only(folder)
    expected = Sam3LiteProcessor.from_pretrained(folder)(text="cat")["input_ids"]
    config = Sam3LiteModel.from_pretrained(folder).config
    assert not torch.equal(expected, Sam3LiteProcessor.from_config(config)(text="cat")["input_ids"])
    assert torch.equal(expected, Sam3LiteProcessor.of_source(folder, config)(text="cat")["input_ids"])
    assert command("convert", folder, tmp_path / "converted", "--dtype", "float16").exit_code == 0
    found = Sam3LiteProcessor.from_pretrained(tmp_path / "converted")(text="cat")["input_ids"]
    assert torch.equal(found, expected)


def test_the_scores_are_those_of_the_tokenizer_of_the_folder(folder, data, monkeypatch):
    with_letters_only(folder)
    asked = []
    monkeypatch.setattr(Sam3LiteModel, "get_text_features", lambda self, ids, mask: asked.append(ids) or 1 / 0)
    command("evaluate", "--model", folder, "--data", data, "--workers", 0)
    expected = Sam3LiteProcessor.from_pretrained(folder)(text=["blue circle", "red circle"])["input_ids"]
    assert torch.equal(asked[0], expected[:, : asked[0].shape[1]])


def ids_of(source) -> torch.Tensor:
    return Sam3LiteProcessor.from_pretrained(source)(text="cat")["input_ids"]


@pytest.mark.parametrize("kept", [True, False], ids=["in the checkpoint", "where the run started"])
def test_a_resumed_run_goes_on_with_its_tokenizer(folder, data, tmp_path, kept):
    """Without --init, and the one of an older version without a copy in its checkpoint."""
    with_letters_only(folder)
    expected = ids_of(folder)
    flags = ["--data", str(data), "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    parts = build_parts(parse_arguments([*flags, "--init", str(folder)]), Accelerator(cpu=True), None)
    write_parts(parts, None)
    Run(parts).save()
    last = tmp_path / "run" / "checkpoints" / "last"
    if kept:
        shutil.rmtree(folder)
    else:
        (last / "tokenizer.json").unlink()
    parts = build_parts(parse_arguments(flags), Accelerator(cpu=True), last)
    assert torch.equal(parts.processor(text="cat")["input_ids"], expected)
    if kept:
        assert command("convert", last, tmp_path / "converted").exit_code == 0
        assert torch.equal(ids_of(tmp_path / "converted"), expected)


def test_what_is_pushed_from_memory_has_the_tokenizer_of_its_source(folder, monkeypatch, caplog):
    with_letters_only(folder)
    pushed = []
    monkeypatch.setattr("sam3_hf.sharing.hub.push_folder", lambda source, *_: pushed.append(ids_of(source)))
    model, expected = Sam3LiteModel.from_pretrained(folder), ids_of(folder)
    model.push_to_hub("me/model")
    assert torch.equal(pushed[0], expected) and not caplog.text
    shutil.rmtree(folder)
    model.push_to_hub("me/model")
    assert not torch.equal(pushed[1], expected)
    assert f"{folder}, which the model came from, cannot be read any more" in caplog.text


@pytest.mark.parametrize("loaded", [True, False])
def test_calibration_asks_in_the_words_of_the_source(folder, monkeypatch, loaded):
    with_letters_only(folder)
    asked = []

    def stop(model, processor, *_, **__):
        asked.append(processor(text="cat")["input_ids"])
        raise LookupError

    monkeypatch.setattr("sam3_hf.mapping.calibration.asking.phrase_features", stop)
    source = Sam3LiteModel.from_pretrained(folder) if loaded else folder
    with pytest.raises(LookupError):
        calibrate_mapping(source, config=micro_config(detr_encoder_layers=1), num_images=4)
    assert torch.equal(asked[0], ids_of(folder))


# --- scores --------------------------------------------------------------------------------------------------------


def one_concept(data, folder):
    """A dataset whose pictures all have its one concept, in the Roboflow layout."""
    for split in ("train", "valid"):
        shutil.copytree(data / split, folder / split)
        path = folder / split / "_annotations.coco.json"
        coco = json.loads(path.read_text())
        coco["categories"] = [{"id": 1, "name": "shape"}]
        for annotation in coco["annotations"]:
            annotation["category_id"] = 1
        path.write_text(json.dumps(coco))
    return folder


def test_presence_scores_are_not_defined_where_no_prompt_is_absent():
    box = [2, 2, 8, 8]
    references = [
        reference_row(1, 0, [box]),
        reference_row(2, 0, [box]),
        reference_row(1, 1, []),
        reference_row(2, 1, []),
    ]
    predictions = [prediction_row(row["image_id"], row["category"], [box], [0.9]) for row in references]
    for rows, names in ((slice(0, 2), {"0"}), (slice(2, 4), {"1"})):
        metric = CGF1(("bbox",), keep_in_memory=True)
        result = metric.compute(predictions=predictions[rows], references=references[rows])
        assert (
            result["IL_MCC"] is result["bbox_cgF1"] is result["bbox_cgF1@0.5"] is result["bbox_by_iou"]["cgF1"] is None
        )
        assert result["bbox_per_class"].keys() == names
        assert all(row["cgF1"] is row["IL_MCC"] is None for row in result["bbox_per_class"].values())
        json.dumps(result, allow_nan=False)
    whole = CGF1(("bbox",), keep_in_memory=True).compute(predictions=predictions, references=references)
    assert whole["IL_MCC"] == 0 and whole["bbox_per_class"]["0"]["cgF1"] is None


def test_the_table_says_why_a_score_is_missing(folder, data, tmp_path):
    data = one_concept(data, tmp_path / "data")
    result = command("evaluate", "--model", folder, "--data", data, "--workers", 0, "--output", tmp_path / "scores")
    assert result.exit_code == 0, result.output
    assert "cgF1 and MCC are not defined where every picture has the concept (shape)." in result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("all")]
    assert len(rows) == 2 and all(row[5] == row[7] == "-" for row in rows)
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["segm_cgF1"] is None


def test_a_score_that_is_not_defined_chooses_nothing(folder, data, tmp_path):
    data = one_concept(data, tmp_path / "data")
    given = ["--init", folder, "--data", data, "--output_dir", tmp_path / "run", "--metric_for_best", "segm_cgF1"]
    parts = build_parts(parse_arguments([*map(str, given)]), Accelerator(cpu=True), None)
    with pytest.raises(ValueError, match="metric_for_best segm_cgF1 is not defined: every picture.*use segm_AP"):
        Run(parts)
    assert main_scores({"bbox_AP": 0.5, "bbox_AP50": 0.6, "bbox_cgF1": None, "IL_MCC": None, "loss": 1.0}) == {
        "bbox_AP": 0.5,
        "bbox_AP50": 0.6,
        "loss": 1.0,
    }


def test_classes_without_objects_share_one_line(caplog):
    caplog.set_level("INFO")
    seen, unseen = {"AP": 0.5, "AP50": 0.6, "cgF1": None}, {"AP": -1, "AP50": -1, "cgF1": None}
    classes = {"cat": seen | {"objects": 3}, "dog": unseen | {"objects": 0}, "cow": unseen | {"objects": 0}}
    log_scores(1.0, {"bbox_AP": 0.5, "bbox_AP50": 0.6, "IL_MCC": 0.1, "bbox_per_class": classes})
    lines = [record.getMessage().strip() for record in caplog.records]
    assert lines[0] == "epoch 1.00, validation: bbox_AP 0.5000, bbox_AP50 0.6000, IL_MCC 0.1000"
    assert lines[1].split() == "cat bbox AP 0.5000, AP50 0.6000, 3 objects".split()
    assert lines[2:] == ["and 2 classes of which the pictures show no object"]
    caplog.clear()
    del classes["cat"]
    log_scores(1.0, {"bbox_AP": -1, "bbox_AP50": -1, "IL_MCC": 0.1, "loss": 2.0, "bbox_per_class": classes})
    first, last = [record.getMessage() for record in caplog.records]
    assert first == "epoch 1.00, validation: IL_MCC 0.1000, loss 2.0000" and last.startswith("AP is not defined: ")


# --- masks that nothing taught -------------------------------------------------------------------------------------


@pytest.fixture
def boxes_only(model, tmp_path):
    """A folder of a model that was trained on boxes alone."""
    model.config.mask_supervision = False
    model.save_pretrained(tmp_path / "boxes")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "boxes")
    return tmp_path / "boxes"


def test_a_model_trained_on_boxes_gives_none_of_its_masks(boxes_only, folder, monkeypatch):
    picture = Image.new("RGB", (50, 40))
    with_masks = Sam3LitePipeline.from_pretrained(folder)
    with_masks.model.config.mask_supervision = True
    expected = with_masks(picture, ["cat", "dog"], threshold=0.0, nms_iou=None)
    pipe = Sam3LitePipeline.from_pretrained(boxes_only)
    monkeypatch.setattr(type(pipe.model.mask_decoder), "forward", lambda *_, **__: pytest.fail("the mask head ran"))
    found = pipe(picture, ["cat", "dog"], threshold=0.0, nms_iou=None)
    assert found.masks is found.rle is None and len(found) == len(expected) == 24
    assert torch.equal(found.boxes, expected.boxes) and found.labels == expected.labels
    assert found.select([1]).masks is None and found.to_supervision().mask is None
    assert "segmentation" not in found.to_coco(1, {"cat": 1, "dog": 2})[0]
    few = pipe(picture, ["cat"], threshold=0.0, nms_iou=0.1)  # then by boxes
    assert 0 < len(few) < 12
    assert pipe(picture, ["cat"], threshold=0.0, tile_size=30).masks is None


def test_predict_and_evaluate_say_that_there_are_no_masks(boxes_only, data, tmp_path):
    pictures, out = data / "valid", tmp_path / "out"
    given = ["predict", pictures, "--model", boxes_only, "--prompt", "cat", "--output", out, "--workers", 0]
    result = command(*given, "--overlays", "--threshold", 0)
    assert result.exit_code == 0 and "was trained on boxes alone: it gives boxes" in result.output, result.output
    again = command(*given, "--overlays", "--threshold", 0)
    assert again.exit_code == 0 and "0 pictures were new" in again.output
    assert "segmentation" not in json.loads((out / "coco_results.json").read_text())[0]
    assert len(list((out / "overlays").rglob("*.png"))) == 2
    assert "has no masks to write" in last_line(command(*given, "--masks"))
    result = command("evaluate", "--model", boxes_only, "--data", data, "--workers", 0)
    assert result.exit_code == 0 and "its boxes are scored, and no masks" in result.output
    assert "\nmasks" not in result.output and "\nboxes" in result.output


@pytest.mark.parametrize(("with_masks", "expected"), [("none", False), ("some", True)])
def test_training_notes_whether_there_were_masks(folder, data, tmp_path, with_masks, expected):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "train" / "_annotations.coco.json"
    coco = json.loads(path.read_text())
    for annotation in coco["annotations"][0 if with_masks == "none" else 1 :]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(coco))
    given = ["--init", folder, "--data", tmp_path / "data", "--output_dir", tmp_path / "run"]
    parts = build_parts(parse_arguments([*map(str, given)]), Accelerator(cpu=True), None)
    assert parts.model.config.mask_supervision is parts.valid_data.has_masks is expected
    config = parts.model.config
    assert config.changed(image_size=128).mask_supervision is config.at_preset("tiny").mask_supervision is expected
    parts.model.config.save_pretrained(tmp_path)
    assert Sam3LiteConfig.from_pretrained(tmp_path).mask_supervision is expected


def test_the_card_says_that_the_masks_mean_nothing(boxes_only, folder):
    assert "trained on boxes alone" in str(model_card(boxes_only))
    fields = json.loads((folder / "config.json").read_text())
    del fields["mask_supervision"]  # as in folders of earlier versions
    (folder / "config.json").write_text(json.dumps(fields))
    assert "trained on boxes alone" not in str(model_card(folder))


# --- numbers -------------------------------------------------------------------------------------------------------


def test_an_overflow_is_a_warning_once_that_names_precision_and_remedy(folder, caplog):
    pipe = Sam3LitePipeline.from_pretrained(folder, dtype="float16")
    picture = Image.new("RGB", (50, 40))
    pipe(picture, ["cat", "dog"])
    assert "not finite" not in caplog.text
    with torch.no_grad():
        pipe.model.vision_encoder.neck.fpn_layers[2].proj1.weight.fill_(6e4)
    for _ in range(2):
        assert len(pipe([picture, picture], ["cat", "dog"])[0]) == 0
    assert caplog.text.count("not finite in torch.float16") == 1
    assert "dtype='bfloat16' or 'float32'" in caplog.text


def test_scores_that_are_not_finite_are_no_empty_result(folder, model, caplog):
    processor = Sam3LiteProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=Image.new("RGB", (50, 40)), text="cat"))
    expected = processor.post_process_instance_segmentation(outputs, threshold=0.0)[0]
    assert len(expected["scores"]) == 12 and "not finite" not in caplog.text
    outputs.pred_logits[0, 3] = float("nan")
    (found,) = processor.post_process_instance_segmentation(outputs, threshold=0.0)
    assert len(found["scores"]) == len(found["masks"]) == 11
    assert "Scores are not finite in torch.float32" in caplog.text


# --- more objects than queries -------------------------------------------------------------------------------------


def test_more_queries_keep_the_old_ones(folder, model):
    torch.manual_seed(0)
    more = Sam3LiteModel.from_pretrained(folder, num_queries=20)
    assert more.config.detr_decoder_config.num_queries == 20
    rows = {row.group: row for row in more.mapping_report.rows if row.action == "extended"}
    assert set(rows) == {"detr_decoder.query_embed", "detr_decoder.reference_points"}
    assert {(row.source_shape[0], row.target_shape[0], row.reason) for row in rows.values()} == {
        (12, 20, "8 of 20 as before training")
    }
    state, old = more.state_dict(), model.state_dict()
    for name in old:
        assert torch.equal(state[name][:12] if f"{name.removesuffix('.weight')}" in rows else state[name], old[name])
    new = [state[f"{group}.weight"][12:] for group in rows]
    assert all(len(values.unique(dim=0)) == 8 for values in new)
    sides = state["detr_decoder.reference_points.weight"][12:, 2:].sigmoid()
    assert sides.mean() < 0.4  # boxes as the decoder starts with, a part of the image
    fewer = Sam3LiteModel.from_pretrained(folder, num_queries=5)
    assert torch.equal(fewer.detr_decoder.query_embed.weight, model.detr_decoder.query_embed.weight[:5])


def test_num_queries_of_a_run(folder, data, tmp_path):
    for init in (["--init", folder], ["--preset", "tiny"]):
        given = [*init, "--num_queries", 30, "--data", data, "--output_dir", tmp_path / "run"]
        model = build_model(parse_arguments([*map(str, given)]), None)
        assert len(model.detr_decoder.query_embed.weight) == model.config.detr_decoder_config.num_queries == 30
    with pytest.raises(SystemExit):
        parse_arguments(["--num_queries", "0", "--data", str(data)])
