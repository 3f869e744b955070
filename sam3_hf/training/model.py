"""The model of a run with the weights that it starts from, and its processor."""

import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers.utils import cached_file

from ..checkpoints import Checkpoint, open_checkpoint, refuse_training_checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig
from ..errors import missing_source, named_source
from ..mapping import REPORT_FILE
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sharing.model_card import RANDOM_WEIGHTS, Origin, origin_of
from .arguments import Arguments, ModelArguments
from .checkpoints import FROZEN, read_state
from .phrases import TEXT_PARTS

logger = logging.getLogger(__name__)


def build_model(arguments: Arguments, checkpoint: Path | None) -> Sam3LiteModel:
    """
    The model in float32 with random, given or (as far as they are frozen) resumed weights.

    Args:
        checkpoint: the run goes on from there; its configuration is used, its trained weights are loaded later.
    """
    set_seed(arguments.optimization.seed)
    model_arguments = arguments.model
    if checkpoint is not None:
        model = Sam3LiteModel(Sam3LiteConfig.from_pretrained(checkpoint))
        if not read_state(checkpoint)["arguments"]["train_text_encoder"]:
            load_frozen_text(model, checkpoint / FROZEN)
    elif model_arguments.init is not None:
        model = load_initial(model_arguments)
    else:
        model = Sam3LiteModel(initial_config(model_arguments))
        if not model_arguments.train_text_encoder:
            logger.warning(
                "weights are random, and so is the frozen text encoder: it tells phrases apart without knowing what "
                "they mean. Start from a checkpoint with --init, or add --train_text_encoder"
            )
    for name, value in arguments.loss.given().items():
        setattr(model.config.loss_config, name, value)
    if model_arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if model_arguments.compile:
        model.compile()
    return model


def build_processor(arguments: Arguments, config: Sam3LiteConfig, checkpoint: Path | None) -> Sam3LiteProcessor:
    """
    The processor of a run, with the tokenizer that it started with.

    Args:
        config: of the model.
        checkpoint: the run goes on from there.

    Raises:
        ValueError: the tokenizer is not that of the model.
    """
    if checkpoint is None:
        return Sam3LiteProcessor.of_source(arguments.model.text_encoder or arguments.model.init, config)
    if Sam3LiteProcessor.has_tokenizer(checkpoint):
        return Sam3LiteProcessor.of_source(checkpoint, config)
    started_from = read_state(checkpoint)["arguments"]["init"]  # checkpoints of older versions hold no tokenizer
    return Sam3LiteProcessor.of_origin(started_from, config)


def load_frozen_text(model: Sam3LiteModel, path: Path) -> None:
    """
    Loads the text encoder that a run had put aside, or its fixed vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than the weights of this text encoder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which holds the frozen text encoder of the checkpoint")
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    frozen = (*TEXT_PARTS, "vocabulary")  # all else is in model.safetensors
    missing = [name for name in missing if name.split(".")[0] in frozen]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not hold the text encoder of the checkpoint: {_some('missing', missing)}"
            f"{_some('unexpected', unexpected)}start anew in another --output_dir"
        )


def load_initial(arguments: ModelArguments) -> Sam3LiteModel:
    """
    The model of --init in float32.

    Raises:
        ValueError: the source does not hold all weights of the model.
    """
    model, info = Sam3LiteModel.from_pretrained(
        arguments.init,
        config=initial_config(arguments),
        text_encoder=arguments.text_encoder,
        dtype=torch.float32,
        output_loading_info=True,
    )
    kinds = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    if any(kinds.values()):
        found = "".join(_some(kind, names) for kind, names in kinds.items())
        raise ValueError(f"--init {arguments.init} is no whole model: {found}of a run, use the folder final/")
    return model


def start_of_weights(arguments: ModelArguments) -> Origin:
    """Where the weights of a fresh run come from."""
    return RANDOM_WEIGHTS if arguments.init is None else origin_of(arguments.init, arguments.text_encoder)


def write_mapping_report(model: Sam3LiteModel, arguments: Arguments) -> None:
    """Keeps in the output folder how the initial weights were mapped, or those of the checkpoint they come from."""
    target, init = Path(arguments.output.output_dir) / REPORT_FILE, arguments.model.init
    target.unlink(missing_ok=True)
    if model.mapping_report is not None:
        model.mapping_report.save(target.parent)
    elif init is not None and not os.path.isfile(init):
        report = cached_file(init, REPORT_FILE, _raise_exceptions_for_missing_entries=False)
        if report is not None:
            shutil.copyfile(report, target)


def _some(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} tensors, such as {', '.join(names[:3])}; " if names else ""


def initial_config(arguments: ModelArguments) -> Sam3LiteConfig:
    """The configuration of a fresh run: that of a lite checkpoint, otherwise of --preset with its overrides."""
    given = {name: getattr(arguments, name) for name in ("image_size", "num_queries")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.init is None:
        return Sam3LiteConfig.from_preset(arguments.preset, **arguments.model_overrides | given)
    checkpoint = open_initial(arguments.init, arguments.text_encoder)
    if not checkpoint.is_lite:
        return checkpoint.config_at(arguments.preset, **arguments.model_overrides | given)
    if arguments.model_overrides:
        raise ValueError("model_overrides changes a preset; with --init the sizes are those of the checkpoint")
    return checkpoint.config.changed(**given) if given else checkpoint.config


def open_initial(init: str, text_encoder: str | None = None) -> Checkpoint:
    """
    The checkpoint that --init names, with the words of the one that --text_encoder names.

    Raises:
        OSError: there is none; says whether the name, the access or the network is the reason.
        ValueError: it is no model of a kind that is known here.
    """
    for source in filter(None, (init, text_encoder)):
        refuse_training_checkpoint(source)
    with named_source(init):
        checkpoint = open_checkpoint(init, text_encoder=text_encoder)
    if checkpoint is not None:
        return checkpoint
    if os.path.exists(init):
        raise FileNotFoundError(f"--init {init} has neither a config.json nor a .pt file of Meta's")
    raise missing_source(init)
