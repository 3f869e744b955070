"""What a run trains with: everything that is made before the first step."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..data import EvalDataset, TrainDataset
from ..data.rows import has_some_masks
from ..processing_sam3_lite import Sam3LiteProcessor
from .accelerator import prepare
from .arguments import Arguments
from .checkpoints import write_frozen
from .data import load_data, warn_of_crowds
from .model import build_model, build_processor, write_mapping_report
from .objectives import Labels, Objective
from .phrases import FrozenText, TokenizedText, build_text


@dataclass(frozen=True)
class Parts:
    """
    Attributes:
        model, optimizer: as returned by `accelerator.prepare`.
        text: turns phrases into the model's text inputs.
        objective: what the steps minimise.
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
    frozen: dict[str, torch.Tensor] | None = None


def build_parts(arguments: Arguments, accelerator: Accelerator, checkpoint: Path | None) -> Parts:
    """
    Makes them as the arguments say; called by every process.

    Args:
        checkpoint: the run goes on from there; only the sizes and frozen weights of its model are read here.
    """
    model = build_model(arguments, checkpoint)
    processor = build_processor(arguments, model.config, checkpoint)
    train_data, valid_data = load_data(accelerator, arguments, model.config.image_size)
    warn_of_crowds(train_data, valid_data, model.config.detr_decoder_config.num_queries)
    model.config.mask_supervision = has_some_masks(train_data.rows)
    valid_data.has_masks &= model.config.mask_supervision  # masks that nothing taught are not scored
    text, frozen = build_text(accelerator, arguments, model, processor, train_data)
    model, optimizer = prepare(accelerator, model, arguments.optimization)
    return Parts(
        arguments=arguments,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        objective=Labels(),
        processor=processor,
        text=text,
        train_data=train_data,
        valid_data=valid_data,
        frozen=frozen,
    )


def write_parts(parts: Parts, checkpoint: Path | None) -> None:
    """Writes into the output folder what its checkpoints and final model will refer to; for the main process."""
    if checkpoint is None:
        write_mapping_report(parts.accelerator.unwrap_model(parts.model), parts.arguments)
    if parts.frozen is not None:
        write_frozen(Path(parts.arguments.output.output_dir) / "checkpoints", parts.frozen)
