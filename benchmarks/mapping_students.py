"""The models that the mapping benchmark compares: one way each to start a smaller model from its teacher."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import set_seed

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.data import TrainDataset
from sam3_hf.data.images import load_image
from sam3_hf.mapping.calibration import calibrate_mapping

PLUS = "-plus"  # with all layers of the DETR decoder, as the presets of such names
STRATEGIES = (
    *("random", "skip", "select", "isometry", "calibrated", "calibrated-generated"),
    *(strategy + PLUS for strategy in ("isometry", "calibrated", "calibrated-generated")),
)
SMALLER = ("vision", "encoder", "decoder")
PARTS = tuple(f"calibrated-{part}" for part in SMALLER)  # one of them smaller, all else as in the teacher
IDENTITY = "teacher"  # the same sizes, an exact copy: what all shares are relative to
CALIBRATION_IMAGES = 256


def student_config(teacher: Sam3LiteConfig, smaller: Sequence[str] = SMALLER) -> Sam3LiteConfig:
    """
    Sizes that are to the teacher's what `lite` is to `standard`: ViT x 3/4, DETR 6 -> 4.

    Args:
        smaller: the parts that have them; the others keep theirs.
    """
    vit, sizes = teacher.vision_config.backbone_config, {}
    if "vision" in smaller:
        sizes["vision_hidden_size"] = vit.hidden_size * 3 // 4
        sizes["vision_num_hidden_layers"] = vit.num_hidden_layers * 3 // 4
    if "encoder" in smaller:
        sizes["detr_encoder_layers"] = round(teacher.detr_encoder_config.num_layers * 2 / 3)
    if "decoder" in smaller:
        sizes["detr_decoder_layers"] = round(teacher.detr_decoder_config.num_layers * 2 / 3)
    return teacher.changed(**sizes)


def smaller_parts(strategy: str) -> tuple[str, ...]:
    """What is smaller in a student of one of `STRATEGIES` or `PARTS`."""
    if strategy in PARTS:
        return (SMALLER[PARTS.index(strategy)],)
    return SMALLER[:2] if strategy.endswith(PLUS) else SMALLER


def make_student(strategy: str, teacher: str, train_data: TrainDataset, seed: int) -> Sam3LiteModel:
    """
    A float32 model by one of `STRATEGIES` or `PARTS`, or `IDENTITY`.

    Args:
        teacher: folder or Hub id of a checkpoint, lite or standard.
        train_data: where the images and phrases of `calibrated` come from; annotations are not used.
        seed: of what is initialised at random, and of the choice of calibration images.
    """
    set_seed(seed)
    if strategy == IDENTITY:
        return Sam3LiteModel.from_pretrained(teacher, preset="same", dtype=torch.float32)
    config = student_config(Sam3LiteConfig.from_pretrained(teacher), smaller_parts(strategy))
    start = strategy.removesuffix(PLUS)
    if start == "random":
        return Sam3LiteModel(config)
    if not start.startswith("calibrated"):
        return Sam3LiteModel.from_pretrained(teacher, config=config, mapping=start, dtype=torch.float32)
    return calibrate_mapping(
        teacher,
        None if start == "calibrated-generated" else calibration_images(train_data, seed),
        config=config,
        prompts=train_data.concepts,
        num_images=CALIBRATION_IMAGES,
        seed=seed,
        dtype=torch.float32,
    )


def calibration_images(train_data: TrainDataset, seed: int) -> list[torch.Tensor]:
    """Images of the training split, chosen by the seed: each `(3, height, width)` uint8."""
    count = min(CALIBRATION_IMAGES, len(train_data.rows))
    chosen = np.random.default_rng(seed).choice(len(train_data.rows), size=count, replace=False)
    rows = train_data.rows.select(sorted(chosen.tolist()))
    return [load_image(row["image"], row["width"], row["height"])[0] for row in rows]
