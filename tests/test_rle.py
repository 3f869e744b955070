import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as mask_api

from sam3_hf.rle import (
    compress,
    cut_mask,
    decode_mask,
    encode_masks,
    encode_part,
    encode_segmentation,
    ious,
    mask_areas,
    uncompressed,
    unite_masks,
)


def random_masks(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 13, 29)) < 0.4


def test_encoding_masks_round_trips():
    masks = random_masks(3)
    for given in (masks, masks.astype(np.uint8), torch.from_numpy(masks)):
        rles = encode_masks(given)
        assert [rle["size"] for rle in rles] == [[13, 29]] * 3
        assert (np.stack([decode_mask(rle) for rle in rles]) == masks).all()
        assert encode_masks(rles) == rles
    assert encode_masks(masks[:0]) == []
    with pytest.raises(ValueError, match="height, width"):
        encode_masks(masks[0])


@pytest.mark.parametrize(
    ("top", "left", "rows", "columns"), [(3, 11, 7, 5), (0, 4, 20, 6), (0, 0, 20, 30), (5, 5, 0, 0)]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_masks_are_encoded_as_by_coco_tools(top, left, rows, columns, share):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < share
    expected = np.zeros((20, 30), np.uint8)
    expected[top : top + rows, left : left + columns] = mask
    rle = encode_part(mask, top, left, (20, 30))
    assert rle["counts"].encode() == mask_api.encode(np.asfortranarray(expected))["counts"]
    assert (decode_mask(rle) == expected).all()


@pytest.mark.parametrize("first", [False, True])
def test_all_forms_of_one_mask_have_one_encoding(first):
    (mask,) = random_masks(1)
    mask[0, 0] = first
    (expected,) = encode_masks(mask[None])
    counted = uncompressed(mask)
    assert sum(counted["counts"][1::2]) == mask.sum()
    as_bytes = {**expected, "counts": expected["counts"].encode()}
    for form in (expected, counted, as_bytes):
        assert encode_segmentation(form, 13, 29) == compress(form) == expected


def test_polygons_are_united_and_cut_at_the_edge():
    polygons = [[-5, 2, 4, 2, 4, 6, -5, 6], [2, 2, 8, 2, 8, 6, 2, 6]]
    expected = np.zeros((10, 20), dtype=bool)
    expected[2:6, 0:8] = True
    assert (decode_mask(encode_segmentation(polygons, 10, 20)) == expected).all()


def test_sets_of_pixels():
    masks = random_masks(2)
    first, second = encode_masks(masks)
    assert (decode_mask(unite_masks([first, second])) == masks.any(axis=0)).all()
    part = np.zeros_like(masks[0])
    part[3:9, 5:20] = masks[0][3:9, 5:20]
    assert (decode_mask(cut_mask(first, (5, 3, 20, 9))) == part).all()
    assert mask_areas([first, second]).tolist() == masks.sum(axis=(1, 2)).tolist()


def test_overlaps_of_masks_and_boxes():
    masks = random_masks(2)
    empty = encode_masks(np.zeros((1, 13, 29)))
    rles = encode_masks(masks)
    shared, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    np.testing.assert_allclose(ious(rles[:1], [*rles, *empty]), [[1, shared / either, 0]])
    assert ious(empty, empty).tolist() == [[0]]
    assert ious([], rles).shape == (0, 2)
    np.testing.assert_allclose(ious(rles[:1], rles[1:], [1]), [[shared / masks[0].sum()]])
    boxes = np.array([[0.0, 0, 4, 4], [2, 0, 4, 4]])
    np.testing.assert_allclose(ious(boxes[:1], boxes), [[1, 1 / 3]])
