"""The ground truth of one (image, concept) pair, as the metrics take it; the rows are described in
`sam3_hf.evaluation.rows`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..rle import encode_masks, encode_segmentation, mask_areas


def reference_row(image_id: int, category: int, boxes, masks=None, iscrowd=None, areas=None) -> dict:
    """A reference row from arrays.

    Args:
        image_id, category: ids of the image and of the concept.
        boxes: (n, 4) float xyxy in pixels of the original image; n is 0 where the concept is absent.
        masks: (n, height, width) bool or 0/1, or RLE dicts; None for boxes only.
        iscrowd: (n,) 0 or 1; default all 0.
        areas: (n,) square pixels; default the masks' areas, without masks the boxes'.
    """
    boxes = float_array(boxes).reshape(-1, 4)
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
        "areas": float_array(areas).reshape(-1).tolist(),
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


def float_array(values) -> np.ndarray:
    """Values of a tensor on any device, an array or a list as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64)
    return np.asarray(values, dtype=np.float64)
