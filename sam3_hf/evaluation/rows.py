"""Rows that the metrics take: one dict for the predictions, one for the ground truth of an (image, concept) pair.

A prediction row:
    image_id: int
    category: int, the concept's id
    boxes: (n, 4) xyxy in pixels of the original image
    scores: (n,)
    masks: n RLE dicts {"size": [height, width], "counts": str} at the size of the original image, or None

A reference row:
    image_id, category, boxes, masks: as above
    iscrowd: (n,) 1 for a region that covers many objects, otherwise 0
    areas: (n,) square pixels; small, medium and large objects are told apart by them

A pair in which the concept is absent has a reference row without objects: such pairs are what false alarms are counted
on. Both kinds of row hold plain lists, so that they go to disk and to other processes as they are.
"""

import numpy as np
import torch

from ..data.references import float_array
from ..rle import encode_masks

CONFIDENT = 0.5  # cgF1 looks at detections from this score on (arXiv 2511.16719)
MAX_DETECTIONS = 100  # COCO AP looks at so many per image and class


def prediction_row(image_id: int, category: int, boxes, scores, masks=None) -> dict:
    """A prediction row from what `post_process_instance_segmentation` returns for one prompt.

    Keeps the 100 best detections and any further one with a score of at least 0.5: what is left out changes neither
    COCO AP nor cgF1, and its masks need no encoding.

    Args:
        image_id, category: ids of the image and of the concept.
        boxes: (n, 4) float xyxy in pixels of the original image; tensor on any device, or array.
        scores: (n,) float in [0, 1].
        masks: (n, height, width) bool or 0/1 at the size of the original image; RLE dicts; None for boxes only.

    Raises:
        ValueError: lengths differ, or a shape is wrong.
    """
    boxes, scores = float_array(boxes).reshape(-1, 4), float_array(scores).reshape(-1)
    if len(boxes) != len(scores) or (masks is not None and len(masks) != len(scores)):
        raise ValueError(
            f"image {image_id}, category {category}: {len(boxes)} boxes, {len(scores)} scores and "
            f"{'no' if masks is None else len(masks)} masks; there must be one of each per detection"
        )
    best_first = np.argsort(-scores, kind="stable")
    kept = best_first[: max(MAX_DETECTIONS, int((scores >= CONFIDENT).sum()))]
    if masks is not None:
        masks = encode_masks(_select(masks, kept))
    return {
        "image_id": int(image_id),
        "category": int(category),
        "boxes": boxes[kept].tolist(),
        "scores": scores[kept].tolist(),
        "masks": masks,
    }


def _select(masks, kept: np.ndarray):
    if isinstance(masks, torch.Tensor):
        return masks[torch.as_tensor(kept, device=masks.device)]
    if isinstance(masks, np.ndarray):
        return masks[kept]
    return [masks[index] for index in kept]
