"""A lite model as one of Transformers' own classes."""

import re

from transformers import Sam3LiteTextModel, Sam3Model
from transformers.utils import logging

from ..presets_sam3_lite import LITE_TEXT
from .configs import stock_config
from .names import UNREAD

logger = logging.get_logger(__name__)


def to_stock(model) -> Sam3Model | Sam3LiteTextModel:
    """See [`~Sam3LiteModel.to_sam3`]; `model` has a text encoder."""
    kind = Sam3LiteTextModel if model.config.text_config.model_type == LITE_TEXT else Sam3Model
    stock = kind(stock_config(model.config)).to(device=model.device, dtype=model.dtype)
    result = stock.load_state_dict(model.state_dict(), strict=False)
    unread = re.compile("|".join(UNREAD))
    lost = result.unexpected_keys + [name for name in result.missing_keys if not unread.match(name)]
    if lost:
        raise RuntimeError(
            f"This version of Transformers names parameters of `{kind.__name__}` differently: {lost[:4]}."
        )
    if model.config.summary_token:
        logger.warning(
            f"{kind.__name__} leaves out the summary token of prompts without boxes, with which this model was made: "
            "its answers to phrases will differ, unless each prompt is given a padding box (`input_boxes` of zeros, "
            "`input_boxes_labels` of -10)."
        )
    return stock.train(model.training)
