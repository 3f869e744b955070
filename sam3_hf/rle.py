"""
Masks in COCO's forms (polygons, compressed and uncompressed run-length encoding), and their pixels.

Where nothing else is said, a mask is compressed with text counts, {"size": [height, width], "counts": str}: a few
hundred bytes, as JSON takes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from torch import Tensor


def encode_masks(masks) -> list[dict]:
    """
    Args:
        masks: (n, height, width) bool or 0/1, tensor on any device or array; run-length encodings pass through.

    Returns:
        n encodings.

    Raises:
        ValueError: the shape is another.
    """
    if isinstance(masks, (list, tuple)) and all(isinstance(mask, dict) for mask in masks):
        return [_with_text(mask) for mask in masks]
    if not isinstance(masks, Tensor):
        masks = torch.as_tensor(np.asarray(masks))
    if masks.ndim != 3:
        raise ValueError(f"masks must be (n, height, width), got {tuple(masks.shape)}")
    if len(masks) == 0:
        return []
    # COCO counts down the columns, in memory (height, width, n) with height the fastest
    columns = masks.bool().transpose(1, 2).contiguous().to(torch.uint8).cpu().numpy()  # (n, width, height)
    return [_with_text(rle) for rle in mask_api.encode(columns.T)]


def encode_part(mask: Tensor, top: int, left: int, size: tuple[int, int]) -> dict:
    """
    The encoding of a mask that is empty outside of a rectangle, without a frame of the size of the image.

    Args:
        mask: (rows, columns) bool on any device.
        top, left: row and column of its first pixel.
        size: height and width of the image.
    """
    height, width = size
    # COCO counts down the columns: the edges of runs in the rectangle, as positions in the image
    columns = np.pad(mask.t().cpu().numpy().astype(np.int8), ((0, 0), (1, 1)))
    column, row = np.nonzero(np.diff(columns, axis=1))
    edges = (left + column) * height + top + row
    goes_on = np.flatnonzero(edges[1:] == edges[:-1])  # at the top of the next column
    edges = np.delete(edges, np.concatenate([goes_on, goes_on + 1]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return encode_segmentation({"size": [height, width], "counts": counts}, height, width)


def encode_segmentation(segmentation: Sequence | dict, height: int, width: int) -> dict:
    """
    Args:
        segmentation: polygons, [x, y, x, y, ...] in pixels each, whose union is meant and of which what lies outside
            of the image is cut off; or a compressed or uncompressed run-length encoding.
        height, width: of the image in pixels.
    """
    if not isinstance(segmentation, dict):
        return unite_masks(mask_api.frPyObjects(list(segmentation), height, width))
    if isinstance(segmentation["counts"], list):
        return _with_text(mask_api.frPyObjects(segmentation, height, width))
    return _with_text(segmentation)


def compress(segmentation: dict) -> dict:
    """
    The encoding of one whose counts are text, bytes or a list, after a check.

    Raises:
        ValueError: the counts are malformed or do not cover the image exactly.
    """
    size, counts = [int(side) for side in segmentation["size"]], segmentation["counts"]
    runs = _listed_runs(counts) if isinstance(counts, list) else _text_runs(counts)
    if runs.min(initial=0) < 0 or runs.sum() != size[0] * size[1]:
        covered, pixels = int(runs.sum()), size[0] * size[1]
        raise ValueError(f"counts do not decode: runs of {covered} pixels in an image of {pixels}")
    return encode_segmentation({"size": size, "counts": counts}, *size)


def _listed_runs(counts: list) -> np.ndarray:
    """(runs,) int64. Raises ValueError if counts are not whole numbers of at most 32 bits, as COCO's are."""
    if not all(type(count) is int and 0 <= count < 2**32 for count in counts):
        raise ValueError("counts must be whole numbers, 0 or more")
    return np.array(counts, dtype=np.int64)


def _text_runs(counts: str | bytes) -> np.ndarray:
    """
    (runs,) int64 of compressed counts, without the memory and time that decoding pixels takes: 5 bits a character,
    the lowest first, a sixth where more follow; from the fourth run on, the difference to the last but one.

    Raises:
        ValueError: this is no such text.
    """
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    if not isinstance(counts, bytes):
        raise ValueError("counts do not decode: neither a list nor text of COCO's encoding")
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("counts do not decode: no text of COCO's encoding, or its end is missing")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if digits.max() > 6:
        raise ValueError("counts do not decode: a run of more than 32 bits")
    runs = np.add.reduceat((codes & 31) << (5 * digits), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * (digits[ends] + 1)), 0)  # the sign
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def uncompressed(mask: np.ndarray) -> dict:
    """The uncompressed encoding of a (height, width) bool mask: counts are a list, of background first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts if not flat[0] else [0, *counts]}


def decode_mask(rle: dict) -> np.ndarray:
    """(height, width) bool, the columns contiguous."""
    return mask_api.decode(rle).view(bool)


def unite_masks(rles: list[dict]) -> dict:
    """The union of masks of one size."""
    return _with_text(mask_api.merge(rles))


def cut_mask(rle: dict, rectangle: tuple[int, int, int, int]) -> dict:
    """What a mask has inside of (left, top, right, bottom), at the same size."""
    left, top, right, bottom = rectangle
    frame = mask_api.frPyObjects([[left, top, right - left, bottom - top]], *rle["size"])
    return _with_text(mask_api.merge([rle, *frame], intersect=True))


def mask_areas(rles: list[dict]) -> np.ndarray:
    """(masks,) pixels."""
    return mask_api.area(rles)


def extent(rle: dict) -> list[float]:
    """The box [x, y, width, height] around the pixels of a mask; all 0 if it has none."""
    return mask_api.toBbox(rle).tolist()


def ious(first: list[dict] | np.ndarray, second: list[dict] | np.ndarray, crowd: Sequence[int] = ()) -> np.ndarray:
    """
    Intersection over union, 0 for two empty masks.

    Args:
        first, second: masks, or boxes (n, 4) float64 x, y, width, height.
        crowd: (second,) 1 for a region that covers many objects: the union is then the area of the first alone.
            Default: all 0.

    Returns:
        (first, second) float64.
    """
    overlaps = mask_api.iou(first, second, list(crowd) or [0] * len(second))
    return np.nan_to_num(np.asarray(overlaps).reshape(len(first), len(second)))


def _with_text(rle: dict) -> dict:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
