"""Files of a checkpoint folder or Hub repository, as far as loading a saved model needs them."""

from __future__ import annotations

import json
import os

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

# Keyword arguments of `from_pretrained` that say where files are.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What training writes into a checkpoint folder beside its weights: its state; the text encoder where that was frozen,
# which is not among the weights then; the averages of the weights if the run kept them; and, instead of weights, those
# of adapters where these trained.
TRAINER_STATE = "trainer_state.json"
FROZEN_TEXT = "frozen_text.safetensors"
AVERAGE = "ema.safetensors"
ADAPTER = "adapter.safetensors"
# Those of peft in the folder of an adapter alone.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What says in a folder or repository that it holds graphs (`sam3-lite export`) and no model to load here.
EXPORT_FILE = "sam3_lite_export.json"


def config_fields(source: str | os.PathLike, **hub_arguments) -> dict | None:
    """
    The content of the `config.json` of a folder or Hub repository, `None` if it has none.

    Raises:
        ValueError: it is no JSON object.
    """
    path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub_arguments)
    return None if path is None else read_json(path)


def read_json(path: str | os.PathLike) -> dict:
    """
    The content of a JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or something else than an object; the message names the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no usable JSON: it is nested too deeply.") from error
    except ValueError as error:  # of `json`, and for numbers of thousands of digits
        if "BOM" in str(error):
            raise ValueError(f"{path} starts with a byte order mark: save it as UTF-8 without one.") from error
        raise ValueError(f"{path} is no JSON ({error}): it is damaged; write or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: write or download it again.")
    return content


def is_training_checkpoint(source: str | os.PathLike) -> bool:
    """Whether the source is a checkpoint folder that `training/train.py` wrote to resume from."""
    return os.path.isfile(os.path.join(source, TRAINER_STATE))


def listed(names: list[str], limit: int = 10) -> str:
    """Names of tensors as text; the end of a long list is left out."""
    rest = len(names) - limit
    return ", ".join(f"`{name}`" for name in names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def safe_weights(source: str | os.PathLike, variant: str | None = None, **hub_arguments) -> str:
    """
    The safetensors file of a folder or Hub repository, or the index of its shards.

    Raises:
        ValueError: the index is none, or names files outside of the folder.
        OSError: there is none. Where there is a pickle instead, the message says how to insist on it.
    """

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)

    names = [_of_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    path = find(names[0]) or find(names[1])
    if path is not None:
        if not path.endswith(".safetensors"):
            shard_names(path)
        return path
    pickled = next((name for name in (WEIGHTS_INDEX_NAME, WEIGHTS_NAME) if find(name) is not None), None)
    if pickled is not None:
        raise OSError(
            f"{source} has no {names[0]}, only {pickled}: such files can carry code and are refused. Ask its author "
            "for safetensors, which `save_pretrained` writes, or insist with `use_safetensors=False`, which reads the "
            "tensors and nothing else."
        )
    raise OSError(f"{source} has neither {names[0]} nor {names[1]}.")


def check_pickled_index(source: str | os.PathLike, variant: str | None = None, **hub_arguments) -> None:
    """
    Raises:
        ValueError: pickled weights in parts have an index that is none, or names files outside of the folder.
    """
    name = _of_variant(WEIGHTS_INDEX_NAME, variant)
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if path is not None:
        shard_names(path)


def _of_variant(name: str, variant: str | None) -> str:
    stem, end = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{end}"


def shard_names(index: str | os.PathLike) -> list[str]:
    """
    The files that the index of a model in parts names.

    Raises:
        ValueError: it is no such index, or names a file that is not below its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` from tensors to files: write it with save_pretrained.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not _is_below(name)]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of its folder: do not trust this model.")
    return names


def _is_below(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not (os.path.isabs(name) or ":" in name or "\0" in name or ".." in parts or "" in parts)


__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "AVERAGE",
    "EXPORT_FILE",
    "FROZEN_TEXT",
    "HUB_ARGUMENTS",
    "TRAINER_STATE",
    "check_pickled_index",
    "config_fields",
    "is_training_checkpoint",
    "listed",
    "read_json",
    "safe_weights",
    "shard_names",
]
