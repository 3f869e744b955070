"""Writes the card of every preset beside this file, from sam3_hf/assets/model_card.md."""

from pathlib import Path

from huggingface_hub import ModelCard

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.presets_sam3_lite import PRESETS
from sam3_hf.sharing.model_card import preset_card


def card_of(preset: str) -> ModelCard:
    return preset_card(preset, Sam3LiteModel.parameter_shapes(Sam3LiteConfig.from_preset(preset)))


def main() -> None:
    for preset in PRESETS:
        card_of(preset).save(Path(__file__).parent / f"{preset}.md")


if __name__ == "__main__":
    main()
