"""A mapping that is fitted to images; it runs the model, which the mapping without data does not."""

from .calibrate import calibrate_mapping
from .video import fit_tracker_neck

__all__ = ["calibrate_mapping", "fit_tracker_neck"]
