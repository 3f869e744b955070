import functools
import http.server
import json
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import micro_config, shake
from faster_coco_eval import COCO
from PIL import Image
from scipy import ndimage

from sam3_hf import Prompt, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.modeling_sam3_lite import PROMPTS_SEGMENTED_AT_ONCE, Sam3LiteFindings
from sam3_hf.prediction.detections import suppress
from sam3_hf.prediction.pipeline import PredictionSettings
from sam3_hf.prediction.tiling import cut_tiles
from sam3_hf.reading import read_image
from sam3_hf.rle import decode_mask, encode_part


@pytest.fixture
def pipe(model) -> Sam3LitePipeline:
    return Sam3LitePipeline(model, Sam3LiteProcessor.from_config(model.config))


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((50, 70), (90, 40))]


def plain(pipe, images, text, threshold, **inputs) -> list[dict]:
    """The plain forward and post-processing, one dict per prompt with its image."""
    encoded = pipe.processor(images=images, text=text, **inputs)
    with torch.no_grad():
        outputs = pipe.model(**encoded)
    owners = encoded["image_index"].tolist()
    sizes = [(images[owner].height, images[owner].width) for owner in owners]
    found = pipe.processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)
    return [{**one, "image": owner} for one, owner in zip(found, owners, strict=True)]


def middle_score(pipe, images, text, **inputs) -> float:
    """A threshold that keeps half of what the model with random weights finds."""
    scores = torch.cat([one["scores"] for one in plain(pipe, images, text, 0.0, **inputs)]).sort().values
    return (scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].sum() / 2).item()


def assert_equal_to_plain(results, expected, labels):
    assert sum(len(result) for result in results) == sum(len(one["scores"]) for one in expected) > 0
    for index, result in enumerate(results):
        own = [(one, label) for one, label in zip(expected, labels, strict=True) if one["image"] == index]
        scores = torch.cat([one["scores"] for one, _ in own])
        order = scores.argsort(descending=True)
        names = [label for one, label in own for _ in one["scores"]]
        assert torch.allclose(result.scores, scores[order], atol=1e-5)
        assert result.labels == [names[place] for place in order]
        assert torch.allclose(result.boxes, torch.cat([one["boxes"] for one, _ in own])[order], atol=1e-3)
        masks = torch.cat([one["masks"] for one, _ in own])[order]
        assert result.masks.shape == masks.shape and result.masks.dtype == torch.bool
        if len(result):
            assert (result.masks != masks).float().mean() < 1e-4 and masks.any() and not masks.all()


def test_equals_post_processing_of_the_plain_forward(pipe, images):
    text = [["a red circle", "dog"], ["cat"]]
    threshold = middle_score(pipe, images, text)
    expected = plain(pipe, images, text, threshold)
    results = pipe(images, text, threshold=threshold, nms_iou=None)
    assert_equal_to_plain(results, expected, ["a red circle", "dog", "cat"])
    assert results[0].prompts == ["a red circle", "dog"] and results[1].size == (90, 40)


def test_chunks_of_prompts_and_images_change_nothing(pipe, images, monkeypatch):
    text = [["a red circle", "dog", "cat"]] * 2
    threshold = middle_score(pipe, images, text)
    expected = plain(pipe, images, text, threshold)
    monkeypatch.setattr("sam3_hf.prediction.pipeline.PROMPTS_AT_ONCE", 2)
    monkeypatch.setattr("sam3_hf.modeling_sam3_lite.PROMPTS_SEGMENTED_AT_ONCE", 1)
    for batch_size in (1, 2):
        results = pipe(images, text[0], threshold=threshold, batch_size=batch_size, nms_iou=None)
        assert_equal_to_plain(results, expected, text[0] * 2)


def test_boxes_equal_the_plain_forward(pipe, images):
    text = [["dog", "cat"], [None]]
    boxes = [[[5, 5, 30, 40], [20, 10, 60, 45]], None, [[0, 0, 20, 50]]]
    inputs = {"input_boxes": boxes, "input_boxes_labels": [[1, 0], None, [1]]}
    threshold = middle_score(pipe, images, text, **inputs)
    prompts = [
        [Prompt("dog", boxes=boxes[0][:1], negative_boxes=boxes[0][1:], label="that dog"), "cat"],
        [Prompt(boxes=boxes[2])],
    ]
    results = pipe(images, prompts, threshold=threshold, nms_iou=None)
    assert_equal_to_plain(results, plain(pipe, images, text, threshold, **inputs), ["that dog", "cat", "visual"])
    positive = pipe(images[0], Prompt("dog", boxes=boxes[0]), threshold=0, nms_iou=None)
    negative = pipe(images[0], prompts[0][0], threshold=0, nms_iou=None)
    assert not torch.allclose(positive.scores, negative.scores)


def test_every_form_of_an_image_gives_the_same(pipe, images, tmp_path):
    path = tmp_path / "image.png"
    images[0].save(path)
    array = np.array(images[0])
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/image.png"
    opaque = np.concatenate([array, np.full((*array.shape[:2], 1), 255, np.uint8)], axis=2)
    forms = [path, str(path), images[0], array, opaque, tensor, array / 255.0, tensor.float() / 255]
    try:
        forms.append(read_image(url, private_addresses=True))
        results = pipe(forms, "cat", threshold=0, nms_iou=None)
    finally:
        server.shutdown()
    first = pipe(tensor[None], "cat", threshold=0, nms_iou=None)[0]
    assert len(first) == pipe.model.config.detr_decoder_config.num_queries
    for result in results:
        assert torch.allclose(result.scores, first.scores) and torch.allclose(result.boxes, first.boxes, atol=1e-4)


def test_files_are_turned_upright_and_16_bits_are_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 30, 20)
    Image.fromarray(np.full((4, 5), 128 * 256, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 128).all()


def count_calls(monkeypatch, owner, name) -> list:
    """Replaces a method by itself and a record of its arguments."""
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def steer(monkeypatch, model, confident: list[list[int]]):
    """Makes the detector sure of these queries of each prompt in turn, and of no other."""
    left, detect = list(confident), model.detect

    def steered(levels, image_index, *args):
        found = detect(levels, image_index, *args)
        found.logits = torch.full_like(found.logits, -9.0)
        found.presence_logits = torch.full_like(found.presence_logits, 9.0)
        for row in range(len(image_index)):
            for rank, query in enumerate(left.pop(0)):
                found.logits[-1, row, query] = 5.0 - 0.01 * rank
        return found

    monkeypatch.setattr(model, "detect", steered)


def test_masks_are_computed_for_kept_detections_of_prompts_that_have_any(pipe, images, monkeypatch):
    confident = [[]] * 3 + [[1, 5]] + [[]] * 2 + [[2]] + [[0]] * 5  # six prompts, two images
    steer(monkeypatch, pipe.model, confident + [[]] * 12)
    decoded = count_calls(monkeypatch, pipe.model.mask_decoder, "forward")
    masks = count_calls(monkeypatch, pipe.model.mask_decoder, "matched_masks")
    everything = count_calls(monkeypatch, pipe.model.mask_decoder, "masks")
    results = pipe(images, list("abcdef"), nms_iou=None)
    assert [len(result) for result in results] == [2, 6]
    assert [len(args[2]) for args in decoded] == [PROMPTS_SEGMENTED_AT_ONCE, 3]  # seven prompts have detections
    assert sum(len(args[3]) for args in masks) == 8 and not everything

    decoded.clear()
    assert [len(result) for result in pipe(images, list("abcdef"), nms_iou=None)] == [0, 0] and not decoded


def test_images_and_phrases_are_encoded_once(pipe, images, monkeypatch):
    vision = count_calls(monkeypatch, pipe.model, "get_vision_features")
    text = count_calls(monkeypatch, pipe.model, "get_text_features")
    pipe(images, ["cat", "dog", "cat", Prompt("dog", boxes=[[0, 0, 9, 9]])])
    assert sum(len(args[0]) for args in vision) == 2
    assert sum(len(args[0]) for args in text) == 2


@pytest.mark.parametrize("more", [{}, {"tile_size": 30}])
def test_masks_before_suppression_have_a_limit(pipe, images, monkeypatch, more):
    """Where nothing is suppressed, the best are the same as without it."""
    everything = pipe(images[0], ["cat", "dog"], threshold=0, nms_iou=1.0, **more)
    made = []
    find = Sam3LiteModel.find

    def counted(self, *inputs, **options):
        found = find(self, *inputs, **options)
        made.append(len(found.mask_logits))
        return found

    monkeypatch.setattr(Sam3LiteModel, "find", counted)
    found = pipe(images[0], ["cat", "dog"], threshold=0, nms_iou=1.0, max_detections=2, batch_size=1, **more)
    assert set(made) == {8}
    assert torch.allclose(found.scores, everything.scores[:2])


def test_max_detections_keeps_the_best_of_an_image(pipe, images, monkeypatch):
    everything = pipe(images, ["cat", "dog"], threshold=0, nms_iou=None)
    masks = count_calls(monkeypatch, pipe.model.mask_decoder, "matched_masks")
    few = pipe(images, ["cat", "dog"], threshold=0, max_detections=5, nms_iou=None)
    for result, whole in zip(few, everything, strict=True):
        assert len(result) == 5 and torch.allclose(result.scores, whole.scores[:5])
        assert torch.allclose(result.boxes, whole.boxes[:5])
    assert sum(len(args[3]) for args in masks) == 10


def rectangle(left, top, right, bottom, size=(40, 60)) -> dict:
    return encode_part(torch.ones(bottom - top, right - left, dtype=torch.bool), top, left, size)


def test_suppression_is_by_masks_within_a_label():
    rle = [
        rectangle(0, 0, 20, 20),
        rectangle(2, 0, 22, 20),  # overlaps the first by 18 / 22
        rectangle(2, 0, 22, 20),
        rectangle(10, 0, 30, 20),  # overlaps the first by 1/3
        rectangle(0, 0, 0, 0),
    ]
    assert suppress(["a", "a", "b", "a", "a"], rle, 0.5) == [0, 2, 3, 4]
    assert suppress(["a", "a", "b", "a", "a"], rle, 0.3) == [0, 2, 4]
    assert suppress(["a", "a", "b", "a", "a"], rle, 0.9) == [0, 1, 2, 3, 4]


def test_suppression_in_the_pipeline(pipe, images, monkeypatch):
    whole = pipe(images[0], ["cat", "dog"], threshold=0, nms_iou=None)
    kept = pipe(images[0], ["cat", "dog"], threshold=0, nms_iou=0.1, max_detections=4)
    stay = suppress(whole.labels, whole.rle, 0.1)[:4]
    assert stay != [0, 1, 2, 3]
    assert kept.rle == [whole.rle[place] for place in stay]


def test_what_is_found_twice_is_given_once_unless_told(pipe, images, monkeypatch):
    steer(monkeypatch, pipe.model, [[1, 5], [2]] * 2)
    twice = torch.full((3, 64, 64), 5.0)
    monkeypatch.setattr(pipe.model, "_masks_of", lambda *_: twice)
    found = pipe(images[0], ["cat", "dog"])
    assert sorted(found.labels) == ["cat", "dog"]
    assert sorted(pipe(images[0], ["cat", "dog"], nms_iou=None).labels) == ["cat", "cat", "dog"]


@pytest.fixture
def bright_pipe(pipe, monkeypatch) -> Sam3LitePipeline:
    """A pipeline whose model finds connected bright spots: with score 0.6 at the edge of a tile, 0.9 elsewhere."""

    def find(vision, image_index, threshold, **_):
        scores, boxes, prompts, masks = [], [], [], []
        for prompt, image in enumerate(image_index.tolist()):
            spots, count = ndimage.label(vision[image, 0].numpy() > 0)
            side = len(spots)
            for (rows, columns), number in zip(ndimage.find_objects(spots), range(1, count + 1), strict=True):
                limits = (columns.start, rows.start, columns.stop, rows.stop)
                boxes.append([limit / side for limit in limits])
                scores.append(0.6 if 0 in limits or side in limits else 0.9)
                prompts.append(prompt)
                masks.append(torch.from_numpy(spots == number) * 20.0 - 10.0)
        none = torch.zeros(0, *vision.shape[-2:])
        return Sam3LiteFindings(
            scores=torch.tensor(scores),
            boxes=torch.tensor(boxes).reshape(-1, 4),
            prompt_index=torch.tensor(prompts, dtype=torch.long),
            mask_logits=torch.stack(masks) if masks else none,
            best=torch.full((len(image_index),), 0.9),
            finite=torch.tensor(True),
        )

    monkeypatch.setattr(pipe.model, "get_vision_features", lambda pixel_values: pixel_values)
    monkeypatch.setattr(pipe.model, "find", find)
    return pipe


def picture_of(rectangles, height=64, width=160) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for left, top, right, bottom in rectangles:
        picture[top:bottom, left:right] = 255
    return picture


# Tiles of 64 pixels that share 16 begin at 0, 48 and 96: the seams are at 48..64 and 96..112.
@pytest.mark.parametrize(
    "rectangles",
    [
        [(40, 10, 80, 30)],  # cut by a seam
        [(50, 10, 60, 30)],  # shown whole by two tiles
        [(10, 10, 150, 30)],  # larger than a tile
        [(40, 5, 80, 20), (40, 30, 80, 45)],  # neighbours, both cut
        [(2, 5, 20, 20), (130, 30, 150, 60)],
        [(45, 10, 52, 30), (57, 10, 75, 30)],  # both in the shared part, and different
    ],
)
def test_tiles_are_joined_at_their_seams(bright_pipe, rectangles):
    picture = picture_of(rectangles)
    found = bright_pipe(picture, "spot", tile_size=64, tile_overlap=16, batch_size=2)
    boxes = sorted(tuple(round(side) for side in box) for box in found.boxes.tolist())
    assert boxes == rectangles
    assert torch.equal(found.masks.any(0), torch.from_numpy(picture[..., 0] > 0))
    assert found.masks.sum() == (picture[..., 0] > 0).sum()  # no pixel is in two detections


def test_tiles_in_both_directions(bright_pipe):
    corner = [(40, 40, 90, 90)]  # four tiles show a part
    found = bright_pipe(picture_of(corner, 112, 112), ["spot", "dot"], tile_size=64, tile_overlap=16)
    assert found.labels == ["spot", "dot"]
    assert [[round(side) for side in box] for box in found.boxes.tolist()] == [[*corner[0]]] * 2
    whole = bright_pipe(picture_of([(20, 20, 40, 40)], 64, 64), "spot", tile_size=64)
    assert whole.scores.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("height", "width", "side", "overlap"), [(100, 250, 64, 16), (64, 64, 64, 0), (30, 90, 64, 63)]
)
def test_tiles_cover_the_image(height, width, side, overlap):
    seen = np.zeros((height, width), int)
    tiles = cut_tiles(height, width, side, overlap)
    for tile in tiles:
        assert (tile.bottom - tile.top, tile.right - tile.left) == (min(side, height), min(side, width))
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert seen.min() == 1 and len(set(tiles)) == len(tiles)
    columns = sorted({tile.left for tile in tiles})
    assert all(second - first <= side - overlap for first, second in zip(columns, columns[1:], strict=False))


def test_coco_export_is_read_by_coco_tools(bright_pipe):
    found = bright_pipe(picture_of([(10, 10, 30, 20), (50, 5, 60, 60)]), "spot")
    entries = json.loads(json.dumps(found.to_coco(7, {"spot": 3})))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7, "height": 64, "width": 160}],
        "categories": [{"id": 3, "name": "spot"}],
        "annotations": [],
    }
    truth.createIndex()
    results = truth.loadRes(entries)
    annotations = results.loadAnns(results.getAnnIds(imgIds=[7], catIds=[3]))
    masks = np.stack([results.annToMask(annotation) for annotation in annotations]).astype(bool)
    assert (masks == found.masks.numpy()).all()
    assert [annotation["score"] for annotation in annotations] == pytest.approx(found.scores.tolist())
    left, top, width, height = annotations[0]["bbox"]
    assert [left, top, left + width, top + height] == pytest.approx(found.boxes[0].tolist())
    with pytest.raises(ValueError, match="spot"):
        found.to_coco(7, {"cat": 1})


def test_supervision_export(bright_pipe):
    pytest.importorskip("supervision")
    for rectangles in ([(10, 10, 30, 20), (50, 5, 60, 60)], []):
        found = bright_pipe(picture_of(rectangles), ["dot", "spot"])
        exported = found.to_supervision()
        assert len(exported) == 2 * len(rectangles)
        assert np.array_equal(exported.xyxy, found.boxes) and np.array_equal(exported.mask, found.masks)
        assert np.array_equal(exported.confidence, found.scores)
        assert [found.prompts[index] for index in exported.class_id] == list(exported["class_name"]) == found.labels


def test_supervision_is_asked_for_when_it_is_missing(bright_pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        bright_pipe(picture_of([]), "spot").to_supervision()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ""}, "needs `text`"),
        ({"prompts": [["cat"], ["dog"]]}, "lists for 2 images"),
        ({"prompts": ["cat", ["dog"]]}, "mixes"),
        ({"images": np.zeros((4, 4, 3), np.int64)}, "int64"),
        ({"images": np.full((4, 4, 3), 2.0)}, r"\[0, 1\]"),
        ({"images": torch.zeros(9, 9, 3)}, "channels, height, width"),
        ({"threshold": 30}, "threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"tile_overlap": 8}, "tile_size"),
        ({"tile_size": 8, "tile_overlap": 8}, "tile_overlap"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompts": Prompt(boxes=[[0, 0, 2, 2]]), "tile_size": 3}, "by words"),
    ],
)
def test_what_cannot_be_is_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"images": np.zeros((4, 4, 3), np.uint8), "prompts": "cat", **arguments})


def test_wrong_boxes_are_named():
    with pytest.raises(ValueError, match=r"\[3, 0, 2, 2\]"):
        Prompt(boxes=[[3, 0, 2, 2]])
    with pytest.raises(ValueError, match="at least one of `boxes`"):
        Prompt(negative_boxes=[[0, 0, 2, 2]])


def test_unreadable_files_are_named(pipe, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(OSError, match=name):
            pipe(tmp_path / name, "cat")


def test_loaded_from_a_folder_in_either_precision(pipe, images, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    loaded = Sam3LitePipeline.from_pretrained(tmp_path, device="cpu")
    assert loaded.model.dtype == torch.float32
    expected, found = (one(images[0], "cat", threshold=0) for one in (pipe, loaded))
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)
    assert (found.masks != expected.masks).float().mean() < 1e-4
    half = Sam3LitePipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.float16)
    prompt = Prompt("cat", boxes=[[5, 5, 30, 30]])
    expected, found = (one(images[0], prompt, threshold=0) for one in (pipe, half))
    assert half.model.dtype == torch.float16
    assert torch.allclose(found.scores, expected.scores, atol=0.01)
    assert found.scores.dtype == found.boxes.dtype == torch.float32


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def large_image() -> float:
    """Megabytes on top for 100 objects in an image of 6 megapixels."""
    torch.manual_seed(0)
    model = Sam3LiteModel(micro_config(num_queries=200)).eval()
    pipe = Sam3LitePipeline(model, Sam3LiteProcessor.from_config(model.config))
    patch = pytest.MonkeyPatch()
    steer(patch, model, [[*range(100)]] * 2)

    def spots(queries, pixels, prompt_index, query_index):
        """Query n is spot n of 10 times 10, two cells wide and three apart."""
        logits = torch.full((len(query_index), *pixels.shape[-2:]), -9.0)
        for mask, query in zip(logits, query_index.tolist(), strict=True):
            row, column = query // 10 * 3, query % 10 * 3
            mask[row : row + 2, column : column + 2] = 9.0
        return logits

    patch.setattr(model.mask_decoder, "matched_masks", spots)
    pipe(np.zeros((64, 64, 3), np.uint8), "spot")
    before = peak_megabytes()
    found = pipe(np.zeros((2000, 3000, 3), np.uint8), "spot")
    assert len(found) == 100
    last = decode_mask(found.rle[99])
    assert last.shape == (2000, 3000) and last[28 * 62, 28 * 93] and 0.8 < last.sum() / (4 * 62.5 * 93.75) < 1
    return peak_megabytes() - before


def large_batch() -> float:
    """Megabytes on top for 32 images with 20 prompts each, on 64 x 64 mask cells, all prompts with a detection."""
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config(num_queries=200, image_size=128))).eval()
    pipe = Sam3LitePipeline(model, Sam3LiteProcessor.from_config(model.config))
    patch = pytest.MonkeyPatch()
    steer(patch, model, [[3]] * 641)
    pipe(np.zeros((64, 64, 3), np.uint8), "spot")
    before = peak_megabytes()
    images = np.random.default_rng(0).integers(0, 256, (32, 100, 120, 3), dtype=np.uint8)
    results = pipe(list(images), [f"thing {index}" for index in range(20)], batch_size=32)
    assert sum(len(result) for result in results) == 640
    return peak_megabytes() - before


@pytest.mark.parametrize(
    ("case", "bound"), [("large_image", 200), pytest.param("large_batch", 300, marks=pytest.mark.slow)]
)
def test_memory_goes_with_what_is_found(case, bound):
    """All masks at once would take 600 MB as booleans in the one case, 2100 MB as logits in the other."""
    code = f"import torch; torch.set_num_threads(1); import test_inference; print(test_inference.{case}())"
    run = warm.run(["-c", code], Path(__file__).parent, dict(os.environ))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < bound


def test_settings_fill_in_the_overlap():
    assert PredictionSettings(tile_size=1008).tile_overlap == 252
