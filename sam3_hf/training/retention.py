"""Not forgetting: phrases outside of the dataset, for which the model keeps its teacher's answers."""

from collections.abc import Sequence

import numpy as np
import torch

from ..configuration_sam3_lite import BOX_PADDING_LABEL

STREAM = 3  # of random numbers, apart from those of other uses of the same keys


class Retention:
    """
    Adds prompts without labels to labelled batches, behind all others.

    Args:
        phrases: to draw from.
        per_image: how many are drawn for each image; fewer if there are fewer phrases.
        seed: 0 or more. What is drawn depends on it, the epoch and the image alone.
    """

    def __init__(self, phrases: Sequence[str], per_image: int, seed: int):
        self.phrases, self.seed = list(phrases), seed
        self.per_image = min(per_image, len(self.phrases))

    def add(self, batch: dict) -> dict:
        """
        A batch with the added prompts. It has "labels" for the first ones only.

        Args:
            batch: as collated from samples of `TrainDataset`.
        """
        images = torch.arange(len(batch["keys"])).repeat_interleave(self.per_image)
        added = [self.phrases[number] for key in batch["keys"] for number in self.draw(*key)]
        more = {
            "phrases": [*batch["phrases"], *added],
            "image_index": torch.cat([batch["image_index"], images]),
        }
        if "input_boxes" in batch:
            boxes, labels = batch["input_boxes"], batch["input_boxes_labels"]
            more["input_boxes"] = torch.cat([boxes, boxes.new_zeros(len(added), *boxes.shape[1:])])
            padding = labels.new_full((len(added), labels.shape[1]), BOX_PADDING_LABEL)
            more["input_boxes_labels"] = torch.cat([labels, padding])
        return batch | more

    def draw(self, epoch: int, image: int) -> list[int]:
        """Positions of the phrases for an image, all different."""
        rng = np.random.default_rng([self.seed, epoch, image, STREAM])
        return rng.choice(len(self.phrases), self.per_image, replace=False).tolist()
