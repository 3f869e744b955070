"""Segmentations in COCO's forms (polygons, compressed and uncompressed run-length encoding), and their pixels."""

import numpy as np
from faster_coco_eval.core import mask as mask_api


def compress_rle(segmentation: dict) -> dict:
    """Run-length encoding {"size": [height, width], "counts": str} from one whose counts are text, bytes or a list.

    Raises:
        ValueError: the counts are malformed or do not cover the image exactly.
    """
    size, counts = [int(side) for side in segmentation["size"]], segmentation["counts"]
    if isinstance(counts, list) and not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("counts must be whole numbers, 0 or more")
    try:
        if isinstance(counts, list):
            counts = mask_api.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        mask_api.decode({"size": size, "counts": text})
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"counts do not decode: {error}") from None
    return {"size": size, "counts": text}


def segmentation_area(segmentation: list | dict | None, bbox: list[float], height: int, width: int) -> float:
    """Area in square pixels; of the box (xywh) where there is no segmentation."""
    if segmentation is None:
        return float(bbox[2] * bbox[3])
    if isinstance(segmentation, list):
        segmentation = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    return float(mask_api.area(segmentation))


def polygons_to_mask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels of polygons, parts of one object; what lies outside the canvas is cut off.

    Args:
        polygons: arrays (points, 2) of x, y in pixels of the canvas.

    Returns:
        (height, width) uint8, 1 inside.
    """
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return mask_api.decode(mask_api.merge(mask_api.frPyObjects(flat, height, width)))


def rle_to_mask(segmentation: dict) -> np.ndarray:
    """Pixels of a compressed run-length encoding: (height, width) uint8, 1 inside."""
    return mask_api.decode(segmentation)
