"""Classification-gated F1, the measure of concept segmentation in SAM 3 (arXiv 2511.16719).

The constants that keep denominators from zero are those of the published evaluation, so that figures compare.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data import EvalDataset
from ..data.rows import objects_per_category
from ..rle import ious
from .metric import DetectionMetric, xywh
from .rows import CONFIDENT

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
COUNT_EPSILON = 1e-4
PRESENCE_EPSILON = 1e-6


@dataclass
class PairTally:
    """What one (image, concept) pair adds to the figures."""

    objects: int  # ground truth that is not a crowd
    detections: int  # with a score of at least 0.5
    ious: np.ndarray  # (matches,) IoU of each object matched with a detection


class CGF1(DetectionMetric):
    """cgF1 = positive micro-F1 x image-level MCC, over all (image, concept) pairs added.

    Detections with a score of at least 0.5 count. In each pair they are matched one to one with the objects so that
    the sum of IoUs is largest; a match is a hit at a threshold when its IoU reaches it. Crowd regions are left out.
    The positive micro-F1 counts false alarms only in pairs where the concept is present. The image-level figures ask
    only whether a pair is judged present (any detection) or absent: where every pair has the concept, or none has, MCC
    and cgF1 are not defined, and None.

    `compute()` returns, in [0, 1] but for the MCC and what holds it ([-1, 1]):
        IL_precision, IL_recall, IL_F1, IL_FPR, IL_MCC: presence as a classification of the pairs,
        IL_accuracy: share of the pairs judged right; IL_negative_accuracy: share of the absent ones judged absent,
            -1 if there is none,
        and for each IoU type T ("bbox", "segm"):
        T_cgF1, T_precision, T_recall, T_F1, T_positive_micro_F1, T_positive_micro_precision, T_positive_macro_F1:
            means over IoU .50:.05:.95; the same with @0.5 and @0.75 for one threshold. The macro-F1 averages over
            pairs with both objects and detections, -1 if there is none,
        T_by_iou {name: 10 values} for those names, and
        T_per_class {name: {cgF1, positive_micro_F1, IL_MCC, pairs, positive_pairs}} over the pairs of one concept.
    """

    def figures(self, pairs):
        results = {}
        for iou_type in self.iou_types:
            tallies = defaultdict(list)
            for prediction, reference in pairs:
                tallies[reference["category"]].append(tally_pair(prediction, reference, iou_type))
            everything = [tally for group in tallies.values() for tally in group]
            presence = presence_figures(everything)
            by_iou = instance_figures(everything, presence["IL_MCC"])
            results |= presence  # the same for every IoU type
            results |= {f"{iou_type}_{name}": _mean(values) for name, values in by_iou.items()}
            for threshold in (0.5, 0.75):
                at = np.isclose(THRESHOLDS, threshold)
                results |= {f"{iou_type}_{name}@{threshold}": _mean(values, at) for name, values in by_iou.items()}
            results[f"{iou_type}_by_iou"] = {
                name: None if values is None else values.tolist() for name, values in by_iou.items()
            }
            results[f"{iou_type}_per_class"] = {
                self.name_of(category): _class_figures(group) for category, group in sorted(tallies.items())
            }
        return results


def tally_pair(prediction: dict, reference: dict, iou_type: str) -> PairTally:
    """Matches one pair's detections with its objects."""
    objects = [index for index, crowd in enumerate(reference["iscrowd"]) if not crowd]
    detections = [index for index, score in enumerate(prediction["scores"]) if score >= CONFIDENT]
    if not objects or not detections:
        return PairTally(len(objects), len(detections), np.zeros(0))
    if iou_type == "segm":
        found = [prediction["masks"][index] for index in detections]
        wanted = [reference["masks"][index] for index in objects]
    else:
        found, wanted = xywh(prediction["boxes"])[detections], xywh(reference["boxes"])[objects]
    overlaps = ious(found, wanted)  # (detections, objects)
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return PairTally(len(objects), len(detections), overlaps[rows, columns])


def presence_is_defined(dataset: EvalDataset) -> bool:
    """Whether some image of a dataset has a concept that is asked for, and another one has not: cgF1 needs both."""
    present = objects_per_category(dataset.rows)[:, dataset.categories] > 0
    return bool(present.any() and not present.all())


def why_undefined(pairs: int, positive_pairs: int) -> str:
    """Why MCC and cgF1 are not defined over so many pairs; empty where they are."""
    return {0: "no picture has the concept", pairs: "every picture has the concept"}.get(positive_pairs, "")


def _mean(values: np.ndarray | None, at=slice(None)) -> float | None:
    return None if values is None else float(values[at].mean())


def instance_figures(tallies: list[PairTally], mcc: float | None) -> dict[str, np.ndarray | None]:
    """Figures that count objects, each (10,), one value per IoU threshold; None where the MCC is."""
    hits = np.array([(tally.ious[:, None] >= THRESHOLDS).sum(axis=0) for tally in tallies])  # (pairs, 10)
    objects = np.array([[tally.objects] for tally in tallies])  # (pairs, 1)
    detections = np.array([[tally.detections] for tally in tallies])
    present, both = objects[:, 0] > 0, (objects[:, 0] > 0) & (detections[:, 0] > 0)

    hit_sum = hits.sum(axis=0)
    recall = hit_sum / (objects.sum() + COUNT_EPSILON)
    precision = hit_sum / (detections.sum() + COUNT_EPSILON)
    positive_precision = hit_sum / (detections[present].sum() + COUNT_EPSILON)
    positive_micro = _f1(positive_precision, recall)
    local = _f1(hits / (detections + COUNT_EPSILON), hits / (objects + COUNT_EPSILON))[both]
    return {
        "cgF1": None if mcc is None else positive_micro * mcc,
        "precision": precision,
        "recall": recall,
        "F1": _f1(precision, recall),
        "positive_micro_F1": positive_micro,
        "positive_micro_precision": positive_precision,
        "positive_macro_F1": local.mean(axis=0) if both.any() else np.full(len(THRESHOLDS), -1.0),
    }


def _f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + COUNT_EPSILON)


def presence_figures(tallies: list[PairTally]) -> dict[str, float | None]:
    """Figures that only ask whether each pair was found present or absent."""
    present = np.array([tally.objects > 0 for tally in tallies])
    judged = np.array([tally.detections > 0 for tally in tallies])
    hits, misses = int((present & judged).sum()), int((present & ~judged).sum())
    alarms, rejections = int((~present & judged).sum()), int((~present & ~judged).sum())

    recall = hits / (hits + misses + PRESENCE_EPSILON)
    precision = hits / (hits + alarms + PRESENCE_EPSILON)
    defined = not why_undefined(len(tallies), int(present.sum()))
    spread = float(hits + alarms) * float(hits + misses) * float(rejections + alarms) * float(rejections + misses)
    return {
        "IL_precision": precision,
        "IL_recall": recall,
        "IL_F1": 2 * precision * recall / (precision + recall + PRESENCE_EPSILON),
        "IL_FPR": alarms / (alarms + rejections + PRESENCE_EPSILON),
        "IL_MCC": (hits * rejections - alarms * misses) / (spread**0.5 + PRESENCE_EPSILON) if defined else None,
        "IL_accuracy": (hits + rejections) / len(tallies),
        "IL_negative_accuracy": rejections / (rejections + alarms) if rejections + alarms else -1.0,
    }


def _class_figures(tallies: list[PairTally]) -> dict[str, float | None]:
    mcc = presence_figures(tallies)["IL_MCC"]
    figures = instance_figures(tallies, mcc)
    return {
        "cgF1": _mean(figures["cgF1"]),
        "positive_micro_F1": float(figures["positive_micro_F1"].mean()),
        "IL_MCC": mcc,
        "pairs": len(tallies),
        "positive_pairs": sum(tally.objects > 0 for tally in tallies),
    }
