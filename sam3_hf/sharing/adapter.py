"""What an adapter is that stands in a folder or repository without its model."""

from __future__ import annotations

import json
import os
from math import prod

from safetensors import safe_open
from transformers.utils import cached_file

from ..errors import named_source
from ..sources_sam3_lite import ADAPTER_CONFIG, ADAPTER_WEIGHTS, config_fields, read_json
from .info import PARTS

_PREFIX = "base_model.model."  # of peft, before the names of the model


def adapter_info(source: str | os.PathLike, **hub_arguments) -> dict | None:
    """
    Args:
        source: Hub id or folder; whatever else `model_info` takes holds no adapter.
        hub_arguments: `revision`, `token`, `cache_dir`, ... as in `from_pretrained`.

    Returns:
        A dict that `json` can write: `source`; `base`, the folder or repository of the model that it belongs to;
        `rank`; `alpha`; `parts`: for each part of the model its `layers` with an adapter, their `parameters` and
        `bytes`; and `parameters` and `bytes`, the totals. None for a source that is no adapter.

    Raises:
        ValueError: the adapter is none of this package's models, or its files are damaged.
        OSError: there is no such source, or a file of it is missing.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        return None
    with named_source(source, hub_arguments.get("token")):
        if config_fields(source, **hub_arguments) is not None:
            return None
        path = cached_file(source, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if path is None:
        return None
    config, parts = read_json(path), {}
    for name, tensor in _header(cached_file(source, ADAPTER_WEIGHTS, **hub_arguments)).items():
        module = name.removeprefix(_PREFIX).split(".")[0]
        part = next((part for part, modules in PARTS.items() if module in modules), None)
        if part is None:
            raise ValueError(f"{source} holds an adapter of another kind of model: it has a tensor `{name}`.")
        start, end = tensor["data_offsets"]
        own = parts.setdefault(part, {"layers": 0, "parameters": 0, "bytes": 0})
        own["layers"] += ".lora_A." in name
        own["parameters"] += prod(tensor["shape"])
        own["bytes"] += end - start
    return {
        "source": source,
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parts": {part: parts[part] for part in PARTS if part in parts},
        **{total: sum(part[total] for part in parts.values()) for total in ("parameters", "bytes")},
    }


def _header(path: str) -> dict[str, dict]:
    """What a safetensors file says of its tensors: {name: {"dtype", "shape", "data_offsets" in bytes}}."""
    with safe_open(path, "pt"):
        pass  # raises where the file is damaged
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header
