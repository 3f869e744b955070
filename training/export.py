"""The final model as others load it: FP16 weights, processor and a stub of its card."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from checkpoints import write_folder
from reporting import main_scores

from sam3_hf import Sam3LiteModel, __version__


def export_final(
    accelerator: Accelerator,
    model,
    processor,
    text,
    target: Path,
    summary: dict,
    vocabulary: list[str] | None = None,
) -> None:
    """
    Writes the folder that `Sam3LiteModel.from_pretrained` takes; called by every process.

    Args:
        text: holds the weights of a text encoder that was taken out of the model.
        summary: "base", "data" and "best" (the best evaluation, or None) for the card.
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
            (folder / "README.md").write_text(card(summary), encoding="utf-8")

        write_folder(target, write)
    accelerator.wait_for_everyone()


def card(summary: dict) -> str:
    """Model card with what the run knows; the rest is for its author to fill in."""
    best = summary["best"]
    table = ""
    if best is not None:
        rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in main_scores(best["scores"]).items())
        where = f"Validation split, step {best['step']} (epoch {best['epoch']:.1f})"
        table = f"{where}:\n\n| score | value |\n|---|---|\n{rows}\n"
    return f"""---
library_name: transformers
pipeline_tag: mask-generation
tags: [sam3, sam3_lite, image-segmentation]
---

# Lite SAM 3, fine-tuned

Started from {summary["base"]}, trained on {summary["data"]} with sam3_hf {__version__}. Weights are FP16.

{table}```python
from sam3_hf import Sam3LiteModel, Sam3LiteProcessor

model = Sam3LiteModel.from_pretrained("path/to/this/folder").eval()
processor = Sam3LiteProcessor.from_pretrained("path/to/this/folder")
```

Weights derived from SAM 3 fall under the SAM License of Meta.
"""
