"""
From files to models and back. A lite model as it was saved loads with Transformers alone; whatever else needs the
package, whose sub-packages do not travel with saved folders.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedConfig
from transformers.models.sam3.modeling_sam3 import Sam3PreTrainedModel
from transformers.utils import logging

from .configuration_sam3_lite import SIZE_KEYWORDS, Sam3LiteConfig, parameter_sizes
from .limits_sam3_lite import read_config
from .precision_sam3_lite import as_dtype
from .sources_sam3_lite import (
    HUB_ARGUMENTS,
    check_pickled_index,
    config_fields,
    is_training_checkpoint,
    listed,
    safe_weights,
)

logger = logging.get_logger(__name__)


# What `needs_package` says of a source that cannot be loaded as it is.
OTHER_MODEL = "A model of other sizes, or of another kind,"


def needs_package(what: str) -> ImportError:
    return ImportError(f"{what} needs the package sam3-hf, which is not installed here: `pip install sam3-hf`.")


# Dtypes of weights that can hold NaN and infinity, and that `aminmax` knows.
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fields_of(source: str | os.PathLike, hub_arguments: dict) -> dict | None:
    """`config_fields`, whose errors the package says more of where it is installed."""
    try:
        from sam3_hf.errors import named_source
    except ImportError:
        return config_fields(source, **hub_arguments)
    with named_source(source, hub_arguments.get("token")):
        return config_fields(source, **hub_arguments)


class LiteLoading:
    """
    What a lite model adds to [`PreTrainedModel`]: it can be made of another checkpoint, says what became of that, and
    is loaded whole or not at all. Classes have `_sizes`, the fields of a configuration that decide which parameters
    there are and of which shapes, and `_plan_mapping`, see [`~sam3_hf.mapping.plan_mapping`].
    """

    # The `MappingReport` of weights that were mapped from a checkpoint of another kind or of other sizes.
    mapping_report = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        preset: str | None = None,
        mapping: str = "auto",
        text_encoder: str | os.PathLike | None = None,
        text_phrases: Sequence[str] | None = None,
        config: Sam3LiteConfig | str | os.PathLike | None = None,
        **kwargs,
    ) -> LiteLoading:
        r"""
        Loads a lite checkpoint as Transformers does, or makes a lite model from any other SAM 3 checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a model of type `sam3_lite`, `sam3`, `sam3_video`,
                `sam3_lite_video` or `sam3_lite_text`, or a native `.pt` file of Meta's (also as written by its
                trainer). Also a checkpoint folder of `training/train.py`, whose averaged weights are those of
                `variant="ema"`.
            preset (`str`, *optional*): sizes of the model, see [`~Sam3LiteConfig.at_preset`], or `"same"` for those
                of the source. Default: `"lite"` for a standard source, `"same"` for a lite one.
            mapping (`str`, *optional*, defaults to `"auto"`): how weights are carried to smaller sizes: `"isometry"`,
                `"select"` or `"skip"`, see [`map_checkpoint`]; `"auto"` is the best of them, and fits a smaller text
                encoder to phrases besides. Equal sizes are copied.
            text_encoder (`str`, *optional*): another source, of any of these kinds, that words are taken from: its
                text encoder and projection are copied, its other tensors not read.
            text_phrases (`list[str]`, *optional*): what a text encoder that becomes smaller (`text_hidden_size`,
                `text_num_hidden_layers`) is fitted to, instead of some thousand everyday phrases.
            config (`Sam3LiteConfig` or path, *optional*): sizes of the model, instead of `preset`.
            kwargs: those of [`~PreTrainedModel.from_pretrained`] (`dtype`, `device_map`, `revision`, `token`, ...),
                and fields of the config such as `image_size`, or `num_queries`: queries beyond those of the source
                start untrained. With `ignore_mismatched_sizes=True`, tensors that the
                source lacks, or of sizes that no mapping changes, are initialised at random instead of raising an
                error; with `output_loading_info=True`, which returns their names, those that it lacks. Weights are
                read from safetensors files; pickled ones, but for Meta's `.pt`, only with `use_safetensors=False`.
                Nothing in them is executed.

        Returns:
            The model in evaluation mode. Unless it was loaded as it was saved, `mapping_report` accounts for every
            tensor; [`~Sam3LiteModel.save_pretrained`] writes it beside the weights.

        Raises:
            ValueError: the source is no SAM 3 checkpoint, or lacks tensors, or cannot be mapped to these sizes, or
                holds values that are not finite.
            OSError: a file is missing or truncated.

        Example:

        ```python
        >>> from sam3_hf import Sam3LiteModel

        >>> model = Sam3LiteModel.from_pretrained("facebook/sam3", preset="lite")  # doctest: +SKIP
        >>> print(model.mapping_report)  # doctest: +SKIP
        ```
        """
        if "vocabulary" in kwargs:
            raise ValueError("`vocabulary` is no argument of loading: call `freeze_vocabulary` on the loaded model.")
        if config is not None and preset is not None:
            raise ValueError("`preset` and `config` both say the sizes of the model: pass one of them.")
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # else Transformers falls back to pickles
        for name in ("dtype", "torch_dtype"):
            if isinstance(kwargs.get(name), str) and kwargs[name] != "auto":
                kwargs[name] = as_dtype(kwargs[name])
        source = pretrained_model_name_or_path
        hub_arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        fields = None if source is None or os.path.isfile(source) else _fields_of(source, hub_arguments)
        as_saved = preset in (None, "same") and text_encoder is None and not SIZE_KEYWORDS & set(kwargs)
        if as_saved and cls._is_saved_model(source, fields):
            saved = read_config(cls.config_class.from_dict, fields, source)
            if config is None or cls._sizes(config) == cls._sizes(saved):
                check = safe_weights if kwargs["use_safetensors"] else check_pickled_index
                check(source, kwargs.get("variant"), **hub_arguments)
                return cls._load(source, *model_args, config=config, **kwargs)
        plan = None
        if source is not None:
            plan = cls._plan_mapping(source, fields, preset, config, kwargs, text_encoder, text_phrases)
        if plan is None:
            return cls._load(source, *model_args, config=config, **kwargs)
        state_dict, report = plan.map(cls.parameter_shapes, mapping)
        log = logger.info if report.strategy == "copy" else logger.warning
        log(report.summary())
        loaded = super().from_pretrained(
            None, *model_args, config=plan.model_config, state_dict=state_dict, dtype=plan.dtype, **plan.rest
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.mapping_report = report
        model.config.name_or_path = model.name_or_path = os.fspath(source)
        return loaded

    @classmethod
    def _is_saved_model(cls, source: str | os.PathLike | None, fields: dict | None) -> bool:
        """Whether the source is what `save_pretrained` of such a model wrote, by its `config.json`."""
        kind = cls.config_class.model_type
        return fields is not None and fields.get("model_type") == kind and not is_training_checkpoint(source)

    @classmethod
    def _load(cls, source: str | os.PathLike | None, *model_args, **kwargs):
        """As Transformers loads it, who would initialise at random what is missing, and take NaN for a weight."""
        with_info = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        with nullcontext() if lenient or with_info else _without_load_report():
            model, info = super().from_pretrained(
                source, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        label = "`state_dict`" if source is None else os.fspath(source)
        if not lenient:
            _check_sizes(label, info["mismatched_keys"])
        if not (lenient or with_info):
            _check_complete(label, info, len(model.state_dict()))
        _check_finite(label, model)
        return (model, info) if with_info else model

    @classmethod
    def parameter_shapes(cls, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter and buffer that a model with this configuration has."""
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """
        As [`~PreTrainedModel.save_pretrained`]; a model that was mapped from another one writes
        `mapping_report.json` as well.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.mapping_report is not None and is_main_process:
            self.mapping_report.save(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` uploads before it returns here, when the report is not written yet.
        if self.mapping_report is not None:
            self.mapping_report.save(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Pushes the model in one commit with its processor, mapping report and model card.

        Args:
            repo_id: `owner/name`; created if there is none.
            kwargs: those of [`~sam3_hf.sharing.hub.push_model`]: `processor`, `private`, `gated`, `revision`,
                `commit_message`, `token`, `max_shard_size`.

        Returns:
            The commit.

        Raises:
            PushError: the Hub refused, or could not be reached; the message says why.
            ImportError: the model was loaded by `trust_remote_code` where sam3-hf is not installed.
        """
        try:
            from sam3_hf.sharing.hub import push_model
        except ImportError as error:
            raise needs_package("The card that `push_to_hub` writes") from error
        return push_model(self, repo_id, **kwargs)


class Sam3LitePreTrainedModel(LiteLoading, Sam3PreTrainedModel):
    config: Sam3LiteConfig
    config_class = Sam3LiteConfig
    base_model_prefix = "sam3_lite"
    supports_gradient_checkpointing = True
    _supports_flex_attn = False  # Transformers reads additive masks there as one value per image and pair of positions
    # `Trainer` must scale the loss by the accumulation steps itself: ours is already normalised per batch.
    accepts_loss_kwargs = False
    _no_split_modules = [
        "Sam3LiteViTLayer",
        "CLIPEncoderLayer",
        "Sam3LiteDetrEncoderLayer",
        "Sam3LiteDetrDecoderLayer",
    ]

    @staticmethod
    def _sizes(config: Sam3LiteConfig) -> tuple:
        return parameter_sizes(config)

    @staticmethod
    def _plan_mapping(*arguments):
        try:
            from sam3_hf.mapping.plan import plan_mapping
        except ImportError as error:
            raise needs_package(OTHER_MODEL) from error
        return plan_mapping(*arguments)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps back Transformers' table of what was missing or not used: it is an error of ours, or one line."""
    loader = logging.get_logger("transformers.modeling_utils")

    def is_none(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loader.addFilter(is_none)
    try:
        yield
    finally:
        loader.removeFilter(is_none)


def _check_sizes(label: str, mismatched: Iterable[tuple]):
    """Raises a ValueError if tensors (name, shape in the file, shape in the model) do not agree."""
    different = [f"`{name}` is {tuple(have)} there, {tuple(want)} in the model" for name, have, want in mismatched]
    if different:
        raise ValueError(
            f"{label}: {len(different)} tensors have other sizes than the configuration says: "
            f"{'; '.join(sorted(different)[:4])}. Take the configuration that belongs to the weights, or pass "
            "`ignore_mismatched_sizes=True` to initialise them at random."
        )


def _check_complete(label: str, info: dict, count: int):
    """
    Warns of tensors that the model does not have.

    Args:
        info: what Transformers says of the loading.
        count: tensors of the model.

    Raises:
        ValueError: some were not in the files.
    """
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unused = f"{len(others)} tensors have names that this model does not know: {listed(others, 4)}" if others else ""
    if missing:
        raise ValueError(
            f"{label} is no whole model: it lacks {len(missing)} of {count} tensors: {listed(missing)}."
            f"{unused and f' {unused}.'} Get it again, or pass `ignore_mismatched_sizes=True` to initialise them at "
            "random."
        )
    if unused:
        logger.warning(f"{label}: {unused}.")


def _check_finite(label: str, model: torch.nn.Module):
    """Raises a ValueError naming the tensors that hold NaN or infinity."""
    bad = [
        name
        for name, tensor in model.state_dict().items()
        # The extremes tell, and need no memory. A tensor on "meta" is loaded by another process, or later.
        if tensor.dtype in _FLOATS and tensor.numel() and not tensor.is_meta and not _is_finite(tensor)
    ]
    if bad:
        raise ValueError(
            f"{label}: {len(bad)} tensors hold values that are not finite in {model.dtype}: {listed(bad)}. If they "
            "are finite in the file, load it with another `dtype`; otherwise take another checkpoint."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


__all__ = ["OTHER_MODEL", "LiteLoading", "Sam3LitePreTrainedModel", "needs_package"]
