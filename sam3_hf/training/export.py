"""The final model as others load it: FP16 weights, processor, curves and card."""

import copy
import logging
import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from sam3_hf import Sam3LiteModel

from ..files import write_folder
from ..mapping import REPORT_FILE
from ..sharing.hub import PushError, push_folder
from ..sharing.model_card import write_card
from .arguments import OutputArguments

logger = logging.getLogger(__name__)


def export_final(
    accelerator: Accelerator,
    model,
    processor,
    text,
    run: Path,
    provenance: dict,
    vocabulary: list[str] | None = None,
) -> None:
    """
    Writes final/, the folder that `Sam3LiteModel.from_pretrained` takes; called by every process.

    Args:
        text: holds the weights of a text encoder that was taken out of the model.
        run: folder of the run; its metrics.jsonl, mapping_report.json and a picture go with the model.
        provenance: for `write_card`.
        vocabulary: phrases whose text features take the place of the text encoder.
    """
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        weights = {name: tensor.cpu() for name, tensor in {**weights, **text.weights()}.items()}
        config = copy.deepcopy(accelerator.unwrap_model(model).config)

        def write(folder: Path) -> None:
            final = Sam3LiteModel.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
            if vocabulary is not None:
                final.freeze_vocabulary(vocabulary, processor)
            final.half().save_pretrained(folder)
            processor.save_pretrained(folder)
            for name in ("metrics.jsonl", REPORT_FILE):
                if (run / name).is_file():
                    shutil.copyfile(run / name, folder / name)
            write_card(folder, provenance, example_picture(run, provenance["best"]))

        write_folder(run / "final", write)
    accelerator.wait_for_everyone()


def example_picture(run: Path, best: dict | None) -> Path | None:
    """A picture of the evaluation that chose the weights, or None if it drew none."""
    if best is None:
        return None
    return min((run / "predictions" / f"epoch_{math.ceil(best['epoch'])}").glob("*.png"), default=None)


def push_final(final: Path, output: OutputArguments) -> None:
    """Pushes final/ if that was asked for. A push that fails is reported and harms nothing: the run is done."""
    if not output.push_to_hub:
        return
    try:
        commit = push_folder(
            final,
            output.hub_model_id,
            private=output.hub_private,
            gated=output.hub_gated,
            revision=output.hub_revision,
        )
    except (PushError, ValueError) as error:
        logger.error("%s", error)
    else:
        logger.info("pushed: %s", commit.commit_url)
