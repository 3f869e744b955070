"""
A smaller model out of a larger one's weights, without data but phrases. `sam3_hf.mapping.calibration` fits it to
pictures.
"""

from .depth import layer_maps
from .mapper import STRATEGIES, map_checkpoint
from .plan import MappingPlan, plan_mapping
from .report import REPORT_FILE, MappingReport, MappingRow
from .text import fits_text, map_with_phrases

__all__ = [
    "REPORT_FILE",
    "STRATEGIES",
    "MappingPlan",
    "MappingReport",
    "MappingRow",
    "fits_text",
    "layer_maps",
    "map_checkpoint",
    "map_with_phrases",
    "plan_mapping",
]
