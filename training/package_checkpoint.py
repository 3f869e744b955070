"""
Writes the final model of a run from random weights as a small standard checkpoint: FP16 weights in the layout of
`Sam3Model`, with its processor and a card.

    python training/package_checkpoint.py outputs/tiny_standard_finer/final sam3_hf/assets/tiny-standard \\
        --scores scores.json

So the checkpoint that the package carries was made, from a run of training/configs/tiny_standard_finer.yaml that went
on with what tiny_standard.yaml had ended with; `scores.json` is what `benchmarks/composed_scores.py` wrote of it.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Sam3Processor

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data.words import SEEN_PHRASES, absent_phrases
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
layers and a text encoder of its own; input of {size} pixels, {queries} queries. It stands in for the real standard
checkpoint where tests, demos and measurements need one that works: it finds and segments shapes in pictures that
`sam3_hf.data.composed.write_composed` draws, and nothing else. It was asked for {phrases} phrases of one to three
words ("star", "striped star", "small red star") and answers pairs of words that it never saw together.

- Weights: FP16, trained from random ones with `torchrun --nproc-per-node 2 training/train.py
  training/configs/tiny_standard.yaml` at 144 pixels, then with `tiny_standard_finer.yaml` at {size}; nothing of Meta's
  is in them. Logs: `benchmarks/results/tiny_standard`.
- Layout: that of `transformers.Sam3Model`. `Sam3LiteModel.from_pretrained(FOLDER, preset="tiny")` maps it into the
  lite model; `preset="same"` keeps its sizes. Stock Transformers load it as well, but leave the summary token out.
- Scores by `benchmarks/composed_scores.py`, {images} pictures of each split, drawn with another seed than those of the
  run:

| score | phrases of the training | pairs never seen together | 20 to 40 objects |
|---|---|---|---|
{scores}
"IL_MCC" is the correlation of "the concept is in the picture" with the truth, at a score of {confident}. Of {absent}
phrases that name nothing in any picture, asked on {absent_images} pictures, {rejected:.1%} find nothing.
"""
SPLITS = ("seen", "unseen", "dense")
FIGURES = ("segm_AP", "segm_AP50", "bbox_AP", "segm_cgF1", "IL_MCC")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="final/ of a run on composed pictures, or a folder of `convert`")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--scores", type=Path, required=True, help="JSON file of composed_scores.py")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = Sam3LiteModel.from_pretrained(arguments.model, dtype=torch.float16)
    torch.manual_seed(0)  # what only the stock class has is random: the same file each time
    model.to_sam3().save_pretrained(arguments.target)
    processor = Sam3LiteProcessor.from_config(model.config)
    Sam3Processor(processor.image_processor, processor.tokenizer).save_pretrained(arguments.target)
    provenance = {"origin": asdict(RANDOM_WEIGHTS), "versions": versions()}
    (arguments.target / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    scores = json.loads(arguments.scores.read_text(encoding="utf-8"))
    (arguments.target / "README.md").write_text(card(model, scores), encoding="utf-8")
    size = (arguments.target / "model.safetensors").stat().st_size
    logger.info("%s: %.2f MB of weights", arguments.target, size / 1e6)


def card(model: Sam3LiteModel, scores: dict) -> str:
    """Model card with what `composed_scores.py` wrote."""
    vit = model.config.vision_config.backbone_config
    rows = [f"| {name} | " + " | ".join(f"{scores[split][name]:.3f}" for split in SPLITS) + " |\n" for name in FIGURES]
    return CARD.format(
        parameters=model.num_parameters() / 1e6,
        depth=vit.num_hidden_layers,
        width=vit.hidden_size,
        size=model.config.image_size,
        queries=model.config.detr_decoder_config.num_queries,
        phrases=len(SEEN_PHRASES),
        images=scores["images"],
        scores="".join(rows),
        confident=CONFIDENT,
        absent=len(absent_phrases()),
        absent_images=scores["absent_images"],
        rejected=scores["absent"]["IL_negative_accuracy"],
    )


if __name__ == "__main__":
    main()
