"""A mapping that is fitted to images; it runs the model, which the mapping without data does not."""

from .calibrate import calibrate_mapping

__all__ = ["calibrate_mapping"]
