"""Prediction: pictures and prompts in, detections out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..boxes_sam3_lite import pack_boxes, relative_boxes
from ..configuration_sam3_lite import VISUAL_PHRASE
from ..errors import usable_device
from ..exporting.folder import is_export
from ..exporting.model import ExportedModel
from ..exporting.opening import open_export
from ..modeling_sam3_lite import Sam3LiteModel
from ..processing_sam3_lite import Sam3LiteProcessor, enlarge_masks
from ..reading import ImageInput, read_image
from ..rle import encode_part
from ..sources_sam3_lite import HUB_ARGUMENTS
from ..vocabulary_sam3_lite import check_tokenizer, phrase_features
from .detections import Detections, suppress
from .tiling import Part, Tile, cut_tiles, join_parts

logger = logging.get_logger(__name__)

CANDIDATES_PER_DETECTION = 4  # of an image or tile and PROMPTS_AT_ONCE prompts, before suppression
PROMPTS_AT_ONCE = 16  # that the detector handles: bounds the memory of many prompts


@dataclass
class Prompt:
    """
    What to look for in an image; a prompt by words alone may as well be a `str`.

    Args:
        text: a noun phrase.
        boxes: examples of it, xyxy in pixels of the (upright) image.
        negative_boxes: things that it is not.
        label: its name in the detections. Default: the text, or "visual".
        threshold: its detections have a higher score than this, in [0, 1]. Default: that of the settings.

    Raises:
        ValueError: neither text nor an example, a box that is none, or a threshold outside of its range.
    """

    text: str | None = None
    boxes: Sequence[Sequence[float]] = field(default_factory=list)
    negative_boxes: Sequence[Sequence[float]] = field(default_factory=list)
    label: str | None = None
    threshold: float | None = None

    def __post_init__(self):
        if not (self.text or len(self.boxes)):
            raise ValueError("A prompt needs `text` or at least one of `boxes`.")
        for box in self.all_boxes:
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"The box {list(box)} of a prompt is not left < right, top < bottom in pixels.")
        self.label = self.label or self.phrase
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold`={self.threshold} of the prompt {self.label!r} is outside of 0..1.")

    @property
    def phrase(self) -> str:
        """What the text encoder reads."""
        return self.text or VISUAL_PHRASE

    @property
    def all_boxes(self) -> list[Sequence[float]]:
        return [*self.boxes, *self.negative_boxes]


@dataclass
class PreparedImage:
    """An image on its way to the model: its tiles, and their pixels or that from which to cut them."""

    size: tuple[int, int]  # height, width
    tiles: list[Tile]
    pixel_values: Tensor | None  # (1, 3, side, side) if the image is one tile
    image: Tensor | None  # (3, height, width) uint8 if there are more

    def pixels_of(self, tile: Tile, image_processor) -> Tensor:
        """`(1, 3, side, side)` at the resolution of the model."""
        if self.pixel_values is not None:
            return self.pixel_values
        part = self.image[:, tile.top : tile.bottom, tile.left : tile.right]
        return image_processor(part, return_tensors="pt")["pixel_values"]


@dataclass
class PredictionSettings:
    """
    What decides on the detections, beside model and prompts.

    Args:
        threshold: detections have a higher score than this, in [0, 1].
        mask_threshold: pixels of a mask have a higher probability than this, in [0, 1].
        max_detections: of each image, the best so many; default: all. Before suppression and joining, masks are made
            of the best 4 times as many, so that memory has a limit; fewer are left where more than that coincide.
        nms_iou: of two detections of one label whose masks overlap by more than this, in [0, 1], only the better one
            stays; None: all stay, as SAM 3 does it, which finds more objects twice than such that lie in each other
            (`docs/inference.md` has the scores).
        tile_size: side in pixels of the tiles in which larger images are looked at; default: an image at once.
        tile_overlap: pixels that neighbouring tiles share; default: a quarter of their side.

    Raises:
        ValueError: a value outside of its range; the message names it.
    """

    threshold: float = 0.3
    mask_threshold: float = 0.5
    max_detections: int | None = None
    nms_iou: float | None = 0.7
    tile_size: int | None = None
    tile_overlap: int | None = None

    def __post_init__(self):
        for name in ("threshold", "mask_threshold", "nms_iou"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}`={value} is outside of 0..1.")
        if self.max_detections is not None and self.max_detections < 1:
            raise ValueError(f"`max_detections`={self.max_detections} must be 1 or more, or None for all.")
        if self.tile_size is None:
            if self.tile_overlap is not None:
                raise ValueError("`tile_overlap` needs `tile_size`.")
            return
        if self.tile_size < 2:
            raise ValueError(f"`tile_size`={self.tile_size} must be 2 pixels or more.")
        if self.tile_overlap is None:
            self.tile_overlap = self.tile_size // 4
        if not 0 <= self.tile_overlap < self.tile_size:
            raise ValueError(f"`tile_overlap`={self.tile_overlap} must be 0 or more and less than `tile_size`.")

    def prepare(self, image: ImageInput, image_processor) -> PreparedImage:
        """Decodes and resizes an image; errors as [`read_image`]. Needs no model, so workers can do it ahead."""
        pixels = read_image(image)
        height, width = pixels.shape[1:]
        tiles = cut_tiles(height, width, self.tile_size, self.tile_overlap or 0)
        whole = len(tiles) == 1
        values = image_processor(pixels, return_tensors="pt")["pixel_values"] if whole else None
        return PreparedImage((height, width), tiles, values, None if whole else pixels)


class Question(NamedTuple):
    """A prompt for a tile of an image."""

    image: int  # its place among the images
    size: tuple[int, int]  # height and width of the image
    tile: Tile
    row: int  # of the tile among those that the vision encoder handles with it
    prompt: Prompt


class Sam3LitePipeline:
    """
    A model and its processor as one callable: from pictures and prompts to [`Detections`].

    The vision encoder runs once per image, the text encoder once per distinct phrase, and masks are computed and
    enlarged for kept detections only.

    Example:

    ```python
    >>> from sam3_hf import Prompt, Sam3LitePipeline

    >>> pipe = Sam3LitePipeline.from_pretrained("outputs/demo/final")  # doctest: +SKIP
    >>> found = pipe("photo.jpg", ["red circle", Prompt(boxes=[[10, 10, 50, 60]])])  # doctest: +SKIP
    >>> found.boxes, found.scores, found.labels, found.masks  # doctest: +SKIP
    ```
    """

    def __init__(self, model: Sam3LiteModel | ExportedModel, processor: Sam3LiteProcessor):
        """
        Args:
            model: on the device and in the precision to compute in; set to evaluation mode.
            processor: the one that was saved with it.

        Raises:
            ValueError: the tokenizer is not that of the model.
        """
        check_tokenizer(processor.tokenizer, model.config)
        self.model, self.processor = model.eval(), processor
        self._warned = False  # of what is not finite

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs,
    ) -> Sam3LitePipeline:
        """
        Args:
            pretrained_model_name_or_path: folder or Hub id of a saved model and processor, or of what `sam3-lite
                export` wrote, which its runtime computes; or a `.pt` of Meta's.
            device: default: the GPU if there is one; for an exported model the CPU.
            dtype: fp16, bf16, fp32, or a dtype; default: fp16 on a GPU, fp32 on a CPU, which is slow in fp16. An
                exported model computes in the precision that it was exported in; for OpenVINO it may be bf16.
            kwargs: those of [`Sam3LiteModel.from_pretrained`]. Sizes are those of the checkpoint unless told.
        """
        hub_arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if is_export(pretrained_model_name_or_path, **hub_arguments):
            return cls(*open_export(pretrained_model_name_or_path, device, dtype, **kwargs))
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        kwargs.setdefault("preset", None if kwargs.get("config") is not None else "same")
        model = Sam3LiteModel.from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs).to(device)
        if os.path.isfile(pretrained_model_name_or_path):  # a checkpoint of Meta's
            return cls(model, Sam3LiteProcessor.from_config(model.config))
        processor = Sam3LiteProcessor.from_pretrained(pretrained_model_name_or_path, **hub_arguments)
        if "image_size" in kwargs:
            processor.image_processor = Sam3LiteProcessor.from_config(model.config).image_processor
        return cls(model, processor)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        prompts: str | Prompt | Sequence[str | Prompt] | Sequence[Sequence[str | Prompt]],
        batch_size: int = 4,
        **settings,
    ) -> Detections | list[Detections]:
        """
        Args:
            images: one or a list of what [`read_image`] takes; an array or tensor with four axes is a list.
            prompts: words or [`Prompt`]s: one, or a list for every image, or a list of lists, one per image.
            batch_size: images (or tiles) that the vision encoder handles at once.
            settings: fields of [`PredictionSettings`]: `threshold`, `mask_threshold`, `max_detections`, `nms_iou`,
                `tile_size`, `tile_overlap`.

        Returns:
            One [`Detections`] per image; not in a list if `images` is a single image.

        Raises:
            ValueError: prompts, boxes or settings that cannot be; images that are none.
            OSError: an image is missing or cannot be decoded.
        """
        settings = PredictionSettings(**settings)
        single = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) < 4
        images = [images] if single else list(images)
        prompts = prompts_of_images(prompts, len(images))
        if batch_size < 1:
            raise ValueError(f"`batch_size`={batch_size} must be 1 or more.")
        text = self.text_features([prompt.phrase for own in prompts for prompt in own])
        results = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            prepared = [settings.prepare(image, self.processor.image_processor) for image in images[batch]]
            for image, own in zip(prepared, prompts[batch], strict=True):
                _check_boxes(own, image.size)
            results += self.detect(prepared, prompts[batch], text, settings, batch_size)
        return results[0] if single else results

    def text_features(self, phrases: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """
        The one place where words become features.

        Returns:
            {phrase: (features `(tokens, hidden)`, attention mask `(tokens,)`)}, each distinct phrase encoded once.

        Raises:
            ValueError: a phrase is not in the fixed vocabulary of the model.
        """
        phrases = list(dict.fromkeys(phrases))
        if not phrases:
            return {}
        features, masks = phrase_features(self.model, self.processor, phrases)
        return dict(zip(phrases, zip(features, masks, strict=True), strict=True))

    @torch.no_grad()
    def detect(
        self,
        prepared: Sequence[PreparedImage],
        prompts: Sequence[Sequence[Prompt]],
        text: dict[str, tuple[Tensor, Tensor]],
        settings: PredictionSettings,
        batch_size: int,
    ) -> list[Detections]:
        """
        [`Sam3LitePipeline.__call__`] from prepared images and encoded phrases on, for a loop with its own loader.

        Args:
            prepared: from [`PredictionSettings.prepare`].
            prompts: one list per image.
            text: from [`~Sam3LitePipeline.text_features`], of all phrases in `prompts`.
            batch_size: tiles that the vision encoder handles at once.
        """
        if settings.tile_size is not None and any(prompt.all_boxes for own in prompts for prompt in own):
            raise ValueError("`tile_size` goes with prompts by words: a box would be in some tiles and not in others.")
        parts: list[list[Part]] = [[] for _ in prepared]
        best: list[dict[str, float]] = [{} for _ in prepared]
        views = [(index, tile) for index, image in enumerate(prepared) for tile in image.tiles]
        for start in range(0, len(views), batch_size):
            group = views[start : start + batch_size]
            image_processor = self.processor.image_processor
            pixel_values = torch.cat([prepared[index].pixels_of(tile, image_processor) for index, tile in group])
            vision = self.model.get_vision_features(pixel_values.to(self.model.device, self.model.dtype))
            asked = [
                Question(index, prepared[index].size, tile, row, prompt)
                for row, (index, tile) in enumerate(group)
                for prompt in prompts[index]
            ]
            for first in range(0, len(asked), PROMPTS_AT_ONCE):
                for index, part in self._parts(vision, asked[first : first + PROMPTS_AT_ONCE], text, settings, best):
                    parts[index].append(part)
        with_masks = self.model.config.mask_supervision
        return [
            _finish(own, image, [prompt.label for prompt in asked], settings, with_masks, scores)
            for own, image, asked, scores in zip(parts, prepared, prompts, best, strict=True)
        ]

    def _parts(
        self, vision, asked: list[Question], text, settings: PredictionSettings, best: list[dict[str, float]]
    ) -> Iterator[tuple[int, Part]]:
        """What is found, each with the place of its image. Raises the scores in `best`, by image and label."""
        inputs = self._inputs(asked, text)
        limit = settings.max_detections
        if limit is not None and not (settings.nms_iou is None and settings.tile_size is None):
            limit *= CANDIDATES_PER_DETECTION  # what suppression and joining leave is not known before there are masks
        threshold = self._threshold(asked, settings.threshold)
        found = self.model.find(vision, **inputs, threshold=threshold, max_detections=limit)
        owners, boxes = found.prompt_index.tolist(), found.boxes.float().cpu()
        *scores, finite = torch.cat([found.scores.float(), found.best.float(), found.finite.float()[None]]).tolist()
        if not finite:
            self._warn_of_overflow()
        for question, score in zip(asked, scores[len(owners) :], strict=True):
            own, label = best[question.image], question.prompt.label
            own[label] = max(score, own.get(label, 0.0))
        for _, rows in groupby(range(len(owners)), key=lambda row: asked[owners[row]].row):
            rows = list(rows)
            image, size, tile, _, _ = asked[owners[rows[0]]]
            height, width = tile.bottom - tile.top, tile.right - tile.left
            inside = boxes[rows].clamp(0, 1) * boxes.new_tensor([width, height, width, height])
            if found.mask_logits is None:
                masks = map(_filled, inside)
            else:
                logits = found.mask_logits[rows[0] : rows[-1] + 1]
                masks = enlarge_masks(logits, (height, width), settings.mask_threshold)
            for row, box, (mask, top, left) in zip(rows, inside, masks, strict=True):
                box = box + boxes.new_tensor([tile.left, tile.top, tile.left, tile.top])
                rle = encode_part(mask, tile.top + top, tile.left + left, size)
                yield image, Part(asked[owners[row]].prompt.label, scores[row], box, rle, tile)

    def _threshold(self, asked: list[Question], default: float) -> float | Tensor:
        """The lowest score, or those of each prompt `(prompts, 1)` where one has its own."""
        own = [question.prompt.threshold for question in asked]
        if own.count(None) == len(own):
            return default
        return torch.tensor([[default if one is None else one] for one in own], device=self.model.device)

    def _warn_of_overflow(self):
        if not self._warned:
            logger.warning(
                f"What the model says is not finite in {self.model.dtype}, so that things in the pictures are missed. "
                "Numbers were too large for that precision: load the model with dtype='bfloat16' or 'float32' "
                "(`--dtype` of `sam3-lite predict`)."
            )
        self._warned = True

    def _inputs(self, asked: list[Question], text) -> dict[str, Tensor]:
        """What the model takes for these prompts beside the vision features."""
        features, masks = zip(*(text[question.prompt.phrase] for question in asked), strict=True)
        inputs = {
            "image_index": torch.tensor([question.row for question in asked]),
            "text_embeds": torch.stack(features),
            "attention_mask": torch.stack(masks),
        }
        if any(question.prompt.all_boxes for question in asked):
            boxes = [_relative(question.prompt.all_boxes, question.size) for question in asked]
            prompts = [question.prompt for question in asked]
            labels = [[1] * len(prompt.boxes) + [0] * len(prompt.negative_boxes) for prompt in prompts]
            inputs |= pack_boxes(boxes, labels)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def prompts_of_images(prompts, num_images: int) -> list[list[Prompt]]:
    """
    Prompts as [`Sam3LitePipeline`] takes them, as one list per image.

    Raises:
        ValueError: there are none for an image, or lists for another number of images.
    """
    prompts = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    nested = [not isinstance(prompt, (str, Prompt)) for prompt in prompts]
    if any(nested) and not all(nested):
        raise ValueError("`prompts` mixes prompts with lists: pass one list for all images, or one for each.")
    lists = prompts if any(nested) else [prompts] * num_images
    if len(lists) != num_images:
        raise ValueError(f"`prompts` has lists for {len(lists)} images, there are {num_images}.")
    if not all(len(own) for own in lists):
        raise ValueError("There are no prompts for an image: `prompts` or one of its lists is empty.")
    return [[Prompt(one) if isinstance(one, str) else one for one in own] for own in lists]


def _check_boxes(prompts: list[Prompt], size: tuple[int, int]) -> None:
    """Raises ValueError for a box of a prompt that has nothing of an image of this height and width in it."""
    height, width = size
    for prompt in prompts:
        for left, top, right, bottom in prompt.all_boxes:
            if right <= 0 or bottom <= 0 or left >= width or top >= height:
                box = [float(side) for side in (left, top, right, bottom)]
                raise ValueError(
                    f"The box {box} of the prompt {prompt.label!r} is outside of the picture of {width}x{height}"
                    " pixels: give left, top, right, bottom in pixels of the upright picture."
                )


def _relative(boxes: list[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Boxes of a prompt as `(n, 4)` cxcywh in [0, 1]."""
    corners = [[float(value) for value in box] for box in boxes]
    return relative_boxes(torch.tensor(corners, dtype=torch.float64).reshape(-1, 4), size)


def _filled(box: Tensor) -> tuple[Tensor, int, int]:
    """The pixels of a box as `enlarge_masks` gives those of a mask, to compare detections of a model without masks."""
    left, top = box[:2].floor().int().tolist()
    right, bottom = box[2:].ceil().int().tolist()
    return torch.ones((max(bottom - top, 0), max(right - left, 0)), dtype=torch.bool), top, left


def _finish(
    parts: list[Part],
    image: PreparedImage,
    labels: list[str],
    settings: PredictionSettings,
    with_masks: bool,
    best: dict[str, float],
) -> Detections:
    if len(image.tiles) > 1:
        parts = join_parts(parts)
    parts = sorted(parts, key=lambda part: -part.score)
    if settings.nms_iou is not None:
        kept = suppress([part.label for part in parts], [part.rle for part in parts], settings.nms_iou)
        parts = [parts[index] for index in kept]
    parts = parts[: settings.max_detections]
    return Detections(
        boxes=torch.stack([part.box for part in parts]) if parts else torch.zeros(0, 4),
        scores=torch.tensor([part.score for part in parts]),
        labels=[part.label for part in parts],
        rle=[part.rle for part in parts] if with_masks else None,
        size=image.size,
        prompts=list(dict.fromkeys(labels)),
        best=best,
    )
