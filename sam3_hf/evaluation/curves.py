"""What stands behind the scores: precision over recall, and which concepts are taken for which."""

from collections import defaultdict

import numpy as np

from ..rle import ious
from .coco_ap import evaluate_coco
from .metric import DetectionMetric, xywh
from .rows import CONFIDENT

OVERLAP = 0.5  # IoU from which a detection lies on an object


class PrecisionRecall(DetectionMetric):
    """Precision over recall at IoU 0.5, COCO's: where AP50 comes from.

    `compute()` returns for each IoU type T: T_precision_recall {"recall": 101 values from 0 to 1, "precision": {name:
    as many values in [0, 1]}}; a concept without objects has no curve.
    """

    def figures(self, pairs):
        results = {}
        for iou_type in self.iou_types:
            evaluation = evaluate_coco(pairs, iou_type, self.name_of)
            at = np.isclose(evaluation.params.iouThrs, OVERLAP)
            precision = evaluation.eval["precision"][at][0, :, :, 0, -1]  # (recalls, categories), all areas
            curves = {
                self.name_of(category): precision[:, column].tolist()
                for column, category in enumerate(evaluation.params.catIds)
                if precision[0, column] > -1
            }
            recalls = np.asarray(evaluation.params.recThrs).tolist()
            results[f"{iou_type}_precision_recall"] = {"recall": recalls, "precision": curves}
        return results


class Confusion(DetectionMetric):
    """Which concepts are found where which are. Detections with a score of at least 0.5 count.

    In each image, the detections of a concept are matched with its objects, best score first, where their IoU is at
    least 0.5. Of those left, one on a crowd region of its concept does not count, one on an object that was found
    already is a double, and any other lies on the object of another concept with the largest IoU of at least 0.5, or
    on nothing. An object may be found and be taken for something else as well, as each concept is asked for by itself.

    `compute()` returns for the last IoU type T, which is that of masks if there are any: T_confusion {"concepts": n
    names, "counts": n + 1 rows of n + 1 numbers}. Row i, column j counts what is i and was found as j; the last column
    counts objects that were missed, the last row detections on nothing and doubles. So a row's diagonal and last
    entries add up to the concept's objects, and a column to its detections, without those on crowd regions.
    """

    def figures(self, pairs):
        categories = sorted({reference["category"] for _, reference in pairs})
        index_of = {category: index for index, category in enumerate(categories)}
        images = defaultdict(list)
        for pair in pairs:
            images[pair[1]["image_id"]].append(pair)
        iou_type = self.iou_types[-1]
        counts = np.zeros((len(index_of) + 1, len(index_of) + 1), dtype=int)
        for of_image in images.values():
            add_image(counts, of_image, index_of, iou_type)
        names = [self.name_of(category) for category in categories]
        return {f"{iou_type}_confusion": {"concepts": names, "counts": counts.tolist()}}


def add_image(counts: np.ndarray, pairs: list, index_of: dict[int, int], iou_type: str) -> None:
    """Adds the pairs of one image to the counts of `Confusion`."""
    key = "masks" if iou_type == "segm" else "boxes"
    wanted = [region for _, reference in pairs for region in _regions(reference, key)]
    owner = np.array([index_of[r["category"]] for _, r in pairs for _ in r["boxes"]], dtype=int)
    crowd = np.array([flag for _, reference in pairs for flag in reference["iscrowd"]], dtype=int)
    missed = crowd == 0
    for prediction, reference in pairs:
        concept = index_of[reference["category"]]
        kept = [
            index for index in np.argsort(-np.array(prediction["scores"])) if prediction["scores"][index] >= CONFIDENT
        ]
        regions = _regions(prediction, key)
        found = [regions[index] for index in kept]
        overlaps = np.zeros((len(found), len(owner)))
        if found and wanted:
            overlaps = ious(_together(found, key), _together(wanted, key), crowd.tolist())
        for row in overlaps:
            hits = row >= OVERLAP
            own = owner == concept
            if (hits & own & missed).any():
                missed[np.where(own & missed, row, 0).argmax()] = False
                counts[concept, concept] += 1
            elif (hits & own & (crowd == 1)).any():
                continue
            elif (hits & own).any() or not (hits & (crowd == 0)).any():
                counts[-1, concept] += 1
            else:
                counts[owner[np.where(crowd == 0, row, 0).argmax()], concept] += 1
    np.add.at(counts[:, -1], owner[missed], 1)


def _regions(row: dict, key: str) -> list:
    return row["masks"] if key == "masks" else list(xywh(row["boxes"]))


def _together(regions: list, key: str):
    return regions if key == "masks" else np.stack(regions)
