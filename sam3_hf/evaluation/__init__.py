from ..data.references import coco_reference_row, reference_row
from ..rle import encode_masks
from .cgf1 import CGF1
from .coco_ap import CocoAP
from .metric import DetectionMetric
from .rows import prediction_row

__all__ = [
    "CGF1",
    "CocoAP",
    "DetectionMetric",
    "coco_reference_row",
    "encode_masks",
    "prediction_row",
    "reference_row",
]
