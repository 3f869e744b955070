"""A smaller model out of a larger one's weights, without data. `sam3_hf.mapping.calibration` fits it to pictures."""

from .depth import layer_maps
from .mapper import STRATEGIES, map_checkpoint
from .plan import MappingPlan, plan_mapping
from .report import REPORT_FILE, MappingReport, MappingRow

__all__ = [
    "REPORT_FILE",
    "STRATEGIES",
    "MappingPlan",
    "MappingReport",
    "MappingRow",
    "layer_maps",
    "map_checkpoint",
    "plan_mapping",
]
