import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, gaussian_filter

from sam3_hf.prediction.polygons import polygons_of
from sam3_hf.rle import decode_mask, encode_masks, encode_segmentation


def outlines(mask: np.ndarray) -> list[list[float]]:
    return polygons_of(encode_masks(mask[None])[0])


@pytest.mark.parametrize("blur", [0, 1, 3])
def test_polygons_have_the_pixels_of_masks_without_holes(blur):
    rng = np.random.default_rng(blur)
    for height, width in [(40, 50), (1, 30), (30, 1), (33, 7)]:
        noise = gaussian_filter(rng.random((height, width)), blur)
        mask = binary_fill_holes(noise > np.quantile(noise, 0.6))
        again = decode_mask(encode_segmentation(outlines(mask), height, width))
        assert np.array_equal(again, mask)


def test_outlines_are_short_and_their_order_is_known():
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:6, 3:9] = mask[10, 10] = True
    found = [np.array(polygon).reshape(-1, 2) for polygon in outlines(mask)]
    assert sorted(sorted(map(tuple, corners.tolist())) for corners in found) == [
        [(3, 2), (3, 6), (9, 2), (9, 6)],
        [(10, 10), (10, 11), (11, 10), (11, 11)],
    ]


def test_holes_are_filled_and_nothing_has_no_polygon():
    ring = np.ones((9, 9), dtype=bool)
    ring[3:6, 3:6] = False
    assert decode_mask(encode_segmentation(outlines(ring), 9, 9)).all()
    assert outlines(np.zeros((9, 9), dtype=bool)) == []
