"""Models as graphs: equal to what they were made of, usable as a model, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import warm
from conftest import HUNG, micro_config, run, shake
from PIL import Image
from test_text_encoders import PHRASES, lite_text_model
from transformers.models.sam3.modeling_sam3 import eager_attention_forward

from sam3_hf import Prompt, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data.generated import write_dataset
from sam3_hf.exporting import attention, build
from sam3_hf.exporting import export as exporting
from sam3_hf.exporting import model as running
from sam3_hf.exporting.build import save_graph, write_onnx
from sam3_hf.exporting.calibration import Calibration
from sam3_hf.exporting.engines import OnnxRuntimeGraph
from sam3_hf.exporting.export import export_model
from sam3_hf.exporting.folder import EXPORT_FILE, Export, record_files
from sam3_hf.exporting.fuse import biases_into_products, join_attention
from sam3_hf.exporting.graphs import graphs_of
from sam3_hf.exporting.model import ExportedModel
from sam3_hf.exporting.opening import open_export
from sam3_hf.exporting.quantize import is_excluded
from sam3_hf.exporting.vision import for_runtimes
from sam3_hf.page.asking import Finder, ask
from sam3_hf.page.pictures import open_picture
from sam3_hf.rle import ious

ROOT = Path(__file__).parents[1]
WORDS = ["cat", "red car"]


def images(model) -> torch.Tensor:
    side = model.config.image_size
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def prompts(with_boxes: bool) -> dict:
    """Four prompts on three images, of different lengths."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(4, 11, dtype=torch.long)
    mask[1, 4:] = mask[2, 6:] = 0
    asked = {"input_ids": torch.randint(3, 1000, (4, 11), generator=generator), "attention_mask": mask}
    asked["image_index"] = torch.tensor([0, 1, 1, 2])
    if with_boxes:
        asked["input_boxes"] = torch.rand(4, 2, 4, generator=generator) * 0.3 + 0.3
        asked["input_boxes_labels"] = torch.tensor([[1, 0], [1, -10], [-10, -10], [0, 1]])
    return asked


@torch.no_grad()
def answers(model, pixels: torch.Tensor, asked: dict):
    """Of `forward` and of `find`."""
    asked = dict(asked)
    mask = asked["attention_mask"]
    vision = model.get_vision_features(pixels.to(model.dtype))
    asked["text_embeds"] = model.get_text_features(asked.pop("input_ids"), mask).pooler_output
    return model(vision_embeds=vision, **asked), model.find(vision, **asked, threshold=0.0, max_detections=5)


def differences(first, second) -> dict[str, float]:
    names = ("pred_boxes", "pred_logits", "presence_logits", "pred_masks")
    return {name: (first[name].float() - second[name].float()).abs().max().item() for name in names}


def assert_equal_in_float32(exported, model, with_boxes: bool):
    """Boxes and scores within 1e-4, masks with an IoU of at least 0.999."""
    pixels, asked = images(model), prompts(with_boxes)
    (forward, found), (expected_forward, expected) = (answers(one, pixels, asked) for one in (exported, model))
    for result, wanted in ((forward.pred_boxes, expected_forward.pred_boxes), (found.boxes, expected.boxes)):
        torch.testing.assert_close(result, wanted, atol=1e-4, rtol=0)
    for name in ("pred_logits", "presence_logits"):
        torch.testing.assert_close(forward[name].sigmoid(), expected_forward[name].sigmoid(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert torch.equal(found.prompt_index, expected.prompt_index) and len(found.scores) > 3
    for result, wanted in (
        (forward.pred_masks, expected_forward.pred_masks),
        (found.mask_logits, expected.mask_logits),
    ):
        inside, truth = (logits.flatten(0, -3) > 0 for logits in (result, wanted))
        union = (inside | truth).sum((1, 2))
        assert ((inside & truth).sum((1, 2)) >= 0.999 * union).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a model and its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    model = shake(Sam3LiteModel(micro_config(detr_encoder_layers=1))).eval()
    model.save_pretrained(folder)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory) -> Path:
    """Its graphs in float32, to be read and copied only."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_model(small, folder)
    return folder


@pytest.fixture(scope="module")
def with_weights_beside(exported, tmp_path_factory) -> Path:
    """The same with all weights in files of their own, as those of large models are."""
    folder = tmp_path_factory.mktemp("exported") / "beside"
    shutil.copytree(exported, folder)
    before = record_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "WEIGHTS_BESIDE", 1000)
        for path in folder.glob("*.onnx"):
            save_graph(onnx.load(path), path)
    files = record_files(folder)
    known = json.loads((folder / EXPORT_FILE).read_text())["files"]
    change(folder, "files", {name: files[name] for name in files if name in known or name not in before})
    return folder


@torch.no_grad()
def test_the_detector_is_captured_with_any_number_of_prompts(small):
    """The first way that `torch.onnx.export` tries; where it fails, it tries another, and takes twice as long."""
    graph = graphs_of(Sam3LiteModel.from_pretrained(small).eval())["detector"]
    names = {name for axes in graph.free_sizes().values() for name in axes.values()}
    sizes = {name: torch.export.Dim(name, min=2) for name in names}
    free = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in graph.free_sizes().items()}
    torch.export.export(graph.module, (), graph.inputs, dynamic_shapes=free, strict=False)


@torch.no_grad()
def test_the_vision_encoder_for_runtimes_is_the_same(small):
    encoder = Sam3LiteModel.from_pretrained(small, dtype=torch.float64).vision_encoder.eval()
    plain = for_runtimes(encoder)
    kinds = [{type(module) for module in one.modules()} for one in (encoder, plain)]
    assert torch.nn.ConvTranspose2d in kinds[0] and torch.nn.ConvTranspose2d not in kinds[1]
    assert plain.backbone.layers[0].mlp.fc1.weight is encoder.backbone.layers[0].mlp.fc1.weight
    side = encoder.config.backbone_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = [one(pixels).fpn_hidden_states for one in (plain, encoder)]
    torch.testing.assert_close(*levels, atol=1e-12, rtol=1e-12)


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def same(first, second, tolerance=1e-4):
    """Whether two lists of detections are alike."""
    assert first.labels == second.labels and len(first) > 2
    torch.testing.assert_close(first.scores, second.scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(first.boxes, second.boxes, atol=100 * tolerance, rtol=0)  # pixels
    for one, other in zip(first.rle, second.rle, strict=True):
        assert ious([one], [other])[0, 0] >= 0.99  # at the full size a pixel of a small mask is more than 0.001


@pytest.mark.parametrize("with_boxes", [False, True], ids=["words", "boxes"])
def test_outputs_are_those_of_pytorch(small, exported, with_boxes):
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    vision = onnx.load(exported / "vision.onnx", load_external_data=False)
    assert "ConvTranspose" not in {node.op_type for node in vision.graph.node}
    assert_equal_in_float32(open_export(exported)[0], model, with_boxes)


def test_prompts_that_are_too_many_at_once_are_asked_one_after_the_other(small, exported, monkeypatch):
    monkeypatch.setattr(running, "PIXELS_AT_ONCE", 1)
    model, counts = open_export(exported)[0], []
    run_graph = model.run

    def run(name, **inputs):
        counts.extend([len(inputs["prompt"])] if name == "detector" else [])
        return run_graph(name, **inputs)

    monkeypatch.setattr(model, "run", run)
    assert_equal_in_float32(model, Sam3LiteModel.from_pretrained(small, dtype=torch.float32), with_boxes=True)
    assert counts == [1] * 8  # of `forward` and of `find`


def test_attention_in_blocks_is_that_of_pytorch_and_makes_few_scores_at_once(small, monkeypatch):
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32, attn_implementation="eager")
    pixels, asked = images(model), prompts(with_boxes=True)
    expected = answers(model, pixels, asked)[0]
    made = []

    def attend(module, query, key, value, mask, **kwargs):
        if mask is None:  # with one, keys are words, whose number is free
            made.append(query.shape[1] * query.shape[2] * key.shape[2])
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention, "eager_attention_forward", attend)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1000)
    attention.attend_in_blocks(model)
    apart = differences(answers(model, pixels, asked)[0], expected)
    assert all(value < 1e-5 for value in apart.values()), apart
    assert len(made) > 20 and max(made) <= 1000 + 4 * 64  # at most a row of 64 positions and 4 heads more than allowed


def test_the_pipeline_takes_it_as_any_model(small, exported, picture):
    first, second = (Sam3LitePipeline.from_pretrained(folder, device="cpu") for folder in (exported, small))
    asked = [
        "cat",
        Prompt("dog", boxes=[[10, 10, 40, 50]], negative_boxes=[[50, 20, 80, 60]]),
        Prompt(boxes=[[5, 5, 60, 60]]),
    ]
    same(*(pipe(picture, asked, threshold=0.1, max_detections=9) for pipe in (first, second)))
    tiles = {"tile_size": 50, "tile_overlap": 10, "threshold": 0.1, "max_detections": 9}
    same(*(pipe(picture, WORDS, **tiles) for pipe in (first, second)))
    one, other = (pipe([picture, picture], [["cat"], ["dog", "cat"]], threshold=0.1) for pipe in (first, second))
    for found, expected in zip(one, other, strict=True):
        same(found, expected)


def test_the_page_takes_an_exported_folder(exported, small, picture):
    chosen = open_picture(picture)
    box = {"box": [0.1, 0.1, 0.6, 0.7], "positive": True}
    first, second = ask([Finder.open(str(exported)), Finder.open(str(small), "cpu")], chosen, "cat", [box], None)
    same(first.found, second.found)
    assert first.found.prompts == ["cat", "drawn boxes"] and first.computed == "cpu, fp32"


def test_nothing_found_is_no_error(exported, picture):
    found = Sam3LitePipeline.from_pretrained(exported)(picture, WORDS, threshold=1.0)
    assert len(found) == 0 and found.masks.shape == (0, 70, 90)


def test_a_fixed_vocabulary_has_no_text_graph(small, exported, picture, tmp_path, monkeypatch):
    # The graphs are the same but for that of the text, and took half a minute to trace.
    monkeypatch.setattr(exporting, "write_onnx", lambda graph, path: shutil.copyfile(exported / path.name, path))
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    model.freeze_vocabulary(WORDS, Sam3LiteProcessor.from_pretrained(small)).save_pretrained(tmp_path / "fixed")
    Sam3LiteProcessor.from_pretrained(small).save_pretrained(tmp_path / "fixed")
    export_model(tmp_path / "fixed", tmp_path / "onnx")
    assert not (tmp_path / "onnx" / "text.onnx").exists()
    pipes = [Sam3LitePipeline.from_pretrained(tmp_path / name, device="cpu") for name in ("onnx", "fixed")]
    same(*(pipe(picture, [*WORDS, Prompt(boxes=[[5, 5, 60, 60]])], threshold=0.1, max_detections=9) for pipe in pipes))
    with pytest.raises(
        ValueError, match="'dog': not in the fixed vocabulary of this model, which is: 'cat', 'red car'"
    ):
        pipes[0](picture, "dog")


@pytest.mark.parametrize("kind", ["s0", pytest.param("s1", marks=pytest.mark.slow)])
def test_text_encoders_that_see_padding_are_those_of_pytorch(kind, tmp_path):
    model = lite_text_model(kind)
    model.set_attn_implementation("eager")
    write_onnx(graphs_of(model)["text"], tmp_path / "text.onnx")
    exported = ExportedModel(Export(tmp_path, {"format": "onnx"}, model.config))
    tokens = Sam3LiteProcessor.from_config(model.config)(text=PHRASES)
    longest = int(tokens["attention_mask"].sum(1).max())
    for length in (longest, None):
        ids, mask = (tokens[name][:, :length] for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            found, expected = (one.get_text_features(ids, mask).pooler_output for one in (exported, model))
        torch.testing.assert_close(found[mask != 0], expected[mask != 0], atol=1e-4, rtol=1e-4)


def test_commands_take_it(small, exported, picture, tmp_path):
    told = run("info", exported)
    assert told.exit_code == 0 and "onnx in fp32" in told.output and "detector" in told.output
    facts = json.loads(run("info", exported, "--json").output)
    assert facts["bytes"] == sum(path.stat().st_size for path in exported.glob("*.onnx"))
    for name, folder in (("one", exported), ("other", small)):
        output, words = tmp_path / name, ["--prompt", "cat", "--prompt", "dog"]
        options = ["--output", output, "--threshold", 0.1, "--max-detections", 5, "--workers", 0, *words]
        result = run("predict", picture, "--model", folder, *options)
        assert result.exit_code == 0, result.output
    one, other = (
        json.loads((tmp_path / name / "predictions" / "picture.png.json").read_text()) for name in ("one", "other")
    )
    assert [found["label"] for found in one["detections"]] == [found["label"] for found in other["detections"]]
    result = run(
        "label", picture, "--model", exported, "--output", tmp_path / "labelled", "--workers", 0, "--prompt", "cat"
    )
    assert result.exit_code == 0, result.output


def test_films_are_followed_with_it(small, exported, tmp_path):
    pytest.importorskip("trackers", reason="needs trackers, of the extra `video`")
    (tmp_path / "frames").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{number}.png")
    words = ["--prompt", "cat", "--prompt", "dog", "--threshold", 0.05, "--low-threshold", 0.05, "--max-objects", 3]
    followed = []
    for folder in (exported, small):
        result = run("track", tmp_path / "frames", "--model", folder, "--output", tmp_path / folder.name, *words)
        assert result.exit_code == 0, result.output
        tracks = json.loads((tmp_path / folder.name / "tracks.json").read_text())
        followed.append([(each["id"], each["label"]) for frame in tracks["frames"] for each in frame["objects"]])
    assert followed[0] == followed[1] and len(followed[0]) > 2


def test_scores_are_those_of_pytorch(small, exported, tmp_path):
    data = write_dataset(tmp_path / "data", num_train=1, num_valid=3, image_size=64, num_concepts=2, seed=3)
    scores = []
    for folder in (exported, small):
        result = run("evaluate", "--model", folder, "--data", data, "--workers", 0, "--output", tmp_path / folder.name)
        assert result.exit_code == 0, result.output
        scores.append(json.loads((tmp_path / folder.name / "metrics.json").read_text()))
    assert scores[0]["precision"] == "fp32" and "loss" not in scores[0]
    for name in ("segm_AP", "bbox_AP", "segm_cgF1"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-3)
    result = run("compare", exported, small, "--data", data, "--workers", 0, "--output", tmp_path / "compared")
    assert result.exit_code == 0, result.output
    compared = json.loads((tmp_path / "compared" / "comparison.json").read_text())["models"]
    assert compared[0]["parameters"] is None and compared[0]["bytes"] > 1e5 and compared[0]["precision"] == "fp32"
    for one, own in zip(compared, scores, strict=True):
        assert one["scores"]["segm_AP"] == pytest.approx(own["segm_AP"], abs=1e-4)


def test_the_json_says_what_a_program_needs(exported):
    facts = json.loads((exported / EXPORT_FILE).read_text())
    assert facts["image"]["mean"] == [0.5, 0.5, 0.5] and facts["sizes"]["image_size"] == 64
    assert facts["thresholds"] == {"score": 0.3, "mask": 0.5, "nms_iou": 0.7} and facts["operator_set"] == 20
    assert {"torch", "onnx", "sam3-hf"} <= set(facts["versions"]) and facts["license"]
    assert (exported / "tokenizer.json").is_file() and "sam3-lite export" in (exported / "README.md").read_text()


def test_attention_is_of_plain_operators_and_nothing_tells_of_this_machine(exported):
    for path in exported.glob("*.onnx"):
        graph = onnx.load(path).graph
        assert {node.domain for node in graph.node} == {""}
        assert "Attention" not in {node.op_type for node in graph.node}
        assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()
    for name, axes in {"vision": ["images"], "boxes": ["prompts", "boxes"], "masks": ["images"]}.items():
        first = onnx.load(exported / f"{name}.onnx").graph.input[0]
        assert [axis.dim_param for axis in first.type.tensor_type.shape.dim][: len(axes)] == axes


def test_it_is_written_whole_or_not_at_all(small, tmp_path, monkeypatch):
    written = []

    def write(graph, path):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(b"")

    monkeypatch.setattr(exporting, "write_onnx", write)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    result = run("export", small, tmp_path / "old")
    assert result.exit_code == 1 and "exists" in result.stderr and not written
    result = run("export", small, tmp_path / "old", "--overwrite")
    assert result.exit_code == 1 and result.stderr.endswith("the disk is full: make space\n"), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old" / "kept").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "masks.onnx").unlink(), "masks.onnx is missing, the folder is half copied"),
        (lambda folder: (folder / "vision.onnx").write_bytes(b"abc"), "vision.onnx has 3 of"),
        (
            lambda folder: (folder / EXPORT_FILE).unlink(),
            f"no {EXPORT_FILE}: it is half copied, or of another program",
        ),
        (lambda folder: (folder / EXPORT_FILE).write_text("{"), "is no JSON"),
        (lambda folder: change(folder, "layout", 99), "has layout 99, this version of sam3-hf reads 1"),
        (lambda folder: change(folder, "format", "mnn"), "`format` 'mnn' is none of onnx, openvino"),
        (lambda folder: change(folder, "graphs"), "lacks `graphs`"),
        (lambda folder: change(folder, "format", "openvino"), "does not know boxes.xml"),
        (lambda folder: rewrite(folder, b"no graph"), "it is damaged or another program's"),
        (lambda folder: newer(folder), "has a newer operator set than onnxruntime"),
    ],
)
def test_bad_folders_are_named_in_one_line(exported, picture, tmp_path, damage, message):
    folder = tmp_path / "folder"
    shutil.copytree(exported, folder)
    damage(folder)
    options = ["--output", tmp_path / "out", "--prompt", "cat", "--workers", 0]
    result = run("predict", picture, "--model", folder, *options)
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "predictions").exists()


def change(folder: Path, key: str, value=None):
    """Another value in the JSON; without one the key goes."""
    facts = json.loads((folder / EXPORT_FILE).read_text())
    facts.pop(key)
    facts |= {} if value is None else {key: value}
    (folder / EXPORT_FILE).write_text(json.dumps(facts))


def rewrite(folder: Path, content: bytes):
    """A file of the text graph with another content, of which the JSON knows."""
    (folder / "text.onnx").write_bytes(content)
    files = json.loads((folder / EXPORT_FILE).read_text())["files"]
    files["text.onnx"]["bytes"] = len(content)
    change(folder, "files", files)


def newer(folder: Path):
    model = onnx.load(folder / "text.onnx")
    model.opset_import[0].version = 99
    rewrite(folder, model.SerializeToString())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "--precision int8 fits ranges to pictures: pass --calibration-images DIR"),
        (["--calibration-images", "."], "--calibration-images is for --precision int8 alone"),
        (["--image-size", "60"], "image_size"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(small, tmp_path, options, message):
    result = run("export", small, tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_there_are_said_before_anything_is_traced(small, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write_onnx", lambda graph, path: pytest.fail("traced"))
    options = ["--precision", "int8", "--calibration-images", tmp_path]
    result = run("export", small, tmp_path / "out", *options)
    assert result.exit_code == 1 and f"{tmp_path} holds no image file" in result.stderr, result.output


@pytest.mark.parametrize("options", [["--precision", "fp16"], ["--image-size", "128"]])
def test_what_cannot_be_made_of_graphs_is_said_in_one_line(exported, tmp_path, options):
    result = run("export", exported, tmp_path / "out", *options)
    assert result.exit_code == 1 and "holds graphs for onnx in fp32" in result.stderr, result.output


@pytest.mark.parametrize(("argument", "value"), [("dtype", "fp16"), ("image_size", 128), ("preset", "lite")])
def test_what_an_exported_model_cannot_be_asked_for(exported, argument, value):
    with pytest.raises(ValueError, match=argument):
        Sam3LitePipeline.from_pretrained(exported, **{argument: value})


def test_openvino_gives_the_same(small, with_weights_beside, picture, tmp_path):
    export_model(with_weights_beside, tmp_path / "ov", format="openvino")
    assert {path.suffix for path in tmp_path.glob("ov/*")} & {".onnx", ".data"} == set()
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    assert_equal_in_float32(open_export(tmp_path / "ov")[0], model, with_boxes=True)
    first, second = (Sam3LitePipeline.from_pretrained(folder, device="cpu") for folder in (tmp_path / "ov", small))
    same(*(pipe(picture, WORDS, threshold=0.1, max_detections=9) for pipe in (first, second)))
    with pytest.raises(ValueError, match="dtype"):
        Sam3LitePipeline.from_pretrained(tmp_path / "ov", dtype="float16")
    shutil.copyfile(small / "config.json", tmp_path / "ov" / "vision.bin")
    with pytest.raises(OSError, match="vision.bin has"):
        open_export(tmp_path / "ov")


def test_signals_still_arrive_where_openvino_models_are_gone(tmp_path):
    script = """
import gc, os, signal
import numpy as np
import openvino
import openvino.opset13 as ops
from pathlib import Path
from sam3_hf.exporting.engines import OpenVinoGraph

one = ops.parameter([1, 8], np.float32, name="one")
openvino.save_model(openvino.Model([ops.relu(one)], [one]), "relu.xml")
graphs = [OpenVinoGraph(Path("relu.xml"), "cpu", 1) for _ in range(2)]
while graphs:
    graphs.pop(0)
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("arrived"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    finished = warm.run(["-c", script], tmp_path, dict(os.environ))
    assert (finished.returncode, finished.stdout) == (0, "arrived\n"), finished.stderr


def test_a_repository_of_the_hub_is_a_model_as_well(hub, with_weights_beside, picture, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in with_weights_beside.iterdir()}
    result = run("push", with_weights_beside, "me/graphs", "--private", "--message", "Graphs")
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in with_weights_beside.iterdir()} == before
    _, commit = hub.repositories["me/graphs"].branches["main"]
    assert commit.sha in result.output and set(commit.files) == set(before) and "vision.onnx" in commit.large
    card = commit.files["README.md"].decode()
    assert 'from_pretrained("me/graphs")' in card and "path/to/this/folder" not in card
    told = run("info", "me/graphs")
    assert told.exit_code == 0 and "me/graphs: " in told.output and "onnx in fp32" in told.output
    assert hub.count("resolve/.*/.*onnx") == 0  # no graph was downloaded to tell of them
    first, second = (
        Sam3LitePipeline.from_pretrained(source, device="cpu") for source in ("me/graphs", with_weights_beside)
    )
    same(*(pipe(picture, WORDS, threshold=0.1, max_detections=9) for pipe in (first, second)))
    options = ["--output", tmp_path / "found", "--prompt", "cat", "--workers", 0]
    assert run("predict", picture, "--model", "me/graphs", *options).exit_code == 0
    assert run("export", "me/graphs", tmp_path / "small", "--precision", "int8-weights").exit_code == 0
    data = write_dataset(tmp_path / "data", 1, 1, image_size=64)
    result = run(
        "compare", "me/graphs", with_weights_beside, "--data", data, "--output", tmp_path / "compared", "--workers", 0
    )
    assert result.exit_code == 0, result.output
    sizes = [one["bytes"] for one in json.loads((tmp_path / "compared" / "comparison.json").read_text())["models"]]
    assert sizes[0] == sizes[1] > 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(open_export("me/graphs")[1].tokenizer) == len(second.processor.tokenizer)


def test_a_second_push_leaves_no_graph_of_the_first(hub, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    hub.add_file("me/graphs", "vision.xml", b"of an earlier push")
    hub.add_file("me/graphs", "other/vision.xml", b"of somebody else")
    (tmp_path / "copy" / "README.md").unlink()
    (tmp_path / "copy" / "optimizer.bin").touch()
    assert run("push", tmp_path / "copy", "me/graphs").exit_code == 0
    files = hub.repositories["me/graphs"].branches["main"][-1].files
    assert set(files) == {path.name for path in exported.iterdir()} | {"other/vision.xml"}
    assert b"sam3-lite export" in files["README.md"]


def test_graphs_and_weights_do_not_go_into_one_repository(hub, small, exported, tmp_path):
    for first, second, name in ((small, exported, "config.json"), (exported, small, EXPORT_FILE)):
        assert run("push", first, f"me/{name}").exit_code == 0
        result = run("push", second, f"me/{name}")
        assert result.exit_code == 1 and f"holds a model of another kind ({name})" in result.stderr, result.output
        assert len(hub.repositories[f"me/{name}"].branches["main"]) == 2


def test_what_is_no_model_to_push_or_to_train_is_said(hub, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "masks.onnx").unlink()
    result = run("push", tmp_path / "copy", "me/graphs")
    assert result.exit_code == 1 and "masks.onnx is missing, the folder is half copied" in result.stderr
    hub.add_file("me/half", EXPORT_FILE, (exported / EXPORT_FILE).read_bytes())
    result = run("evaluate", "--model", "me/half", "--data", write_dataset(tmp_path / "data", 1, 1, image_size=64))
    assert result.exit_code == 1 and "boxes.onnx" in result.stderr and result.stderr.count("\n") == 1, result.output
    result = run("convert", exported, tmp_path / "out")
    assert result.exit_code == 1 and "holds graphs of 'sam3-lite export'" in result.stderr
    assert not hub.repositories.get("me/graphs")


def test_an_openvino_that_is_too_old_is_said(small, tmp_path, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino, "__version__", "2023.3.0-13775")
    result = run("export", small, tmp_path / "out", "--format", "openvino")
    assert result.exit_code == 1 and "openvino 2023.3.0-13775 is too old, 2025.0 is needed" in result.stderr


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_what_is_not_installed_is_said(small, exported, picture, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    command = ["export", small, tmp_path / "out"]
    if name == "onnxruntime":
        command = ["predict", picture, "--model", exported, "--output", tmp_path / "out", "--prompt", "cat"]
    result = run(*command)
    assert result.exit_code == 1 and f"{name} is not installed" in result.stderr and "sam3-hf[export]" in result.stderr


@pytest.mark.parametrize("precision", ["int8-weights", "int8"])
def test_int8_is_smaller_and_near(exported, picture, tmp_path, precision, caplog):
    options = ["--precision", precision]
    if precision == "int8":
        options += ["--calibration-images", picture.parent, "--calibration-prompt", "cat"]
    result = run("export", exported, tmp_path / "int8", *options)
    assert result.exit_code == 0, result.output
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    sizes = [sum(path.stat().st_size for path in folder.glob("*.onnx")) for folder in (tmp_path / "int8", exported)]
    assert sizes[0] < 0.5 * sizes[1]  # of so small a model; weights are a quarter
    exact, ours = (open_export(folder)[0] for folder in (exported, tmp_path / "int8"))
    pixels = images(exact).clamp(-1, 1)
    for with_boxes in (False, True):
        (result, _), (expected, _) = (answers(model, pixels, prompts(with_boxes)) for model in (ours, exact))
        apart = differences(result, expected)
        assert 0 < apart["pred_logits"] < 0.6 and apart["pred_boxes"] < 0.1, apart


def test_what_stays_in_float(exported, picture, tmp_path):
    """Norms, softmax, products of two activations, and what `FLOAT_ACTIVATIONS` names."""
    export_model(exported, tmp_path / "int8", precision="int8", calibration=Calibration(picture.parent, ["cat"]))
    for path in (tmp_path / "int8").glob("*.onnx"):
        graph = onnx.load(path).graph
        makers = {output: node for node in graph.node for output in node.output}
        constants = {tensor.name for tensor in graph.initializer}

        def is_int8(name: str, makers=makers, constants=constants) -> bool:
            """Whether a tensor is an activation that was rounded to int8."""
            maker = makers.get(name)
            return maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] not in constants

        for node in graph.node:
            if node.op_type in ("Softmax", "LayerNormalization"):
                assert not any(map(is_int8, node.input)), node.name
            elif node.op_type in ("MatMul", "Gemm", "Conv") and any(map(is_int8, node.input)):
                weight = makers.get(node.input[1])
                assert weight.op_type == "DequantizeLinear" and weight.input[0] in constants, node.name
                assert not is_excluded(node.name), node.name
    vision = onnx.load(tmp_path / "int8" / "vision.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in vision.node) > 10
    layers = micro_config().vision_config.backbone_config.num_hidden_layers
    assert sum(node.op_type == "Gemm" for node in vision.node) == 6 * layers


def rewritten(exported: Path, folder: Path, rewrite) -> Iterator[tuple[str, Counter, Counter]]:
    """Rewrites a copy of graphs; yields the names of them, and their numbers of operators before and after."""
    shutil.copytree(exported, folder)
    facts = json.loads((folder / EXPORT_FILE).read_text())
    for name in facts["graphs"]:
        path = folder / f"{name}.onnx"
        rewrite(path)
        graphs = [onnx.load(one / path.name).graph for one in (exported, folder)]
        names = [node.name for node in graphs[1].node if node.name]
        assert len(names) == len(set(names))
        yield name, *(Counter(node.op_type for node in graph.node) for graph in graphs)
        facts["files"][path.name]["bytes"] = path.stat().st_size
    change(folder, "files", facts["files"])


def test_products_with_their_biases_are_the_same(small, exported, tmp_path):
    for _, before, after in rewritten(exported, tmp_path / "fused", biases_into_products):
        more = {kind: after[kind] - before[kind] for kind in ("Gemm", "MatMul", "Add")}
        assert more["Gemm"] == -more["MatMul"] == -more["Add"] > 0
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    for with_boxes in (False, True):
        assert_equal_in_float32(open_export(tmp_path / "fused")[0], model, with_boxes)


def test_attention_in_one_operator_is_the_same(small, exported, tmp_path):
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    layers = {
        "vision": len(model.vision_encoder.backbone.layers),
        "text": 0,  # its words do not see those that follow
        "boxes": len(model.geometry_encoder.layers),  # among pixels, not among boxes of which some are padding
        "detector": len(model.detr_encoder.layers) + len(model.detr_decoder.layers),
        "masks": 0,
    }
    for name, before, after in rewritten(exported, tmp_path / "joined", join_attention):
        joined = before["Softmax"] - after["Softmax"]
        assert joined == after["MultiHeadAttention"] == layers.pop(name)
        assert after["RotaryEmbedding"] == (2 * joined if name == "vision" else 0)
        assert before["MatMul"] - after["MatMul"] == 2 * (joined + after["RotaryEmbedding"] // 2)
        assert after["Transpose"] <= before["Transpose"] - 4 * joined
    assert not layers
    for with_boxes in (False, True):
        assert_equal_in_float32(open_export(tmp_path / "joined")[0], model, with_boxes)


def test_blocks_of_attention_become_one_operator(small, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1000)
    monkeypatch.setattr(build, "WEIGHTS_BESIDE", 1000)
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32, attn_implementation="eager").eval()
    attention.attend_in_blocks(model)
    path = tmp_path / "vision.onnx"
    write_onnx(graphs_of(model)["vision"], path)
    assert path.with_name("vision.onnx.data").is_file()
    pixels = images(model)
    expected = OnnxRuntimeGraph(path, "cpu", threads=1)(pixel_values=pixels)
    layers = len(model.vision_encoder.backbone.layers)
    assert sum(node.op_type == "Softmax" for node in onnx.load(path).graph.node) > 4 * layers
    join_attention(path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["MultiHeadAttention"] == layers and not kinds["Softmax"] + kinds["Split"]
    for found, wanted in zip(OnnxRuntimeGraph(path, "cpu", threads=1)(pixel_values=pixels), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_weights_in_a_file_beside_a_graph_are_those_within(
    small, exported, with_weights_beside, tmp_path, monkeypatch
):
    graphs = sorted(with_weights_beside.glob("*.onnx"))
    assert all(path.with_name(f"{path.name}.data").stat().st_mode == path.stat().st_mode for path in graphs)
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    assert_equal_in_float32(open_export(with_weights_beside)[0], model, with_boxes=True)
    monkeypatch.setattr(build, "WEIGHTS_BESIDE", 1000)
    pixels, asked, found = images(model), prompts(with_boxes=True), []
    for source in (with_weights_beside, exported):
        target = tmp_path / source.name
        export_model(source, target, precision="int8-weights")
        assert len(list(target.glob("*.data"))) == len(graphs)
        found.append(answers(open_export(target)[0], pixels, asked)[0])
    assert all(value == 0 for value in differences(*found).values())


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> Path:
    """The Python of an environment with the libraries of the example and no others."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=HUNG)
    (packages,) = folder.glob("lib/python3*/site-packages")
    wanted = ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs", "tokenizers")
    wanted += ("google", "flatbuffers", "packaging", "sympy", "mpmath", "coloredlogs", "humanfriendly")
    theirs = Path(np.__file__).parents[1]
    for name in wanted:
        if (theirs / name).exists():
            (packages / name).symlink_to(theirs / name)
    return next(folder.glob("bin/python"))


def test_the_example_runs_without_torch(exported, picture, tmp_path, without_torch):
    example = ROOT / "examples" / "onnx_without_torch.py"
    assert len(example.read_text().splitlines()) <= 80
    folder = tmp_path / "folder"
    shutil.copytree(exported, folder)
    change(folder, "thresholds", {"score": 0.1, "mask": 0.5, "nms_iou": 0.7})
    environment = {"PATH": "", "HOME": str(tmp_path)}
    asked = {"text": True, "timeout": HUNG, "env": environment, "capture_output": True}
    assert "No module named 'torch'" in subprocess.run([without_torch, "-c", "import torch"], **asked).stderr
    command = [without_torch, example, folder, picture, tmp_path / "found.json", tmp_path / "overlay.png", *WORDS]
    finished = subprocess.run(command, **asked)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    expected = Sam3LitePipeline.from_pretrained(exported)(picture, WORDS, threshold=0.1, nms_iou=None)
    assert abs(len(found) - len(expected)) <= 2 and len(found) > 3
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    assert np.allclose(scores[:3], expected.scores[:3], atol=0.01)  # another resampling of the picture
    overlay = np.asarray(Image.open(tmp_path / "overlay.png"))
    assert overlay.shape == (70, 90, 3) and (overlay != np.asarray(Image.open(picture))).any()


@pytest.mark.slow
@pytest.mark.parametrize("with_boxes", [False, True], ids=["words", "boxes"])
def test_fp16_is_as_near_as_half_in_pytorch(small, tmp_path, with_boxes):
    export_model(small, tmp_path / "half", precision="fp16")
    model = Sam3LiteModel.from_pretrained(small, dtype=torch.float32)
    half = Sam3LiteModel.from_pretrained(small, dtype=torch.float16)
    pixels, asked = images(model), prompts(with_boxes)
    exact, ours, theirs = (answers(one, pixels, asked)[0] for one in (model, open_export(tmp_path / "half")[0], half))
    apart, allowed = differences(ours, exact), differences(theirs, exact)
    assert all(apart[name] <= 2 * allowed[name] + 1e-4 for name in apart), (apart, allowed)
