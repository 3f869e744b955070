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

from collections.abc import Sequence

import numpy as np
import torch

from ..rle import encode_masks, encode_segmentation, mask_areas

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
    boxes, scores = _array(boxes).reshape(-1, 4), _array(scores).reshape(-1)
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


def reference_row(image_id: int, category: int, boxes, masks=None, iscrowd=None, areas=None) -> dict:
    """A reference row from arrays.

    Args:
        image_id, category: ids of the image and of the concept.
        boxes: (n, 4) float xyxy in pixels of the original image; n is 0 where the concept is absent.
        masks: (n, height, width) bool or 0/1, or RLE dicts; None for boxes only.
        iscrowd: (n,) 0 or 1; default all 0.
        areas: (n,) square pixels; default the masks' areas, without masks the boxes'.
    """
    boxes = _array(boxes).reshape(-1, 4)
    if masks is not None:
        masks = encode_masks(masks)
    if areas is None and masks:
        areas = mask_areas(masks)
    elif areas is None:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return {
        "image_id": int(image_id),
        "category": int(category),
        "boxes": boxes.tolist(),
        "masks": masks,
        "iscrowd": [0] * len(boxes) if iscrowd is None else [int(flag) for flag in iscrowd],
        "areas": _array(areas).reshape(-1).tolist(),
    }


def coco_reference_row(image: dict, category: int, annotations: Sequence[dict], with_masks: bool = True) -> dict:
    """A reference row from COCO annotations.

    Args:
        image: entry of the COCO file's `images` with `id`, `height` and `width` in pixels.
        category: the concept's id.
        annotations: those of this image and concept, crowd regions included; empty where the concept is absent.
            `bbox` is xywh in pixels; `segmentation` polygons, compressed or uncompressed RLE.
        with_masks: False reads the boxes only.

    Raises:
        ValueError: an annotation lacks the segmentation that `with_masks` asks for.
    """
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [_coco_mask(annotation, image) for annotation in annotations] if with_masks else None
    has_areas = all("area" in annotation for annotation in annotations)
    areas = [annotation["area"] for annotation in annotations] if has_areas else None
    iscrowd = [annotation.get("iscrowd", 0) for annotation in annotations]
    return reference_row(image["id"], category, boxes, masks, iscrowd, areas)


def _coco_mask(annotation: dict, image: dict) -> dict:
    segmentation, size = annotation.get("segmentation"), (image["height"], image["width"])
    if not segmentation:
        raise ValueError(
            f"image {image['id']}, annotation {annotation.get('id')}: no segmentation; pass with_masks=False "
            "to evaluate boxes only"
        )
    return encode_segmentation(segmentation, *size)


def _select(masks, kept: np.ndarray):
    if isinstance(masks, torch.Tensor):
        return masks[torch.as_tensor(kept, device=masks.device)]
    if isinstance(masks, np.ndarray):
        return masks[kept]
    return [masks[index] for index in kept]


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64)
    return np.asarray(values, dtype=np.float64)
