"""Fields of the settings: their help texts and limits."""

import dataclasses
import math
from dataclasses import field


def check_finite(group) -> None:
    """Raises ValueError naming the first field that is infinite or not a number."""
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{item.name} must be a finite number, got {value}")


def option(default, text: str):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


def check_range(group, name: str, low: float, high: float | None = None) -> None:
    """Raises ValueError naming the field if its value is below `low` or above `high`."""
    value = getattr(group, name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")
