from ..rle import encode_masks
from .cgf1 import CGF1
from .coco_ap import CocoAP
from .metric import DetectionMetric
from .rows import coco_reference_row, prediction_row, reference_row

__all__ = [
    "CGF1",
    "CocoAP",
    "DetectionMetric",
    "coco_reference_row",
    "encode_masks",
    "prediction_row",
    "reference_row",
]
