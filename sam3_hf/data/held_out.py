"""Pictures kept from training, to validate with, where a dataset has none for that."""

import logging

import datasets
import numpy as np

from .checks import DatasetError

logger = logging.getLogger(__name__)


def hold_out(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The rows without a random share of them, at least one, and that share, both in order.

    Raises:
        DatasetError: there are less than two rows.
    """
    if len(rows) < 2:
        raise DatasetError(f"there is {len(rows)} picture, and one is held out for validation: add pictures")
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    logger.info("%d of %d pictures are held out for validation (--validation_split %g)", count, len(rows), share)
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
