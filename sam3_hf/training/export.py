"""The final model as others load it: FP16 weights, processor, curves and card."""

import copy
import json
import logging
import math
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from sam3_hf import Sam3LiteModel

from ..files import write_folder
from ..mapping import REPORT_FILE
from ..sharing.hub import PushError, push_folder
from ..sharing.model_card import CARD_FILE, LICENSE_FILE, PROVENANCE_FILE, SAM_LICENSE_TEXT, write_card
from .adapters import plain_weights, save_adapter
from .arguments import OutputArguments

logger = logging.getLogger(__name__)

ADAPTER_CARD = """# Adapter for a lite SAM 3

Of `{base}`, trained with sam3-hf; settings and scores are in `provenance.json`.

```python
from peft import PeftModel
from sam3_hf import Sam3LiteModel

model = PeftModel.from_pretrained(Sam3LiteModel.from_pretrained("{base}"), "FOLDER_OR_REPOSITORY_OF_THIS")
```
"""


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
    whole, weights = accelerator.unwrap_model(model), accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        weights = plain_weights(whole, weights, merge=True)
        weights = {name: tensor.cpu() for name, tensor in {**weights, **text.weights()}.items()}
        config = copy.deepcopy(whole.config)

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


def export_adapter(accelerator: Accelerator, model, processor, run: Path, provenance: dict, base: str) -> None:
    """
    Writes final/ with the adapter alone, which `PeftModel.from_pretrained` and `model.load_adapter` take; called by
    every process.

    Args:
        base: the lite model that it belongs to.
        provenance: as for `export_final`.
    """
    base = os.path.abspath(base) if os.path.exists(base) else base
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:

        def write(folder: Path) -> None:
            save_adapter(accelerator.unwrap_model(model), state, folder, base)
            processor.save_pretrained(folder)
            if (run / "metrics.jsonl").is_file():
                shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
            (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
            (folder / CARD_FILE).write_text(ADAPTER_CARD.format(base=base), encoding="utf-8")
            if provenance["origin"]["derived"]:
                shutil.copyfile(SAM_LICENSE_TEXT, folder / LICENSE_FILE)

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
