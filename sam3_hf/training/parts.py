"""What a run trains with: everything that is made before the first step."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from torch import nn

from ..data import EvalDataset, TrainDataset
from ..data.rows import has_some_masks
from ..data.unlabelled import UnlabelledDataset
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor
from .accelerator import decide, prepare
from .adapters import plain_weights, trains_vision
from .agreement import agreement_data
from .arguments import Arguments
from .checkpoints import shares_base, write_base, write_frozen
from .data import load_data, load_unlabelled, read_words, warn_of_crowds
from .distillation import Distillation
from .model import (
    build_model,
    build_processor,
    calibrated_model,
    decoder_layers,
    initial_config,
    write_mapping_report,
)
from .objectives import Labels, Objective
from .phrase_choice import phrase_choice
from .phrases import FrozenText, TokenizedText, build_text, phrases_of
from .retention import Retention
from .teacher import load_teacher

RETENTION_PICTURES = 40  # on which it is measured what was not forgotten


@dataclass(frozen=True)
class Parts:
    """
    Attributes:
        model, optimizer: as returned by `accelerator.prepare`.
        text: turns phrases into the model's text inputs.
        objective: what the steps minimise.
        retention_data: validation pictures with the teacher's answers to phrases that shall not be forgotten, or None.
        frozen: weights that neither train nor are part of the model while others do, or None.
    """

    arguments: Arguments
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    processor: Sam3LiteProcessor
    text: TokenizedText | FrozenText
    train_data: TrainDataset
    valid_data: EvalDataset
    retention_data: EvalDataset | None = None
    frozen: dict[str, torch.Tensor] | None = None


def build_parts(arguments: Arguments, accelerator: Accelerator, checkpoint: Path | None) -> Parts:
    """
    Makes them as the arguments say; called by every process.

    Args:
        checkpoint: the run goes on from there; only the sizes and frozen weights of its model are read here.
    """
    load = load_unlabelled if arguments.without_labels else load_data
    if arguments.model.calibrate and checkpoint is None:
        train_data, valid_data = load(accelerator, arguments, initial_config(arguments).image_size)
        model = calibrated_model(arguments, train_data, accelerator.device)
    else:
        model = build_model(arguments, checkpoint)
        train_data, valid_data = load(accelerator, arguments, model.config.image_size)
    processor = build_processor(arguments, model.config, checkpoint)
    retained = phrases_to_retain(arguments, train_data)
    phrases = phrases_of(train_data, valid_data if isinstance(valid_data, EvalDataset) else None) + retained
    objective = build_objective(accelerator, arguments, model, train_data, phrases, retained, checkpoint)

    def teacher_says(rows: datasets.Dataset, concepts: list[str], name: str) -> EvalDataset:
        batch_size, seed = arguments.output.eval_batch_size, arguments.optimization.seed
        kept = Path(arguments.output.output_dir) / "teacher_answers" / f"{name}.json"
        asked = (rows, concepts, train_data.image_size, batch_size, seed, kept)
        return agreement_data(accelerator, objective.teacher, processor, *asked)

    if not isinstance(valid_data, EvalDataset):
        valid_data = teacher_says(valid_data, train_data.concepts, "validation")
    retention_data = None
    if retained:
        rows = valid_data.rows.select(range(min(len(valid_data), RETENTION_PICTURES)))
        retention_data = teacher_says(rows, retained, "retention")
    warn_of_crowds(train_data, valid_data, model.config.detr_decoder_config.num_queries)
    set_mask_supervision(arguments, model, objective, has_some_masks(train_data.rows))
    valid_data.has_masks &= model.config.mask_supervision  # masks that nothing taught are not scored
    text, frozen = build_text(accelerator, arguments, model, processor, phrases)
    model, optimizer = prepare(accelerator, model, arguments.optimization)
    return Parts(
        arguments=arguments,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        objective=objective,
        processor=processor,
        text=text,
        train_data=train_data,
        valid_data=valid_data,
        retention_data=retention_data,
        frozen=frozen,
    )


def set_mask_supervision(
    arguments: Arguments, model: Sam3LiteModel, objective: Objective, labels_have_masks: bool
) -> None:
    """
    Says in the model's configuration whether its masks will mean something.

    Args:
        labels_have_masks: whether any object of the training split has one.

    Raises:
        ValueError: an adapter without its model could not say so, or all that trains is of the mask decoder, which
            nothing would teach.
    """
    keeps_masks = objective.keeps_masks(model.config.mask_supervision, labels_have_masks)
    if keeps_masks != model.config.mask_supervision and not arguments.adapter.merge_adapter:
        raise ValueError(
            f"merge_adapter false: training on this data makes mask_supervision {str(keeps_masks).lower()}, unlike in "
            f"the config.json of {arguments.model.init}, and no adapter alone could say so: leave merge_adapter out"
        )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not keeps_masks and all(name.startswith("mask_decoder.") for name in trained):
        raise ValueError(
            f"lora_targets {arguments.adapter.lora_targets!r}: nothing would train, as only layers of the mask "
            "decoder get an adapter and the training split has no masks: choose others, such as detector"
        )
    model.config.mask_supervision = keeps_masks


def phrases_to_retain(arguments: Arguments, train_data: TrainDataset) -> list[str]:
    """Those of --retain_phrases that the dataset has no labels for."""
    given = read_words(arguments.distillation.retain_phrases)
    return [phrase for phrase in given if phrase not in {*train_data.concepts, *train_data.sampling.negative_words}]


def build_objective(
    accelerator: Accelerator,
    arguments: Arguments,
    model: Sam3LiteModel,
    train_data: TrainDataset | UnlabelledDataset,
    phrases: list[str],
    retained: list[str],
    checkpoint: Path | None,
) -> Objective:
    """
    Labels alone, or a teacher with or without them.

    Args:
        phrases: all that will be asked for.
        retained: those of them that shall not be forgotten.
    """
    settings = arguments.distillation
    if settings.teacher is None:
        return Labels()
    if not trains_vision(model) and settings.vision_alone:
        raise ValueError(
            "the adapters leave the vision encoder as it is, and nothing else would train in some steps: set "
            "feature_steps to 0 and a weight of the detector's answers above 0, or lora_targets to all"
        )
    teacher = load_teacher(
        settings.teacher,
        model.config,
        phrases,
        settings.distill_confidence,
        settings.teacher_device or accelerator.device,
        arguments.optimization.mixed_precision,
        settings.teacher_cache,
        different_pictures(train_data),
    )
    if teacher.cache is not None:
        decide(accelerator, teacher.cache.prepare)
    # A checkpoint remembers which layers and queries belong together.
    layers = decoder_layers(model, arguments) if checkpoint is None else None
    choice = phrase_choice(train_data) if arguments.without_labels else None
    retention = None
    if retained:
        per_image = max(1, round(settings.retain_share * arguments.data.prompts_per_image))
        retention = Retention(retained, per_image, arguments.optimization.seed)
    return Distillation(teacher, model, settings, layers, choice, retention)


def different_pictures(data: TrainDataset | UnlabelledDataset) -> int:
    """How many a teacher sees, where nothing but mirroring varies them."""
    chances = (data.augmentation.horizontal_flip, data.augmentation.vertical_flip)
    return len(data) * 2 ** sum(0 < chance < 1 for chance in chances)


def write_parts(parts: Parts, checkpoint: Path | None) -> None:
    """Writes into the output folder what its checkpoints and final model will refer to; called by every process."""
    checkpoints = Path(parts.arguments.output.output_dir) / "checkpoints"
    model, base = parts.accelerator.unwrap_model(parts.model), None
    if parts.arguments.adapter.lora_rank and not shares_base(checkpoints, checkpoint):
        base = parts.accelerator.get_state_dict(parts.model)
    if not parts.accelerator.is_main_process:
        return
    if checkpoint is None:
        write_mapping_report(model, parts.arguments)
    if parts.frozen is not None:
        write_frozen(checkpoints, parts.frozen)
    if base is not None:
        write_base(checkpoints, plain_weights(model, base, merge=False))
