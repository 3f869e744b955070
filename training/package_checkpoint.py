"""
Writes the final model of a run from random weights as a small standard checkpoint: FP16 weights in the layout of
`Sam3Model`, with its processor and a card.

    python training/package_checkpoint.py outputs/tiny_standard sam3_hf/assets/tiny-standard --scores metrics.json

So the checkpoint that the package carries was made from a run of training/configs/tiny_standard.yaml; `metrics.json`
is what `sam3-lite evaluate` wrote of its final/ on pictures of another seed.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Sam3Processor

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.evaluation.rows import CONFIDENT
from sam3_hf.sharing.model_card import PROVENANCE_FILE, RANDOM_WEIGHTS, versions

logger = logging.getLogger(__name__)

CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: mask-generation
tags: [sam3, image-segmentation]
---

# tiny-standard

SAM 3's architecture in miniature: {parameters:.1f}M parameters in {depth} ViT layers of width {width}, 6 + 6 DETR
layers and a text encoder of its own; input of {size} pixels. It stands in for the real standard checkpoint where tests
and demos need one that works: it finds and segments shapes in pictures that `sam3_hf.data.generated.write_dataset`
draws, and nothing else. It knows {concepts}.

- Weights: FP16, trained from random ones with `accelerate launch --cpu training/train.py
  training/configs/tiny_standard.yaml`; nothing of Meta's is in them. Log: `benchmarks/results/tiny_standard`.
- Layout: that of `transformers.Sam3Model`. `Sam3LiteModel.from_pretrained(FOLDER, preset="tiny")` maps it into the
  lite model; `preset="same"` keeps its sizes. Stock Transformers load it as well.
- Scores on {images} pictures that were drawn with another seed than those of the run:

| score | value |
|---|---|
{scores}
"IL_MCC" is the correlation of "the concept is in the picture" with the truth, at a score of {confident}.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run on generated data")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--scores", type=Path, required=True, help="metrics.json of `sam3-lite evaluate`")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = Sam3LiteModel.from_pretrained(arguments.run / "final", dtype=torch.float16)
    model.to_sam3().save_pretrained(arguments.target)
    processor = Sam3LiteProcessor.from_config(model.config)
    Sam3Processor(processor.image_processor, processor.tokenizer).save_pretrained(arguments.target)
    provenance = {"origin": asdict(RANDOM_WEIGHTS), "versions": versions()}
    (arguments.target / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    (arguments.target / "README.md").write_text(card(model, arguments.run, arguments.scores), encoding="utf-8")
    size = (arguments.target / "model.safetensors").stat().st_size
    logger.info("%s: %.2f MB of weights", arguments.target, size / 1e6)


def card(model: Sam3LiteModel, run: Path, evaluation: Path) -> str:
    """Model card with the scores of an evaluation."""
    evaluated = json.loads(evaluation.read_text(encoding="utf-8"))
    coco = json.loads((run / "data" / "valid" / "_annotations.coco.json").read_text(encoding="utf-8"))
    names = ("segm_AP", "segm_AP50", "segm_cgF1", "bbox_AP", "bbox_AP50", "IL_MCC")
    vit = model.config.vision_config.backbone_config
    return CARD.format(
        parameters=model.num_parameters() / 1e6,
        depth=vit.num_hidden_layers,
        width=vit.hidden_size,
        size=model.config.image_size,
        concepts=", ".join(f'"{category["name"]}"' for category in coco["categories"]),
        images=evaluated["images"],
        scores="".join(f"| {name} | {evaluated[name]:.3f} |\n" for name in names if evaluated[name] is not None),
        confident=CONFIDENT,
    )


if __name__ == "__main__":
    main()
