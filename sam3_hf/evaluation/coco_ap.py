"""COCO average precision and recall (https://cocodataset.org/#detection-eval), by faster-coco-eval."""

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from ..rle import mask_areas
from .metric import DetectionMetric, xywh

AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}


class CocoAP(DetectionMetric):
    """COCO AP and AR over all (image, concept) pairs added.

    A detection is judged only within its own pair, and a pair that was not added cannot hold false alarms: for figures
    that compare with published ones add every concept for every image.

    `compute()` returns for each IoU type T ("bbox", "segm"), all in [0, 1], -1 where nothing could be measured (no
    object of that size or class), as COCO does:
        T_AP (mean over IoU .50:.05:.95), T_AP50, T_AP75, T_APs, T_APm, T_APl (area below 32², to 96², above),
        T_AR1, T_AR10, T_AR100 (by detections per image and class), T_ARs, T_ARm, T_ARl (at 100),
        T_per_class {name: {AP, AP50, AP75, AR100, objects}}; `objects` counts those that are not crowds.
    """

    def figures(self, pairs):
        results = {}
        for iou_type in self.iou_types:
            evaluation = evaluate_coco(pairs, iou_type, self.name_of)
            results |= {f"{iou_type}_{key}": value for key, value in _summary(evaluation).items()}
            results[f"{iou_type}_per_class"] = _per_class(evaluation, pairs, self.name_of)
        return results


def evaluate_coco(pairs: list, iou_type: str, name_of) -> COCOeval_faster:
    """COCO's evaluation, accumulated, of the rows of `DetectionMetric.figures`."""
    objects, detections = [], []
    for prediction, reference in pairs:
        ids = {"image_id": reference["image_id"], "category_id": reference["category"]}
        objects += _annotations(ids, reference, iou_type)
        detections += _annotations(ids, prediction, iou_type)
    for annotations in (objects, detections):
        for number, annotation in enumerate(annotations, start=1):  # 0 would mean "no match"
            annotation["id"] = number
    images = [
        {"id": image_id, "height": height, "width": width} for image_id, (height, width) in _sizes(pairs).items()
    ]
    categories = [
        {"id": category, "name": name_of(category)}
        for category in sorted({reference["category"] for _, reference in pairs})
    ]
    shared = {"images": images, "categories": categories}
    evaluation = COCOeval_faster(
        COCO({**shared, "annotations": objects}), COCO({**shared, "annotations": detections}), iou_type
    )
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _sizes(pairs: list) -> dict[int, tuple[int, int]]:
    """Height and width of each image; (0, 0) where no row has a mask, when nothing asks for it."""
    sizes = {reference["image_id"]: (0, 0) for _, reference in pairs}
    for row in (row for pair in pairs for row in pair if row["masks"]):
        sizes[row["image_id"]] = tuple(row["masks"][0]["size"])
    return sizes


def _annotations(ids: dict, row: dict, iou_type: str) -> list[dict]:
    boxes = xywh(row["boxes"])
    if "areas" in row:
        areas = row["areas"]
    elif iou_type == "segm" and row["masks"]:
        areas = mask_areas(row["masks"])  # a detection's size is that of its mask, not of its box
    else:
        areas = boxes[:, 2] * boxes[:, 3]
    annotations = []
    for index, box in enumerate(boxes.tolist()):
        annotation = {**ids, "bbox": box, "area": float(areas[index]), "iscrowd": 0}
        if "scores" in row:
            annotation["score"] = row["scores"][index]
        else:
            annotation["iscrowd"] = row["iscrowd"][index]
        if iou_type == "segm":
            annotation["segmentation"] = row["masks"][index]
        annotations.append(annotation)
    return annotations


def _summary(evaluation: COCOeval_faster) -> dict[str, float]:
    figures = {"AP": _precision(evaluation), "AP50": _precision(evaluation, 0.5), "AP75": _precision(evaluation, 0.75)}
    figures |= {f"AP{letter}": _precision(evaluation, area=letter) for letter in "sml"}
    figures |= {f"AR{limit}": _recall(evaluation, limit=limit) for limit in (1, 10, 100)}
    return figures | {f"AR{letter}": _recall(evaluation, area=letter) for letter in "sml"}


def _per_class(evaluation: COCOeval_faster, pairs: list, name_of) -> dict[str, dict[str, float]]:
    objects = dict.fromkeys(evaluation.params.catIds, 0)
    for _, reference in pairs:
        objects[reference["category"]] += reference["iscrowd"].count(0)
    return {
        name_of(category): {
            "AP": _precision(evaluation, row=row),
            "AP50": _precision(evaluation, 0.5, row=row),
            "AP75": _precision(evaluation, 0.75, row=row),
            "AR100": _recall(evaluation, row=row),
            "objects": objects[category],
        }
        for row, category in enumerate(evaluation.params.catIds)
    }


def _precision(evaluation, threshold: float | None = None, area: str = "", row=slice(None)) -> float:
    precision = evaluation.eval["precision"]  # (thresholds, recalls, categories, areas, limits)
    if threshold is not None:
        precision = precision[np.isclose(evaluation.params.iouThrs, threshold)]
    return _mean_defined(precision[:, :, row, evaluation.params.areaRngLbl.index(AREAS[area]), -1])


def _recall(evaluation, limit: int = 100, area: str = "", row=slice(None)) -> float:
    recall = evaluation.eval["recall"]  # (thresholds, categories, areas, limits)
    area_index = evaluation.params.areaRngLbl.index(AREAS[area])
    return _mean_defined(recall[:, row, area_index, evaluation.params.maxDets.index(limit)])


def _mean_defined(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
