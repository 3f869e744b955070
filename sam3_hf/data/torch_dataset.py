"""Map-style torch datasets that turn rows into samples, for training and for evaluation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from . import transforms
from .images import load_image
from .references import coco_reference_row
from .rows import concept_names, crowded_images, first_of, has_masks, objects_per_category, segmentation_of
from .sampling import Prompt, PromptSampling, add_box, draw_prompts, image_rng
from .scenes import Scene, draw_tiles, place, tile_pixels, whole_tile
from .transforms import Augmentation

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """One image with its prompts; what collation takes.

    Attributes:
        pixel_values: (3, size, size) float32, -1 to 1.
        phrases: one per prompt.
        labels: one dict per prompt: boxes (n, 4) float32 cxcywh in [0, 1]; masks (n, size, size) bool where all of the
            prompt's objects have a segmentation, and (0, size, size) for an absent concept of a dataset with masks.
            A prompt with an object that lacks one has no masks, and takes no part in the mask and semantic losses: a
            union of some of its masks would teach that the others are background.
        boxes: one per prompt: (4,) float32 cxcywh in [0, 1], or None.
        image_id: of the row.
        key: (epoch, index) of an image of training, otherwise None.
        original_size: (height, width) in pixels; evaluation only, as the following.
        categories: position of each prompt's concept in `concept_names`.
        references: one per prompt: what `sam3_hf.evaluation` takes as ground truth, crowd regions included.
    """

    pixel_values: torch.Tensor
    phrases: list[str]
    labels: list[dict]
    boxes: list[torch.Tensor | None]
    image_id: int
    key: tuple[int, int] | None = None
    original_size: tuple[int, int] | None = None
    categories: list[int] = field(default_factory=list)
    references: list[dict] = field(default_factory=list)


class TrainDataset(Dataset):
    """Augmented images with sampled prompts.

    An item depends only on (seed, epoch, index): a run that is killed and resumed sees the same batches, with any
    number of workers. The epoch comes with the key, `dataset[epoch, index]`, as `BatchKeys` asks for it; a plain
    `dataset[index]` takes the epoch of `set_epoch`, which reaches running workers too.

    Every item has a prompt. Images in which nothing can be asked for, as those with only crowd regions in a dataset of
    one concept, are left out and counted in the log. Where the crop leaves nothing to ask for (it took the objects of
    the one concept, and a crowd region of it is in the image), the whole image is shown instead.

    Args:
        rows: a split of `load_dataset_splits`.
        image_size: side of the model's square input in pixels.
        sampling: which prompts are drawn.
        augmentation: how images are varied.
        seed: 0 or more.

    Raises:
        ValueError: a negative word is a concept of the dataset, or the dataset has no images.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_size: int,
        sampling: PromptSampling | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        if len(rows) == 0:
            raise ValueError("the training split has no images")
        self.sampling, self.augmentation = sampling or PromptSampling(), augmentation or Augmentation()
        self.rows = promptable_rows(rows, self.sampling)
        self.image_size, self.seed = image_size, seed
        self.concepts, self.has_masks = concept_names(rows), has_masks(rows)
        if self.augmentation.rotation and not self.has_masks:
            logger.warning("rotation: images with an object that has a box alone are not turned: it would not fit")
        known = set(self.concepts) & set(self.sampling.negative_words)
        if known:
            raise ValueError(f"negative words {', '.join(sorted(known))} are concepts of the dataset; remove them")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of plain indices."""
        self._epoch.fill_(epoch)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (int(self._epoch), key)
        rng = image_rng(self.seed, epoch, index)
        tiles = draw_tiles(self.rows, index, self.image_size, self.augmentation, rng)
        pixels = tile_pixels(tiles, self.augmentation, rng)
        prompts, labels = self._prompts(place(tiles), rng)
        if not prompts:
            tiles = [whole_tile(tiles[0].row, self.image_size)]
            pixels = tile_pixels(tiles, self.augmentation, rng)
            prompts, labels = self._prompts(place(tiles), rng)
        return Sample(
            pixel_values=pixels,
            phrases=[prompt.phrase for prompt in prompts],
            labels=labels,
            boxes=[_unit_box(prompt.box, self.image_size) for prompt in prompts],
            image_id=tiles[0].row["image_id"],
            key=(epoch, index),
        )

    def _prompts(self, scene: Scene, rng: np.random.Generator) -> tuple[list[Prompt], list[dict]]:
        by_concept, barred = {}, set()
        for index, item in enumerate(scene.objects):
            if item["iscrowd"]:
                barred.add(item["category"])
            elif scene.visible[index]:
                by_concept.setdefault(item["category"], []).append(index)
        prompts, labels = [], []
        for prompt in draw_prompts(by_concept, barred, self.concepts, self.sampling, rng):
            label, kept = make_label(prompt, scene, self.has_masks)
            if prompt.objects and not kept and prompt.concept in barred:
                continue  # its crowd region may be in the picture, so it is not absent
            prompt = replace(prompt, objects=kept)
            if kept and rng.random() < self.sampling.box_prompt_probability:
                prompt = add_box(prompt, label["boxes"].numpy(), self.image_size, rng)
            labels.append(to_unit(label, self.image_size))
            prompts.append(prompt)
        return prompts, labels


class EvalDataset(Dataset):
    """Images as they are, each asked for every concept.

    Crowd regions are in the references, for the metrics to ignore what is found there, but not in the labels: where a
    concept has nothing but crowd regions, the validation loss counts it as absent, although training never asks for it
    there. A crowd region without a segmentation, in a dataset with masks, gets that of its box.

    Args:
        rows: a split of `load_dataset_splits`.
        image_size: side of the model's square input in pixels.
        categories: positions in `concept_names` to ask for; default: all.

    Raises:
        ValueError: a category is not among the concepts, or the dataset has no images.
    """

    def __init__(self, rows: datasets.Dataset, image_size: int, categories: Sequence[int] | None = None):
        if len(rows) == 0:
            raise ValueError("the evaluation split has no images")
        self.rows, self.image_size = rows, image_size
        self.concepts = concept_names(rows)
        self.has_masks = has_masks(rows)
        self.categories = list(range(len(self.concepts)) if categories is None else categories)
        unknown = [category for category in self.categories if category not in range(len(self.concepts))]
        if unknown:
            raise ValueError(f"categories {unknown} are not positions among the {len(self.concepts)} concepts")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.asked(index, self.categories)

    def asked(self, index: int, categories: Sequence[int]) -> Sample:
        """The image at `index`, asked for other categories than those of the dataset."""
        row = self.rows[index]
        width, height, objects = row["width"], row["height"], row["objects"]
        tile = whole_tile(row, self.image_size)
        pixels, _ = load_image(row["image"], width, height)
        pixels, scene = transforms.normalize(transforms.transform_pixels(pixels, tile.transform)), place([tile])
        image = {"id": row["image_id"], "width": width, "height": height}
        labels, references = [], []
        for category in categories:
            of_category = [index for index, item in enumerate(objects) if item["category"] == category]
            targets = tuple(index for index in of_category if not objects[index]["iscrowd"])
            prompt = Prompt(self.concepts[category], category, targets)
            label, _ = make_label(prompt, scene, self.has_masks)
            labels.append(to_unit(label, self.image_size))
            annotations = [
                objects[index] | {"segmentation": segmentation_of(objects[index]) or _crowd_outline(objects[index])}
                for index in of_category
            ]
            references.append(coco_reference_row(image, category, annotations, with_masks=self.has_masks))
        return Sample(
            pixel_values=pixels,
            phrases=[self.concepts[category] for category in categories],
            labels=labels,
            boxes=[None] * len(labels),
            image_id=row["image_id"],
            original_size=(height, width),
            categories=list(categories),
            references=references,
        )


def _crowd_outline(item: dict) -> list[list[float]] | None:
    """The box of a crowd region as a polygon; None for a single object."""
    x, y, width, height = item["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return [corners] if item["iscrowd"] else None


def promptable_rows(rows: datasets.Dataset, sampling: PromptSampling) -> datasets.Dataset:
    """The rows that can get a prompt, which is all of them in most datasets; the log counts what is left out.

    Raises:
        ValueError: no row is left.
    """
    counts = objects_per_category(rows)  # (images, concepts)
    too_many = counts > sampling.max_objects
    if too_many.any():
        images, _ = crowded_images(rows, sampling.max_objects)
        text = "concepts with more than %d objects in an image are not asked for there: %d cases, in %d images: %s"
        logger.warning(text, sampling.max_objects, too_many.sum(), len(images), first_of(images))
    possible = ((counts >= 0) & ~too_many).any(axis=1) | bool(sampling.negative_words)
    if possible.all():
        return rows
    if not possible.any():
        raise ValueError("no image of the training split can get a prompt: all concepts are crowd regions or too many")
    left_out = rows.select(np.flatnonzero(~possible))["file_name"]
    text = "%d images left out: no concept can be asked for in them: %s"
    logger.warning(text, len(left_out), first_of(left_out))
    return rows.select(np.flatnonzero(possible))


def make_label(prompt: Prompt, scene: Scene, with_masks: bool) -> tuple[dict, tuple[int, ...]]:
    """The target of one prompt, and the objects that are in it.

    Masks are made only if all of the prompt's objects have a segmentation. An object that the crop took something of
    gets the box of its remaining pixels, or is left out if there are none; one that was turned gets that of its
    pixels. An object too thin to have pixels at this size gets those of its box.

    Args:
        with_masks: whether the dataset has masks; an absent concept then gets an empty stack of them.

    Returns:
        ({"boxes": (n, 4) float32 xyxy in pixels of the canvas, "masks": (n, canvas, canvas) bool or absent}, objects)
    """
    if not prompt.objects:
        label = {"boxes": torch.zeros(0, 4)}
        if with_masks:
            label["masks"] = torch.zeros(0, scene.canvas, scene.canvas, dtype=torch.bool)
        return label, ()
    segmentations = [segmentation_of(scene.objects[index]) for index in prompt.objects]
    if not all(segmentations):
        return {"boxes": torch.from_numpy(scene.boxes[list(prompt.objects)]).float()}, prompt.objects
    kept, final_boxes, masks = [], [], []
    for index, segmentation in zip(prompt.objects, segmentations, strict=True):
        transform, box, cut = scene.transforms[index], scene.boxes[index], scene.cut[index]
        mask = transforms.transform_mask(segmentation, transform)
        empty = not mask.any()
        if empty and cut:
            continue
        if empty:
            left, top, right, bottom = *np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int)
            mask[top:bottom, left:right] = True
        elif cut or transform.angle:
            box = transforms.mask_box(mask)
        kept.append(index)
        final_boxes.append(torch.as_tensor(box, dtype=torch.float32))
        masks.append(mask)
    if not kept:
        return make_label(replace(prompt, objects=()), scene, True)
    return {"boxes": torch.stack(final_boxes), "masks": torch.stack(masks)}, tuple(kept)


def to_unit(label: dict, canvas: int) -> dict:
    """The label with boxes as cxcywh in [0, 1] instead of xyxy in pixels."""
    return label | {"boxes": box_convert(label["boxes"], "xyxy", "cxcywh") / canvas}


def _unit_box(box: np.ndarray | None, canvas: int) -> torch.Tensor | None:
    return None if box is None else box_convert(torch.as_tensor(box, dtype=torch.float32), "xyxy", "cxcywh") / canvas
