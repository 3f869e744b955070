"""
Loads the model that a run exported, segments one validation image with it and saves the picture.

    python training/demo.py outputs/demo

For runs on generated data (training/configs/demo.yaml), whose pictures are in OUTPUT_DIR/data.
"""

import argparse
import json
import logging
from pathlib import Path

from PIL import Image

from sam3_hf import Sam3LitePipeline
from sam3_hf.visualization import draw_instances

logger = logging.getLogger(__name__)

CONFIDENT = 0.5  # a model this small is often half sure of the wrong thing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="output folder of a finished run on generated data")
    folder = parser.parse_args(argv).output_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    coco = json.loads((folder / "data" / "valid" / "_annotations.coco.json").read_text(encoding="utf-8"))
    image = Image.open(folder / "data" / "valid" / coco["images"][0]["file_name"])
    pipe = Sam3LitePipeline.from_pretrained(folder / "final")
    found = pipe(image, [category["name"] for category in coco["categories"]], threshold=CONFIDENT)
    for label, score in zip(found.labels, found.scores, strict=True):
        logger.info("found a %s, score %.2f", label, score)
    picture = folder / "segmented.png"
    draw_instances(image, found.boxes, found.masks, found.labels, found.scores).save(picture)
    logger.info("%d instances drawn in %s", len(found), picture)


if __name__ == "__main__":
    main()
