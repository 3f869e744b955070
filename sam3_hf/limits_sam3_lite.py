"""What values of a configuration can be, whatever part of the model it is of."""

from __future__ import annotations

import difflib
import os

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# The largest value of each size, in any part: far above what was ever trained, and below what stops a machine.
_MAXIMUMS = {
    "fpn_hidden_size": 16_384,
    "hidden_size": 16_384,
    "image_size": 16_384,
    "intermediate_size": 131_072,
    "mask_num_points": 10_000_000,
    "max_position_embeddings": 65_536,
    "num_attention_heads": 1024,
    "num_channels": 1024,
    "num_hidden_layers": 512,
    "num_layers": 512,
    "num_queries": 100_000,
    "one_to_many_topk": 100_000,
    "patch_size": 1024,
    "pretrain_image_size": 16_384,
    "projection_dim": 16_384,
    "repmixer_kernel_size": 1023,
    "roi_size": 256,
    "vocab_size": 10_000_000,
    "window_size": 16_384,
}


def check_values(path: str, part) -> None:
    """Rejects sizes above their largest value, numbers that are not finite and unknown activations, at any depth."""
    for name, value in (part if isinstance(part, dict) else vars(part)).items():
        field = f"`{path}.{name}`"
        if isinstance(value, (dict, PreTrainedConfig)):
            check_values(f"{path}.{name}", value)
        elif isinstance(value, (int, float)) and not abs(value) < float("inf"):
            raise ValueError(f"{field}={value} is no finite number.")
        elif name in _MAXIMUMS and isinstance(value, int) and value > _MAXIMUMS[name]:
            raise ValueError(f"{field} must be at most {_MAXIMUMS[name]:,}, got {_shortened(value)}.")
        elif name == "hidden_act" and (not isinstance(value, str) or value not in ACT2FN):
            raise ValueError(f"{field}={value!r} is no activation of Transformers, such as 'gelu'.")


def _shortened(value: int) -> str:
    return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"


def check_multiple(field: str, value: int, divisor_name: str, divisor: int) -> None:
    if value < 1 or value % divisor:
        below = max(value // divisor, 1) * divisor
        raise ValueError(
            f"`{field}`={value} is not a positive multiple of {divisor_name} ({divisor}): use {below} or "
            f"{below + divisor}."
        )


def read_config(from_dict, fields: dict, source: str | os.PathLike | None = None, **kwargs):
    """
    `from_dict(fields, **kwargs)`, for the content of a file.

    Args:
        source: the folder or repository that it is of, for messages.

    Raises:
        ValueError: whatever it raises; the message names the source.
    """
    where = "" if source is None else f"{source}: "
    try:
        return from_dict(fields, **kwargs)
    except ValueError as error:
        if source is None:
            raise
        raise ValueError(f"{where}{error}") from error
    except Exception as error:  # of any type, as the values of a damaged or foreign file may be
        reason = " ".join(str(error).split())
        message = f"{where}config.json has a value that cannot be: {type(error).__name__}: {reason}."
        raise ValueError(message) from error


__all__ = ["check_multiple", "check_values", "read_config"]


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
