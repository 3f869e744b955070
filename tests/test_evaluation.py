import gzip
import json
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from evaluation_cases import CASES, HEIGHT, WIDTH, random_pairs
from faster_coco_eval.core import mask as mask_api
from torch import distributed

from sam3_hf.evaluation import CGF1, CocoAP, coco_reference_row, encode_masks, prediction_row, reference_row

FIXTURES = Path(__file__).parent / "fixtures"

# Figures that cocoapi publishes for its fake results (github.com/cocodataset/cocoapi, results/), with more digits.
COCOAPI = {
    "bbox": {
        "AP": 0.5045806987249628,
        "AP50": 0.6969727247299577,
        "AP75": 0.5729816669904824,
        "APs": 0.5856257209410443,
        "APm": 0.5193996948036719,
        "APl": 0.5013978986347466,
        "AR1": 0.38681277964578054,
        "AR10": 0.5936795762842003,
        "AR100": 0.595352982877607,
        "ARs": 0.6398109626113442,
        "ARm": 0.5664205978994309,
        "ARl": 0.5642905982905982,
    },
    "segm": {
        "AP": 0.3195452758576433,
        "AP50": 0.5622883972521636,
        "AP75": 0.29892653412086784,
        "APs": 0.3873740315997838,
        "APm": 0.31018272403369485,
        "APl": 0.3269339071005138,
        "AR1": 0.2682297225711534,
        "AR10": 0.41544868114906375,
        "AR100": 0.4168394992198818,
        "ARs": 0.4694498622754236,
        "ARm": 0.37675922666197265,
        "ARl": 0.3814715099715099,
    },
}


def read(name):
    return json.loads(gzip.decompress((FIXTURES / "coco" / f"{name}.json.gz").read_bytes()))


def cocoapi_rows(iou_type):
    """Rows of every category in every image of cocoapi's example files."""
    truth, found = read("instances_val2014_100"), read(f"instances_val2014_fake{iou_type}100_results")
    annotations, detections = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        annotations[annotation["image_id"], annotation["category_id"]].append(annotation)
    for detection in found:
        detections[detection["image_id"], detection["category_id"]].append(detection)
    predictions, references = [], []
    for image in truth["images"]:
        for category in (entry["id"] for entry in truth["categories"]):
            pair = (image["id"], category)
            masks = [entry["segmentation"] for entry in detections[pair]] if iou_type == "segm" else None
            boxes = mask_api.toBbox(masks) if masks else [entry.get("bbox") for entry in detections[pair]]
            boxes = np.array(boxes, dtype=float).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            predictions.append(prediction_row(*pair, boxes, [entry["score"] for entry in detections[pair]], masks))
            references.append(coco_reference_row(image, category, annotations[pair], with_masks=iou_type == "segm"))
    return predictions, references


def rows_of(pairs):
    predictions, references = [], []
    for pair in pairs:
        ids = (pair["image_id"], pair["category"])
        boxes, masks, crowds = columns(pair["objects"])
        references.append(reference_row(*ids, boxes, masks, crowds))
        boxes, masks, scores = columns(pair["detections"])
        predictions.append(prediction_row(*ids, boxes, scores, masks))
    return predictions, references


def columns(shapes):
    boxes = np.array([shape[0] for shape in shapes], dtype=float).reshape(-1, 4)
    masks = np.array([shape[1] for shape in shapes], dtype=np.uint8).reshape(-1, HEIGHT, WIDTH)
    return boxes, masks, [shape[2] for shape in shapes]


def square(left, top, side, canvas=20):
    mask = np.zeros((canvas, canvas), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return [left, top, left + side, top + side], mask


def compute(metric_class, predictions, references, **options):
    return metric_class(keep_in_memory=True, **options).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_coco_ap_of_the_cocoapi_example(iou_type):
    result = compute(CocoAP, *cocoapi_rows(iou_type), iou_types=(iou_type,))
    for name, value in COCOAPI[iou_type].items():
        assert result[f"{iou_type}_{name}"] == pytest.approx(value, abs=1e-10), name


@pytest.mark.parametrize("case", [*CASES, "cocoapi"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_cgf1_agrees_with_the_published_evaluator(case, iou_type):
    expected = json.loads((FIXTURES / "cgf1_oracle.json").read_text())[case][iou_type]
    rows = cocoapi_rows(iou_type) if case == "cocoapi" else rows_of(random_pairs(**CASES[case]))
    result = compute(CGF1, *rows, iou_types=(iou_type,))
    by_iou = expected.pop("by_iou")
    if result["IL_MCC"] is None:  # not defined, for which the published evaluator writes 0
        assert expected["IL_MCC"] == pytest.approx(0, abs=1e-9) and by_iou["cgF1"] == pytest.approx([0] * 10)
        by_iou = {name: values for name, values in by_iou.items() if name != "cgF1"}
        expected = {name: value for name, value in expected.items() if "cgF1" not in name and name != "IL_MCC"}
    for name, values in by_iou.items():
        assert result[f"{iou_type}_by_iou"][name] == pytest.approx(values, abs=1e-9), name
    for name, value in expected.items():
        ours = result[name] if name.startswith("IL_") else result[f"{iou_type}_{name}"]
        assert ours == pytest.approx(value, abs=1e-9), name


def test_cgf1_by_hand():
    # image 1: two objects, one found exactly, one missed, one stray; image 2: absent, judged absent
    first, first_mask = square(2, 2, 6)
    second, second_mask = square(12, 12, 6)
    stray, stray_mask = square(12, 2, 4)
    references = [
        reference_row(1, 7, [first, second], np.stack([first_mask, second_mask])),
        reference_row(2, 7, [], np.zeros((0, 20, 20), dtype=bool)),
    ]
    predictions = [
        prediction_row(1, 7, [first, stray], [0.9, 0.6], np.stack([first_mask, stray_mask])),
        prediction_row(2, 7, [stray], [0.4], stray_mask[None]),
    ]
    result = compute(CGF1, predictions, references, category_names={7: "blob"})
    assert result["segm_positive_micro_F1"] == pytest.approx(0.5, abs=1e-3)
    assert result["IL_MCC"] == pytest.approx(1, abs=1e-5)
    assert result["segm_cgF1"] == pytest.approx(0.5, abs=1e-3)
    assert result["IL_accuracy"] == result["IL_negative_accuracy"] == 1
    assert result["segm_per_class"]["blob"]["cgF1"] == result["segm_cgF1"]
    assert result["segm_per_class"]["blob"]["pairs"] == 2
    assert result["segm_per_class"]["blob"]["positive_pairs"] == 1

    predictions[1]["scores"] = [0.5]  # now a false alarm on the image without the concept
    worse = compute(CGF1, predictions, references)
    assert worse["IL_accuracy"] == 0.5 and worse["IL_negative_accuracy"] == 0
    assert worse["segm_positive_micro_F1"] == result["segm_positive_micro_F1"]
    assert worse["segm_cgF1"] == 0


def test_coco_ap_by_hand():
    # one class found, one not, one without any object: AP is the mean over the two that have objects
    box, mask = square(4, 4, 8)
    masks = mask[None]
    references = [reference_row(1, category, [box], masks) for category in (1, 2)]
    references.append(reference_row(1, 3, [], masks[:0]))
    predictions = [prediction_row(1, 1, [box], [0.8], masks)]
    predictions += [prediction_row(1, category, [], [], masks[:0]) for category in (2, 3)]
    result = compute(CocoAP, predictions, references, category_names={1: "red circle", 2: "blue circle"})
    for iou_type in ("bbox", "segm"):
        assert result[f"{iou_type}_AP"] == pytest.approx(0.5)
        assert result[f"{iou_type}_APs"] == pytest.approx(0.5) and result[f"{iou_type}_APl"] == -1
        per_class = result[f"{iou_type}_per_class"]
        assert [per_class[name]["AP50"] for name in ("red circle", "blue circle", "3")] == pytest.approx([1, 0, -1])
        assert [per_class[name]["objects"] for name in ("red circle", "blue circle", "3")] == [1, 1, 0]


def test_a_segm_detection_is_sized_by_its_mask():
    # a thin diagonal: its box is medium-sized, its mask small. Unmatched, it must not count among the medium ones.
    canvas = np.zeros((120, 120), dtype=bool)
    canvas[10:60, 10:60] = True
    thin = np.eye(120, dtype=bool)
    references = [reference_row(1, 1, [[10, 10, 60, 60]], canvas[None])]
    predictions = [prediction_row(1, 1, [[0, 0, 80, 80], [10, 10, 60, 60]], [0.9, 0.8], np.stack([thin, canvas]))]
    result = compute(CocoAP, predictions, references)
    assert result["segm_APm"] == pytest.approx(1)
    assert result["bbox_APm"] == pytest.approx(0.5)


def test_crowds_neither_count_nor_punish_in_coco_ap():
    box, mask = square(2, 2, 6)
    crowd, crowd_mask = square(10, 10, 8)
    inside, inside_mask = square(12, 12, 3)
    masks = np.stack([mask, crowd_mask])
    references = [reference_row(1, 1, [box, crowd], masks, iscrowd=[0, 1])]
    predictions = [prediction_row(1, 1, [inside, box], [0.9, 0.8], np.stack([inside_mask, mask]))]
    result = compute(CocoAP, predictions, references)
    assert result["segm_AP"] == pytest.approx(1) and result["bbox_AP"] == pytest.approx(1)
    assert result["segm_per_class"]["1"]["objects"] == 1


def test_no_predictions_at_all():
    box, mask = square(2, 2, 6)
    rows = [prediction_row(1, 1, [], [])], [reference_row(1, 1, [box], mask[None])]
    assert compute(CocoAP, *rows)["segm_AP"] == 0
    assert compute(CGF1, *rows)["segm_positive_micro_F1"] == 0


def test_order_of_rows_does_not_matter():
    predictions, references = rows_of(random_pairs(**CASES["tied"]))
    order = np.random.default_rng(0).permutation(len(predictions))
    shuffled = [predictions[index] for index in order], [references[index] for index in order]
    for metric_class in (CocoAP, CGF1):
        assert compute(metric_class, predictions, references) == compute(metric_class, *shuffled)


def evaluate_shares(folder):
    """Both metrics over the rows of one of two processes, round after round; their results go into a file."""
    process_id = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=process_id, world_size=2)
    options = {"num_process": 2, "process_id": process_id, "cache_dir": folder}
    metrics = [CocoAP(**options), CGF1(**options)]
    results = []
    for share in pickle.loads(Path(folder, "shares").read_bytes())[process_id]:
        for metric in metrics:
            for prediction, reference in share:
                metric.add(prediction=prediction, reference=reference)
        results.append([metric.compute() for metric in metrics])
    Path(folder, f"results{process_id}").write_bytes(pickle.dumps(results))
    distributed.barrier()  # who leaves while another still talks can take it down
    distributed.destroy_process_group()


def test_two_processes_get_the_result_of_one(tmp_path):
    rows = list(zip(*rows_of(random_pairs(**CASES["mixed"])), strict=True))
    half = len(rows) // 2
    # first round: the second process got row 0 once more, as padding; second round: it got nothing
    shares = {0: [rows[:half], rows], 1: [[*rows[half:], rows[0]], []]}
    (tmp_path / "shares").write_bytes(pickle.dumps(shares))
    code = "import sys, test_evaluation; test_evaluation.evaluate_shares(sys.argv[1])"
    finished = warm.run_two(["-c", code, tmp_path], Path(__file__).parent, dict(os.environ))
    assert finished.returncode == 0, finished.stderr
    first, second = (pickle.loads((tmp_path / f"results{number}").read_bytes()) for number in (0, 1))
    expected = [compute(metric_class, *zip(*rows, strict=True)) for metric_class in (CocoAP, CGF1)]
    assert first == [expected, expected]
    assert second == [[None, None], [None, None]]


def test_several_processes_need_a_process_group():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        CocoAP(num_process=2, process_id=1)


def test_prediction_row_keeps_the_best_and_all_confident():
    scores = torch.linspace(0, 0.9, 250)
    boxes = torch.arange(250)[:, None].repeat(1, 4)
    masks = torch.zeros(250, 4, 4, dtype=torch.bool)
    row = prediction_row(3, 5, boxes, scores, masks)
    assert len(row["scores"]) == int((scores >= 0.5).sum()) == len(row["masks"]) > 100
    assert row["scores"] == sorted(row["scores"], reverse=True) and row["boxes"][0] == [249] * 4
    assert len(prediction_row(3, 5, boxes, scores / 2)["scores"]) == 100


def test_coco_annotations_of_all_encodings_give_one_mask():
    image = {"id": 1, "height": 20, "width": 20}
    box, mask = square(4, 6, 8)
    compressed = encode_masks(mask[None])[0]
    flat = mask.T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    polygon = [4, 6, 12, 6, 12, 14, 4, 14]
    for segmentation in ([polygon], compressed, {"size": [20, 20], "counts": counts}):
        annotation = {"id": 1, "bbox": [4, 6, 8, 8], "segmentation": segmentation, "area": 60.5, "iscrowd": 0}
        row = coco_reference_row(image, 2, [annotation])
        assert row == {**reference_row(1, 2, [box], mask[None]), "areas": [60.5]}
    assert coco_reference_row(image, 2, [])["boxes"] == []


def test_bad_rows_are_refused():
    box, mask = square(2, 2, 6)
    prediction, reference = prediction_row(1, 1, [box], [0.5], mask[None]), reference_row(1, 1, [box], mask[None])
    metric = CocoAP(keep_in_memory=True)
    cases = [
        ({**prediction, "category": 2}, reference, "category 2"),
        ({**prediction, "scores": [0.5, 0.4]}, reference, "1 boxes but 2 scores"),
        ({**prediction, "scores": [float("nan")]}, reference, "not finite"),
        ({**prediction, "boxes": [[1, 2, 3]]}, reference, r"\(n, 4\)"),
        ({**prediction, "masks": None}, reference, "prediction has no masks"),
        (prediction, {**reference, "masks": None}, "reference has no masks"),
        (prediction, {key: reference[key] for key in reference if key != "iscrowd"}, "no iscrowd"),
        (prediction_row(1, 1, [box], [0.5], np.zeros((1, 9, 9))), reference, "different sizes"),
    ]
    for bad_prediction, bad_reference, message in cases:
        with pytest.raises(ValueError, match=message):
            metric.add(prediction=bad_prediction, reference=bad_reference)
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metric.add_batch(predictions=[prediction] * 2, references=[reference])
    with pytest.raises(ValueError, match="added twice with different references"):
        metric.compute(predictions=[prediction] * 2, references=[reference, {**reference, "areas": [1.0]}])
    with pytest.raises(ValueError, match="No rows"):
        CGF1(keep_in_memory=True).compute()
    with pytest.raises(ValueError, match="iou_types"):
        CGF1(iou_types="bbox")
    with pytest.raises(ValueError, match="twice"):
        CGF1(category_names={1: "cat", 2: "cat"})
    with pytest.raises(ValueError, match="2 boxes, 1 scores"):
        prediction_row(1, 1, [box, box], [0.5])
    with pytest.raises(ValueError, match="with_masks=False"):
        coco_reference_row({"id": 1, "height": 20, "width": 20}, 1, [{"id": 9, "bbox": [1, 1, 2, 2]}])
