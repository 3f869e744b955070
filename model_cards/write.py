"""Writes the card of every preset beside this file, from sam3_hf/assets/model_card.md."""

from pathlib import Path

from sam3_hf.model_card import preset_card

from sam3_hf.configuration_sam3_lite import PRESETS


def main() -> None:
    for preset in PRESETS:
        preset_card(preset).save(Path(__file__).parent / f"{preset}.md")


if __name__ == "__main__":
    main()
