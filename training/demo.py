"""
Loads the model that a run exported, segments one validation image with it and saves the picture.

    python training/demo.py outputs/demo

For runs on generated data (training/configs/demo.yaml), whose pictures are in OUTPUT_DIR/data.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from PIL import Image

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
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
    concepts = [category["name"] for category in coco["categories"]]
    instances = segment(folder / "final", image, concepts)
    for label, score in zip(instances["labels"], instances["scores"], strict=True):
        logger.info("found a %s, score %.2f", label, score)
    picture = folder / "segmented.png"
    draw_instances(image, **instances).save(picture)
    logger.info("%d instances drawn in %s", len(instances["labels"]), picture)


@torch.no_grad()
def segment(model_folder: Path, image: Image.Image, concepts: list[str]) -> dict:
    """
    All instances of the concepts in an image.

    Returns:
        "boxes" (n, 4) xyxy in pixels, "masks" (n, height, width) bool, "labels" and "scores" (n,).
    """
    model = Sam3LiteModel.from_pretrained(model_folder, dtype=torch.float32).eval()  # a CPU is slow in FP16
    processor = Sam3LiteProcessor.from_pretrained(model_folder)
    inputs = processor(images=image, text=[concepts])
    results = processor.post_process_instance_segmentation(
        model(**inputs), threshold=CONFIDENT, target_sizes=[(image.height, image.width)] * len(concepts)
    )
    return {
        "boxes": torch.cat([result["boxes"] for result in results]),
        "masks": torch.cat([result["masks"] for result in results]),
        "scores": torch.cat([result["scores"] for result in results]).tolist(),
        "labels": [
            concept for concept, result in zip(concepts, results, strict=True) for _ in range(len(result["scores"]))
        ],
    }


if __name__ == "__main__":
    main()
