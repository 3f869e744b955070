"""The model of a run with the weights that it starts from, and its processor."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers.utils import cached_file

from ..checkpoints import Checkpoint, open_checkpoint, refuse_training_checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig
from ..data import TrainDataset
from ..data.images import load_image
from ..errors import missing_source, named_source
from ..mapping import REPORT_FILE
from ..mapping.calibration import calibrate_mapping
from ..modeling_sam3_lite import Sam3LiteModel
from ..phrases import read_phrases
from ..processing_sam3_lite import Sam3LiteProcessor
from ..sharing.model_card import RANDOM_WEIGHTS, Origin, origin_of
from ..sources_sam3_lite import read_json
from .adapters import add_adapters
from .arguments import Arguments
from .checkpoints import BASE, FROZEN, read_state
from .phrases import TEXT_PARTS

logger = logging.getLogger(__name__)


def build_model(arguments: Arguments, checkpoint: Path | None) -> Sam3LiteModel:
    """
    The model in float32 with random, given or (as far as they are frozen) resumed weights.

    Args:
        checkpoint: the run goes on from there; its configuration is used, its trained weights are loaded later.
    """
    set_seed(arguments.optimization.seed)
    if checkpoint is not None:
        model = Sam3LiteModel(Sam3LiteConfig.from_pretrained(checkpoint))
        saved = read_state(checkpoint)["arguments"]
        if saved.get("lora_rank"):
            load_base(model, checkpoint / BASE)
        if not saved["train_text_encoder"]:
            load_frozen_text(model, checkpoint / FROZEN)
    elif arguments.source is not None:
        model = load_initial(arguments)
    else:
        model = Sam3LiteModel(initial_config(arguments))
        if not arguments.model.train_text_encoder:
            logger.warning(
                "weights are random, and so is the frozen text encoder: it tells phrases apart without knowing what "
                "they mean. Start from a checkpoint with --init, or add --train_text_encoder"
            )
    return set_up(model, arguments)


def calibrated_model(arguments: Arguments, train_data: TrainDataset, device: torch.device) -> Sam3LiteModel:
    """
    The model of a fresh run, mapped from --init, or else the teacher, and fitted to the training images without their
    labels.

    Args:
        device: where to compute.

    Raises:
        ValueError: there is nothing to fit.
    """
    if arguments.model.init is not None and open_source(arguments.source, _flag(arguments)).is_lite:
        raise ValueError(
            f"calibrate fits the mapping of a standard checkpoint, and --init {arguments.source} is a lite one, which "
            "is taken as it is: leave it out, or name that model as --teacher"
        )
    refuse_mapped_base(arguments)
    set_seed(arguments.optimization.seed)
    model = calibrate_mapping(
        arguments.source,
        TrainingImages(train_data.rows),
        config=initial_config(arguments),
        prompts=train_data.concepts,
        text_phrases=text_phrases(arguments),
        text_encoder=arguments.model.text_encoder,
        seed=arguments.optimization.seed,
        device=device,
        dtype=torch.float32,
        first_decoder_layers=arguments.distillation.teaches_masks and not arguments.adapter.lora_rank,
    )
    return set_up(model.cpu(), arguments)


class TrainingImages(Sequence):
    """The images of a split, `(3, height, width)` uint8 each, decoded when they are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        row = self.rows[int(index)]
        return load_image(row["image"], row["width"], row["height"])[0]


def set_up(model: Sam3LiteModel, arguments: Arguments) -> Sam3LiteModel:
    """The model, with what the settings say of how it trains."""
    for name, value in arguments.loss.given().items():
        setattr(model.config.loss_config, name, value)
    if arguments.adapter.lora_rank:
        add_adapters(model, arguments.adapter)
    if arguments.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if arguments.model.compile:
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
        return Sam3LiteProcessor.of_source(arguments.model.text_encoder or arguments.source, config)
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
    _load_frozen(model, path, "text encoder", text=True)  # all else is in model.safetensors


def load_base(model: Sam3LiteModel, path: Path) -> None:
    """As `load_frozen_text`: the weights beside which adapters train."""
    _load_frozen(model, path, "weights beside the adapters", text=False)


def _load_frozen(model: Sam3LiteModel, path: Path, what: str, text: bool) -> None:
    """Loads a file that holds all weights of the text side and no others, or the other way round."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which holds the frozen {what} of the checkpoint")
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    missing = [name for name in missing if (name.split(".")[0] in (*TEXT_PARTS, "vocabulary")) == text]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not hold the {what} of the checkpoint: {_some('missing', missing)}"
            f"{_some('unexpected', unexpected)}start anew in another --output_dir"
        )


def load_initial(arguments: Arguments) -> Sam3LiteModel:
    """
    The model of --init, or else that of --teacher at the size of --preset, in float32.

    Raises:
        ValueError: the source does not hold all weights of the model.
    """
    model, info = Sam3LiteModel.from_pretrained(
        arguments.source,
        config=initial_config(arguments),
        text_encoder=arguments.model.text_encoder,
        text_phrases=text_phrases(arguments),
        dtype=torch.float32,
        output_loading_info=True,
    )
    kinds = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    if any(kinds.values()):
        found = "".join(_some(kind, names) for kind, names in kinds.items())
        flag = _flag(arguments)
        raise ValueError(f"{flag} {arguments.source} is no whole model: {found}of a run, use the folder final/")
    if model.mapping_report is not None:
        refuse_mapped_base(arguments)
    return model


def refuse_mapped_base(arguments: Arguments) -> None:
    """
    Raises:
        ValueError: an adapter is to be kept apart from weights that are made by a mapping.
    """
    if not arguments.adapter.merge_adapter:
        raise ValueError(
            f"merge_adapter false: {arguments.source} is mapped to other weights, which no adapter alone could name. "
            f"Write them first, with `sam3-lite convert {arguments.source} FOLDER`, and give FOLDER to --init"
        )


def text_phrases(arguments: Arguments) -> tuple[str, ...] | None:
    """What a text encoder that becomes smaller is fitted to, if a file says it."""
    path = arguments.model.text_phrases
    return None if path is None else read_phrases(path)


def start_of_weights(arguments: Arguments) -> Origin:
    """Where the weights of a fresh run come from."""
    if arguments.source is None:
        return RANDOM_WEIGHTS
    return origin_of(arguments.source, arguments.model.text_encoder)


def write_mapping_report(model: Sam3LiteModel, arguments: Arguments) -> None:
    """Keeps in the output folder how the initial weights were mapped, or those of the checkpoint they come from."""
    target = Path(arguments.output.output_dir) / REPORT_FILE
    target.unlink(missing_ok=True)
    if model.mapping_report is not None:
        model.mapping_report.save(target.parent)
    elif (report := report_of_source(arguments)) is not None:
        shutil.copyfile(report, target)


def report_of_source(arguments: Arguments) -> str | None:
    """The file that says how the model that the first weights come from was mapped, if there is one."""
    source = arguments.source
    if source is None or os.path.isfile(source):
        return None
    return cached_file(source, REPORT_FILE, _raise_exceptions_for_missing_entries=False)


def decoder_layers(model: Sam3LiteModel, arguments: Arguments) -> list[int] | None:
    """The decoder layers of its source that those of a fresh run's model do the work of, if that is known."""
    if model.mapping_report is not None:
        report = {"strategy": model.mapping_report.strategy, "layers": model.mapping_report.layers}
    else:
        file = report_of_source(arguments)
        report = {} if file is None else read_json(file)
    kept = report.get("layers", {}).get("detr_decoder.layers")
    if kept is None or report.get("strategy") != "calibrated":
        return kept
    return [*(following - 1 for following in kept[1:]), kept[-1]]  # each was fitted to do that of dropped ones too


def _some(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} tensors, such as {', '.join(names[:3])}; " if names else ""


def initial_config(arguments: Arguments) -> Sam3LiteConfig:
    """The configuration of a fresh run: that of a lite --init, otherwise of --preset with its overrides."""
    settings = arguments.model
    given = {name: getattr(settings, name) for name in ("image_size", "num_queries")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.source is None:
        return Sam3LiteConfig.from_preset(settings.preset, **settings.model_overrides | given)
    checkpoint = open_source(arguments.source, _flag(arguments), settings.text_encoder)
    if settings.init is None or not checkpoint.is_lite:
        return checkpoint.config_at(settings.preset, **settings.model_overrides | given)
    if settings.model_overrides:
        raise ValueError("model_overrides changes a preset; with --init the sizes are those of the checkpoint")
    return checkpoint.config.changed(**given) if given else checkpoint.config


def _flag(arguments: Arguments) -> str:
    """What names the source of the first weights."""
    return "--teacher" if arguments.model.init is None else "--init"


def open_source(source: str, flag: str, text_encoder: str | None = None) -> Checkpoint:
    """
    The checkpoint that a flag names, with the words of the one that --text_encoder names.

    Raises:
        OSError: there is none; says whether the name, the access or the network is the reason.
        ValueError: it is no model of a kind that is known here.
    """
    if flag == "--init":  # a teacher may be one
        refuse_training_checkpoint(source)
    if text_encoder is not None:
        refuse_training_checkpoint(text_encoder)
    with named_source(source):
        checkpoint = open_checkpoint(source, text_encoder=text_encoder)
    if checkpoint is not None:
        return checkpoint
    if os.path.exists(source):
        raise FileNotFoundError(f"{flag} {source} has neither a config.json nor a .pt file of Meta's")
    raise missing_source(source)
