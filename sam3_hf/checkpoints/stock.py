"""A lite model as one of Transformers' own class."""

import re

from transformers import Sam3Model
from transformers.utils import logging

from .configs import stock_config
from .names import UNREAD

logger = logging.get_logger(__name__)


def to_stock(model) -> Sam3Model:
    """See [`~Sam3LiteModel.to_sam3`]; `model` has a text encoder."""
    stock = Sam3Model(stock_config(model.config)).to(device=model.device, dtype=model.dtype)
    result = stock.load_state_dict(model.state_dict(), strict=False)
    unread = re.compile("|".join(UNREAD))
    lost = result.unexpected_keys + [name for name in result.missing_keys if not unread.match(name)]
    if lost:
        raise RuntimeError(f"This version of Transformers names parameters of `Sam3Model` differently: {lost[:4]}.")
    if model.config.summary_token:
        logger.warning(
            "Sam3Model leaves out the summary token of prompts without boxes, with which this model was made: its "
            "answers to phrases will differ, unless each prompt is given a padding box (`input_boxes` of zeros, "
            "`input_boxes_labels` of -10)."
        )
    return stock.train(model.training)
