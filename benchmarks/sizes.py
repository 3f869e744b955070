"""
Prints parameters and FP16 megabytes of every preset as a Markdown table, those of `lite` and `small` with each text
encoder of SAM3-LiteText as well; and as JSON with --json.
"""

import argparse
import json
import logging
import sys

import torch

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.presets_sam3_lite import PRESETS, TEXT_ENCODERS

logger = logging.getLogger(__name__)


def sizes_of(preset: str, text: str = "standard") -> dict:
    """Counts a preset's parameters without allocating them."""
    with torch.device("meta"):
        model = Sam3LiteModel(Sam3LiteConfig.from_preset(preset, text=text))
    vit = model.config.vision_config.backbone_config
    total, words = model.num_parameters(), model.text_encoder.num_parameters()
    return {
        "preset": preset,
        "text": text,
        "vit": f"{vit.hidden_size} × {vit.num_hidden_layers} × {vit.num_attention_heads}",
        "detr": f"{model.config.detr_encoder_config.num_layers} + {model.config.detr_decoder_config.num_layers}",
        "pixels": model.config.image_size,
        "parameters": total,
        "parameters_without_text_encoder": total - words,
        "fp16_megabytes": 2 * total / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    rows = [sizes_of(preset) for preset in PRESETS]
    rows += [sizes_of(preset, text) for preset in ("lite", "small") for text in TEXT_ENCODERS[1:]]
    if arguments.json:
        logger.info(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    logger.info("| preset | ViT width × depth × heads | DETR | pixels | parameters | without text encoder | FP16 |")
    logger.info("|---|---|---|---|---|---|---|")
    for row in rows:
        name = row["preset"] if row["text"] == "standard" else f"{row['preset']}, text {row['text']}"
        logger.info(
            f"| {name} | {row['vit']} | {row['detr']} | {row['pixels']} | {row['parameters'] / 1e6:.1f}M "
            f"| {row['parameters_without_text_encoder'] / 1e6:.1f}M | {row['fp16_megabytes']:.0f} MB |"
        )


if __name__ == "__main__":
    main()
