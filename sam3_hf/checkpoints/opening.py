"""Opening a source: the files that its configuration and its weights are in, whatever kind of source it is."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import Sam3Config, Sam3LiteTextConfig, Sam3VideoConfig
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file

from ..configuration_sam3_lite import Sam3LiteConfig
from ..configuration_video_sam3_lite import Sam3LiteVideoConfig
from ..errors import missing_source, named_source
from ..limits_sam3_lite import read_config
from ..sources_sam3_lite import (
    ADAPTER,
    ADAPTER_CONFIG,
    AVERAGE,
    FROZEN_TEXT,
    config_fields,
    is_training_checkpoint,
    read_json,
    safe_weights,
    shard_names,
)
from .checkpoint import Checkpoint
from .configs import lite_config
from .joined import JoinedCheckpoint
from .readers import PickledTensors, SafetensorsFiles
from .video import VideoCheckpoint, lite_video_config, no_tracker

# Name of Meta's own file in the Hub repository of SAM 3.
NATIVE_FILE = "sam3.pt"
# Where the models of a run are in its output folder.
_RUN_FOLDERS = ("final", "checkpoints/best", "checkpoints/last", "best", "last")


def open_checkpoint(
    source: str | os.PathLike,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    fields: dict | None = None,
    text_encoder: str | os.PathLike | None = None,
    tracker: bool = False,
    **hub_arguments,
) -> Checkpoint | None:
    """
    Opens a checkpoint without reading its tensors.

    Args:
        source: Hub id or folder of model type `sam3`, `sam3_video`, `sam3_lite_text`, `sam3_lite` or
            `sam3_lite_video`, a folder with a single `.pt` file, or a `.pt`, `.pth`, `.bin` or `.safetensors` file.
            Also a checkpoint folder of `training/train.py`, of which `variant="ema"` gives the averaged weights.
        variant, hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, ... as in `from_pretrained`.
        fields: content of the source's `config.json`, if it was read before.
        text_encoder: another checkpoint, of any of these kinds, whose text encoder takes the place of this one's. Its
            `token`, `cache_dir`, ... are the same, `revision` and `subfolder` those of the source alone.
        tracker: whether it is one with a tracker: a [`VideoCheckpoint`] is opened.
        use_safetensors: `False` reads `pytorch_model.bin` of a folder or repository, which is refused otherwise;
            nothing in it is executed.

    Returns:
        The checkpoint, or `None` if there is neither a `config.json` nor a native file.

    Raises:
        ValueError: the source is of another model type, or its file holds something else than SAM 3, or it is the
            output folder of a training run, or a checkpoint of one in parts, or has no tracker where one is wanted.
        OSError: a file is missing, truncated or of an unknown format.
    """
    checkpoint = _open(os.fspath(source), variant, use_safetensors, fields, hub_arguments, tracker)
    if checkpoint is None or text_encoder is None:
        return checkpoint
    shared = {key: value for key, value in hub_arguments.items() if key not in ("revision", "subfolder")}
    token = hub_arguments.get("token")
    with named_source(text_encoder, token):
        words = _open(os.fspath(text_encoder), None, use_safetensors, None, shared)
    if words is None:
        raise missing_source(text_encoder, token)
    return JoinedCheckpoint(checkpoint, words)


def _open(
    source: str,
    variant: str | None,
    use_safetensors: bool | None,
    fields: dict | None,
    hub_arguments: dict,
    tracker: bool = False,
) -> Checkpoint | None:
    kind = VideoCheckpoint if tracker else Checkpoint
    if os.path.isfile(source):
        return kind(source, _open_file(source))
    fields = fields or config_fields(source, **hub_arguments)
    config = source_config(source, fields, **hub_arguments)
    if config is None:
        _refuse_run_folder(source)
        _refuse_adapter(source, hub_arguments)
        native = _native_file(source, hub_arguments)
        return native and kind(native, _open_file(native))
    if is_training_checkpoint(source):
        files = SafetensorsFiles(_training_files(source, variant))
    elif use_safetensors is False:
        files = PickledTensors(cached_file(source, WEIGHTS_NAME, **hub_arguments))
    else:
        files = SafetensorsFiles(weight_files(source, variant, **hub_arguments))
    is_lite = isinstance(config, Sam3LiteConfig)
    config = config if is_lite else lite_config(config)
    if tracker:
        return VideoCheckpoint(source, files, _video_config(source, fields, config), is_lite)
    return Checkpoint(source, files, config, is_lite)


def _video_config(source: str, fields: dict, detector: Sam3LiteConfig) -> Sam3LiteVideoConfig:
    """The configuration of the whole, from the content of a `config.json`; a ValueError if that has no tracker."""
    if fields["model_type"] == "sam3_lite_video":
        return read_config(Sam3LiteVideoConfig.from_dict, fields, source)
    if fields["model_type"] == "sam3_video":
        stock = read_config(Sam3VideoConfig.from_dict, fields, source)
        return read_config(lambda _: lite_video_config(stock, detector), fields, source)
    raise no_tracker(source)


def refuse_training_checkpoint(source: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: the source is a checkpoint folder of a training run, where a model is meant.
    """
    if is_training_checkpoint(source):
        raise ValueError(
            f"{source} is a checkpoint to resume from, not a model: take the folder final/ of its run, or what "
            f"`sam3-lite convert {source} FOLDER` makes of it."
        )


def source_config(
    source: str | os.PathLike, fields: dict | None = None, **hub_arguments
) -> Sam3LiteConfig | Sam3Config | Sam3LiteTextConfig | None:
    """
    The detector's configuration from the `config.json` of a folder or Hub repository, `None` if it has none.

    Args:
        fields: its content, if it was read before.

    Raises:
        ValueError: the model type is none of SAM 3's, or a value cannot be.
    """
    fields = fields or config_fields(source, **hub_arguments)
    if fields is None:
        return None
    model_type = fields.get("model_type")
    if model_type == "sam3_lite":
        return read_config(Sam3LiteConfig.from_dict, fields, source)
    if model_type == "sam3":
        return read_config(Sam3Config.from_dict, fields, source)
    if model_type == "sam3_lite_text":
        return read_config(Sam3LiteTextConfig.from_dict, fields, source)
    if model_type == "sam3_video":
        return read_config(Sam3VideoConfig.from_dict, fields, source).detector_config
    if model_type == "sam3_lite_video":
        return read_config(Sam3LiteVideoConfig.from_dict, fields, source).detector_config
    raise ValueError(
        f"{source} is a model of type {model_type!r}; a lite model starts from `sam3`, `sam3_video`, "
        f"`sam3_lite_text`, `sam3_lite` or `sam3_lite_video`, or from Meta's `{NATIVE_FILE}`."
    )


def weight_files(source: str | os.PathLike, variant: str | None = None, **hub_arguments) -> list[Path]:
    """
    The safetensors files of a folder or Hub repository: one, or the shards of an index.

    Args:
        variant, hub_arguments: as in [`open_checkpoint`].

    Raises:
        ValueError: the index is none, or names files outside of the folder.
        OSError: there are none, or a shard is missing.
    """
    path = safe_weights(source, variant, **hub_arguments)
    if path.endswith(".safetensors"):
        return [Path(path)]
    found = {
        shard: cached_file(source, shard, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        for shard in shard_names(path)
    }
    missing = [shard for shard, file in found.items() if file is None]
    if missing:
        raise OSError(f"{source} is no whole model: {', '.join(missing)} is missing; write it with save_pretrained.")
    return [Path(file) for file in found.values()]


def _training_files(source: str, variant: str | None) -> list[str]:
    """Files of a training checkpoint; a tensor of a later one replaces that of an earlier one."""
    parts = sorted(name for name in os.listdir(source) if name.startswith("pytorch_model_fsdp"))
    if parts and not os.path.isfile(os.path.join(source, SAFE_WEIGHTS_NAME)):
        raise ValueError(
            f"{source} was written under FSDP, in parts: take the folder final/ of the run, or put the parts together "
            f"with `accelerate merge-weights {os.path.join(source, parts[0])} {source}`."
        )
    if os.path.isfile(os.path.join(source, ADAPTER)):
        raise ValueError(
            f"{source} is a checkpoint of a run that trains an adapter, and no model: take the folder final/ of the "
            f"run, which its command with --resume {source} writes."
        )
    if variant not in (None, "ema"):
        raise ValueError(f"{source} is a training checkpoint: its variants are None and 'ema', not {variant!r}.")
    files = [os.path.join(source, name) for name in (SAFE_WEIGHTS_NAME, FROZEN_TEXT, AVERAGE)]
    weights, frozen, average = files
    if variant == "ema" and not os.path.isfile(average):
        raise OSError(f"{source} has no {AVERAGE}: its run kept no average of the weights (`ema_decay` was 0).")
    if os.path.isfile(frozen):
        return [weights, frozen, *([average] if variant == "ema" else [])]
    if not any(name.startswith("text_encoder.") for name in SafetensorsFiles([weights])):
        raise OSError(f"{frozen} is missing, which holds the frozen text encoder of the checkpoint.")
    return [weights, *([average] if variant == "ema" else [])]


def _refuse_run_folder(source: str):
    """Raises a ValueError naming the models in the output folder of a training run."""
    found = [name for name in _RUN_FOLDERS if os.path.isfile(os.path.join(source, name, "config.json"))]
    models = [name for name in found if not os.path.isfile(os.path.join(source, name, ADAPTER))]
    if models:
        paths = " or ".join(os.path.join(source, name) for name in models)
        raise ValueError(f"{source} is the folder of a training run, not of a model: take {paths}.")
    if os.path.isdir(os.path.join(source, "final")):
        _refuse_adapter(os.path.join(source, "final"), {})
    if found:
        raise ValueError(
            f"{source} is the folder of a run that trains an adapter, and has no model yet: take its folder final/, "
            "which the command of the run with --resume auto writes."
        )


def _refuse_adapter(source: str, hub_arguments: dict):
    """Raises a ValueError naming the base of an adapter that stands alone."""
    path = cached_file(source, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if path is not None:
        base = read_json(path).get("base_model_name_or_path")
        raise ValueError(
            f"{source} holds an adapter, and no model: run the command that trained it again with --resume auto and "
            f"--merge_adapter true for a whole one, or load {base} in Python and it beside that with `PeftModel`."
        )


def _open_file(path: str) -> SafetensorsFiles | PickledTensors:
    return SafetensorsFiles([path]) if path.endswith(".safetensors") else PickledTensors(path)


def _native_file(source: str, hub_arguments: dict) -> str | None:
    if not os.path.isdir(source):
        return cached_file(source, NATIVE_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    found = sorted(name for name in os.listdir(source) if name.endswith((".pt", ".pth")))
    if len(found) > 1:
        raise ValueError(f"{source} has no config.json and several files ({', '.join(found)}): name the one to load.")
    return os.path.join(source, found[0]) if found else None


__all__ = ["open_checkpoint", "refuse_training_checkpoint", "source_config", "weight_files"]
