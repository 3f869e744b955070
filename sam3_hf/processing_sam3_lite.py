"""Processor of Sam3Lite: images, prompts and annotations in; detections out."""

from __future__ import annotations

import gzip
import html
import os
from collections.abc import Iterator
from pathlib import Path

import ftfy
import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchFeature,
    CLIPTokenizer,
    Sam2VideoVideoProcessor,
    Sam3ImageProcessor,
    Sam3Processor,
    Sam3VideoProcessor,
)
from transformers.utils import cached_file, logging

from .boxes_sam3_lite import pack_boxes, relative_boxes
from .configuration_sam3_lite import BOX_PADDING_LABEL, MAX_TOKENS, VISUAL_PHRASE, context_length
from .sources_sam3_lite import HUB_ARGUMENTS, config_fields
from .vocabulary_sam3_lite import check_tokenizer, remember_phrases

logger = logging.get_logger(__name__)

# Merges of CLIP's byte-pair encoding, most frequent first, one a line.
_MERGES_FILE = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
# Either of these is a tokenizer. Without them Transformers makes an empty one, to which all phrases are the same.
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# Masks are enlarged in bands of so many pixels: only their booleans are ever as large as the image.
_PIXELS_AT_ONCE = 2**20
# Their cells are looked at together, which on a GPU is one wait for so many of them.
_MASKS_AT_ONCE = 32


def clip_tokenizer(vocab_size: int = 49408) -> CLIPTokenizer:
    """
    CLIP's tokenizer, built without the Hub.

    Args:
        vocab_size: 49408 is the whole vocabulary. A smaller one keeps the 512 byte tokens, the most frequent merges
            and the two special tokens, so that any text still has an encoding, only a longer one.

    Raises:
        ValueError: `vocab_size` is not in 514..49408.
    """
    with gzip.open(_MERGES_FILE, "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()
    largest = 512 + len(merges) + 2
    if not 514 <= vocab_size <= largest:
        raise ValueError(f"`vocab_size`={vocab_size} is outside 514..{largest}, what CLIP's vocabulary can give.")
    merges = merges[: vocab_size - 514]
    byte_tokens = _byte_characters()
    tokens = byte_tokens + [token + "</w>" for token in byte_tokens]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def clean_phrase(phrase: str) -> str:
    """
    A phrase as SAM 3 was trained to read it: mojibake, curly quotes and full-width letters mended, HTML entities
    replaced, white space single, letters small (`sam3/model/tokenizer_ve.py` of facebookresearch/sam3).
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(phrase))).split()).lower()


def tokenize(tokenizer, phrases: list[str]) -> dict[str, Tensor]:
    """
    {"input_ids", "attention_mask"}, each `(phrases, tokens)` int64: cleaned, padded to [`num_tokens`] of them, and cut
    where too long. The mask is 0 for padding, and for token 0 ("!" in the middle of a word), with which SAM 3 pads.
    """
    tokens = tokenizer(
        [clean_phrase(phrase) for phrase in phrases],
        padding="max_length",
        truncation=True,
        max_length=num_tokens(tokenizer),
        split_special_tokens=True,  # "<|endoftext|>" in a phrase is text
        return_tensors="pt",
    )
    ids = tokens["input_ids"]
    mask = tokens["attention_mask"] * (ids != 0)
    remember_phrases(phrases, ids, mask)
    return {"input_ids": ids, "attention_mask": mask}


def num_tokens(tokenizer) -> int:
    """How many tokens a phrase is padded or cut to: as many as the text encoder of its model reads."""
    return min(tokenizer.model_max_length, MAX_TOKENS)


def _for_model(tokenizer, config):
    """The tokenizer, set to as many tokens as the text encoder of this configuration reads."""
    length = context_length(config.text_config)
    if num_tokens(tokenizer) != length:
        tokenizer.model_max_length = length
    return tokenizer


def _byte_characters() -> list[str]:
    """One printable character per byte in the order of CLIP's vocabulary (byte-level BPE of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


class Sam3LiteProcessor(Sam3Processor):
    """
    Prepares images, prompts and annotations for [`Sam3LiteModel`], and turns its output into detections.

    Unlike [`Sam3Processor`] it takes several prompts per image, cuts prompts that are too long instead of failing in
    the model, and enlarges only the masks of kept detections, as booleans.
    """

    def __init__(
        self, image_processor, tokenizer, target_size: int | None = None, point_pad_value: int = BOX_PADDING_LABEL
    ):
        super().__init__(image_processor, tokenizer, target_size=target_size, point_pad_value=point_pad_value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Sam3LiteProcessor:
        """
        As [`~ProcessorMixin.from_pretrained`].

        Raises:
            OSError: there is no such folder or repository, or it has no tokenizer, or that is not known offline.
        """
        source = pretrained_model_name_or_path
        hub_arguments = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if not cls.has_tokenizer(source, **hub_arguments):
            if _may_have_tokenizer(source, **hub_arguments):
                raise OSError(
                    f"{source}: its tokenizer is not on this machine, and the Hub cannot be asked for it: connect, or "
                    "copy its tokenizer.json from where it is."
                )
            raise OSError(
                f"{source} has no tokenizer: tokenizer.json is missing. Copy it from the model that this one was made "
                "of; CLIP's is written by `Sam3LiteProcessor.from_config(model.config).save_pretrained(folder)`."
            )
        return super().from_pretrained(source, **kwargs)

    @classmethod
    def from_config(cls, config) -> Sam3LiteProcessor:
        """
        The processor of a model with this configuration, made without the Hub: images at `config.image_size`, CLIP's
        tokenizer cut to `config.text_config.vocab_size`, phrases of as many tokens as its text encoder reads.
        """
        tokenizer = clip_tokenizer(config.text_config.vocab_size)
        return cls(_image_processor(config), _for_model(tokenizer, config))

    @classmethod
    def of_source(cls, source: str | os.PathLike | None, config, **hub_arguments) -> Sam3LiteProcessor:
        """
        The processor of a model with this configuration, whose weights come from `source`: as [`from_config`], but
        with the tokenizer of the source, which the words were learnt with, if it has one of its own.

        Args:
            source: what [`~Sam3LiteModel.from_pretrained`] takes, or `None`.
            hub_arguments: `revision`, `token`, ... as there.

        Raises:
            ValueError: the tokenizer is not that of the model, or damaged.
        """
        if source is None or os.path.isfile(source):
            return cls.from_config(config)
        if not cls.has_tokenizer(source, **hub_arguments):
            if _may_have_tokenizer(source, **hub_arguments):
                logger.warning_once(
                    f"{source}: its tokenizer is not on this machine, and the Hub cannot be asked for it: its words "
                    "are read with CLIP's. If it has another one, load its processor once with a connection."
                )
            return cls.from_config(config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **hub_arguments)
        except Exception as error:  # of any type, as a damaged file may be
            raise ValueError(
                f"{source}: its tokenizer cannot be read ({type(error).__name__}: {error}): get its files again."
            ) from error
        check_tokenizer(tokenizer, config)
        return cls(_image_processor(config), _for_model(tokenizer, config))

    @classmethod
    def of_origin(cls, source: str | os.PathLike | None, config, **hub_arguments) -> Sam3LiteProcessor:
        """
        As [`of_source`], for a model that was loaded before: its source may be gone, which gives a warning and CLIP's
        tokenizer.
        """
        try:
            there = not source or os.path.exists(source) or config_fields(source, **hub_arguments) is not None
        except (OSError, ValueError):
            there = False
        if there:
            return cls.of_source(source or None, config, **hub_arguments)
        logger.warning(
            f"{source}, which the model came from, cannot be read any more: its words are read with CLIP's tokenizer. "
            "If it had another one, pass or copy that."
        )
        return cls.from_config(config)

    def to_video(self) -> Sam3VideoProcessor:
        """The processor of films, with its sessions, that goes with the same model as this one."""
        image_processor = self.image_processor
        frames = Sam2VideoVideoProcessor(
            size=dict(image_processor.size), image_mean=image_processor.image_mean, image_std=image_processor.image_std
        )
        return Sam3VideoProcessor(image_processor, frames, self.tokenizer)

    @staticmethod
    def has_tokenizer(source: str | os.PathLike, **hub_arguments) -> bool:
        """Whether a folder or Hub repository has a tokenizer of its own."""

        def has(name: str) -> bool:
            return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments) is not None

        return any(all(map(has, names)) for names in _TOKENIZER_FILES)

    def __call__(
        self,
        images=None,
        text: str | list[str | None] | list[list[str]] | None = None,
        input_boxes: list | Tensor | None = None,
        input_boxes_labels: list | Tensor | None = None,
        annotations: list[dict] | None = None,
        original_sizes: list | Tensor | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list: PIL, array or tensor (uint8 0..255 or what `Sam3ImageProcessor` takes).
            text: the prompts: one for all images, one per image (`None` where only boxes prompt), or a list of lists,
                several per image.
            input_boxes: box prompts, `[prompt][box][4]`, xyxy in pixels of the original image; `None` for prompts
                without boxes. With one prompt per image this is `[image][box][4]`, as in [`Sam3Processor`].
            input_boxes_labels: `[prompt][box]`, 1 positive, 0 negative. All positive by default.
            annotations: one dict per prompt, for training: `boxes` `(n, 4)` xyxy in pixels of the original image, and
                optionally `masks` `(n, height, width)` bool.
            original_sizes: (height, width) of each image, where `images` is not passed.
            return_tensors: "pt".

        Returns:
            What [`Sam3LiteModel`] takes: `pixel_values`, `original_sizes`, `input_ids`, `attention_mask`;
            `image_index` with several prompts per image; `input_boxes` (cxcywh in [0, 1]) and `input_boxes_labels`
            with boxes; `labels` with annotations.

        Raises:
            ValueError: the numbers of images, prompts, boxes and annotations do not match.
        """
        encoding = BatchFeature({})
        if images is not None:
            encoding.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        elif original_sizes is not None:
            encoding["original_sizes"] = torch.as_tensor(original_sizes)
        sizes = [tuple(int(side) for side in size) for size in encoding.get("original_sizes", [])]
        if input_boxes is not None and not len(input_boxes):
            input_boxes = None

        prompts, image_index = _flatten_prompts(text, len(sizes))
        if prompts is None and input_boxes is not None:
            prompts = [None] * len(input_boxes)
        if prompts is None:
            return encoding
        if image_index is not None:
            encoding["image_index"] = torch.tensor(image_index)
        prompt_sizes = _sizes_of_prompts(sizes, image_index, len(prompts))
        encoding.update(self._tokenize(prompts, input_boxes))
        if input_boxes is not None:
            if len(input_boxes) != len(prompts):
                raise ValueError(f"`input_boxes` has {len(input_boxes)} entries for {len(prompts)} prompts.")
            encoding.update(self._pack_boxes(input_boxes, input_boxes_labels, prompt_sizes))
        if annotations is not None:
            if len(annotations) != len(prompts):
                raise ValueError(f"`annotations` has {len(annotations)} entries for {len(prompts)} prompts.")
            encoding["labels"] = [
                _label(annotation, size) for annotation, size in zip(annotations, prompt_sizes, strict=True)
            ]
        return encoding

    def _tokenize(self, prompts: list[str | None], input_boxes) -> dict[str, Tensor]:
        for index, prompt in enumerate(prompts):
            if prompt is None and (input_boxes is None or input_boxes[index] is None):
                raise ValueError(f"Prompt {index} has neither text nor boxes.")
        words = [VISUAL_PHRASE if prompt is None else prompt for prompt in prompts]
        tokens, longest = tokenize(self.tokenizer, words), num_tokens(self.tokenizer)
        cut_or_full = tokens["input_ids"][:, -1] == self.tokenizer.eos_token_id
        for index in cut_or_full.nonzero().flatten().tolist():
            if len(self.tokenizer(clean_phrase(words[index]))["input_ids"]) > longest:
                logger.warning(f"The prompt {words[index]!r} is longer than {longest} tokens and was cut.")
        return tokens

    def _pack_boxes(self, boxes, labels, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The boxes of all prompts, relative to their images."""
        relative = [
            None if own is None or not len(own) else _relative_cxcywh(torch.as_tensor(own, dtype=torch.float32), size)
            for own, size in zip(boxes, sizes, strict=True)
        ]
        return pack_boxes(relative, labels, self.point_pad_value)

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.3,
        mask_threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        Args:
            outputs: output of [`Sam3LiteModel`] with masks.
            threshold: lowest score, in [0, 1].
            mask_threshold: lowest mask probability, in [0, 1].
            target_sizes: `(height, width)` of the image of each prompt. Without it, boxes are in [0, 1] and masks at
                the model's resolution.

        Returns:
            One dict per prompt: `scores` `(n,)`, `boxes` `(n, 4)` xyxy clamped to the image, `masks`
            `(n, height, width)` bool.

        Raises:
            ValueError: as many sizes as prompts are needed; or the output has no masks.
        """
        if outputs.pred_masks is None:
            raise ValueError("The output has no masks: it comes from a training step. Call `model.eval()` first.")
        num_prompts = len(outputs.pred_logits)
        if target_sizes is not None and len(target_sizes) != num_prompts:
            raise ValueError(f"`target_sizes` has {len(target_sizes)} entries for {num_prompts} prompts.")
        scores = outputs.pred_logits.sigmoid()
        if outputs.presence_logits is not None:
            scores = scores * outputs.presence_logits.sigmoid()
        if not scores.isfinite().all():
            logger.warning(
                f"Scores are not finite in {outputs.pred_logits.dtype}, and such detections are left out. Numbers "
                "were too large for the precision: load the model with dtype='bfloat16' or 'float32'."
            )
        results = []
        for index in range(num_prompts):
            keep = (scores[index] > threshold).nonzero().flatten()
            boxes = outputs.pred_boxes[index][keep].clamp(0, 1)
            masks = outputs.pred_masks[index][keep]
            if target_sizes is None:
                masks = masks.sigmoid() > mask_threshold
            else:
                height, width = (int(side) for side in target_sizes[index])
                boxes = boxes * boxes.new_tensor([width, height, width, height])
                masks = _full_masks(masks, (height, width), mask_threshold)
            results.append({"scores": scores[index][keep], "boxes": boxes, "masks": masks})
        return results


def _may_have_tokenizer(
    source: str | os.PathLike, cache_dir=None, revision: str | None = None, subfolder: str = "", **hub_arguments
) -> bool:
    """
    Whether a repository of which no tokenizer was found may have one all the same: the Hub was not asked for its
    files, as there is no connection, and the cache does not know.
    """
    if os.path.isdir(source):
        return False

    def known_missing(name: str) -> bool:
        name = os.path.join(subfolder or "", name)
        cache = cache_dir or constants.HF_HUB_CACHE
        return try_to_load_from_cache(os.fspath(source), name, cache, revision) is _CACHED_NO_EXIST

    return not all(any(map(known_missing, names)) for names in _TOKENIZER_FILES)


def _image_processor(config) -> Sam3ImageProcessor:
    size = {"height": config.image_size, "width": config.image_size}
    mask_side = config.vision_config.backbone_feature_sizes[0][0]
    return Sam3ImageProcessor(size=size, mask_size={"height": mask_side, "width": mask_side})


def _flatten_prompts(text, num_images: int) -> tuple[list[str | None] | None, list[int] | None]:
    """Prompts in one list, and the image of each where there are several per image."""
    if text is None:
        return None, None
    if isinstance(text, str):
        return [text] * max(num_images, 1), None
    if not any(isinstance(prompts, (list, tuple)) for prompts in text):
        return list(text), [0] * len(text) if num_images == 1 < len(text) else None
    if num_images and len(text) != num_images:
        raise ValueError(f"`text` has prompts for {len(text)} images, `images` has {num_images}.")
    groups = [[prompts] if isinstance(prompts, str) else list(prompts) for prompts in text]
    image_index = [index for index, group in enumerate(groups) for _ in group]
    return [prompt for group in groups for prompt in group], image_index


def _sizes_of_prompts(sizes: list, image_index: list[int] | None, num_prompts: int) -> list:
    """(height, width) of the image of each prompt; empty where no image was passed."""
    if not sizes:
        return [(None, None)] * num_prompts
    if image_index is not None:
        return [sizes[index] for index in image_index]
    if len(sizes) != num_prompts:
        raise ValueError(
            f"{num_prompts} prompts for {len(sizes)} images: pass one list of prompts per image, such as "
            '`text=[["cat", "dog"], ["car"]]`.'
        )
    return sizes


def _relative_cxcywh(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`(n, 4)` xyxy pixels to cxcywh in [0, 1]."""
    if size[0] is None:
        raise ValueError("Boxes need `images` or `original_sizes`.")
    return relative_boxes(boxes, size)


def _label(annotation: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    if "boxes" not in annotation:
        raise ValueError(f"An annotation needs `boxes`; this one has {sorted(annotation)}.")
    boxes = torch.as_tensor(annotation["boxes"], dtype=torch.float32).reshape(-1, 4)
    label = {"boxes": _relative_cxcywh(boxes, size)}
    if annotation.get("masks") is not None:
        masks = torch.as_tensor(annotation["masks"]).bool()
        if masks.ndim != 3 or len(masks) != len(boxes):
            raise ValueError(f"`masks` of shape {tuple(masks.shape)} do not go with {len(boxes)} boxes.")
        label["masks"] = masks
    return label


def enlarge_masks(logits: Tensor, size: tuple[int, int], threshold: float) -> Iterator[tuple[Tensor, int, int]]:
    """
    Masks at the size of the image, one at a time, each as the rectangle outside of which it is empty: time and memory
    go with the area of the object. Probabilities are interpolated, as in `Sam3Processor`.

    Args:
        logits: `(n, h, w)` float.
        size: height and width of the image.
        threshold: lowest mask probability, in [0, 1].

    Yields:
        Mask `(rows, columns)` bool on the device of `logits`, and the row and column of its first pixel.
    """
    vertical = _interpolation(size[0], logits.shape[1], logits.device)
    horizontal = _interpolation(size[1], logits.shape[2], logits.device)
    for some in logits.split(_MASKS_AT_ONCE):
        probabilities = some.float().sigmoid()
        inside = probabilities > threshold
        # What lies between cells that are all below the threshold is below it.
        top, bottom = _reach(inside.any(2), *vertical[:2])
        left, right = _reach(inside.any(1), *horizontal[:2])
        limits = torch.stack([top, bottom, left, right], dim=1).tolist()
        for cells, (y1, y2, x1, x2) in zip(probabilities, limits, strict=True):
            rows = [table[y1:y2] for table in vertical]
            columns = [table[x1:x2] for table in horizontal]
            yield _enlarge(cells, rows, columns, threshold), y1, x1


def _enlarge(cells: Tensor, rows: list[Tensor], columns: list[Tensor], threshold: float) -> Tensor:
    """Where the interpolated `(h, w)` cells exceed the threshold, at the pixels whose `_interpolation` is given."""
    (low_y, high_y, weight_y), (low_x, high_x, weight_x) = rows, columns
    mask = torch.empty((len(low_y), len(low_x)), dtype=torch.bool, device=cells.device)
    band = max(1, _PIXELS_AT_ONCE // max(len(low_x), 1))
    wide = torch.lerp(cells[:, low_x], cells[:, high_x], weight_x)  # (h, columns)
    for start in range(0, len(low_y), band):
        part = slice(start, start + band)
        mask[part] = torch.lerp(wide[low_y[part]], wide[high_y[part]], weight_y[part, None]) > threshold
    return mask


def _interpolation(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of a side the cells before and behind it, and the weight of the latter, as `F.interpolate`."""
    position = (torch.arange(pixels, device=device) + 0.5) * (cells / pixels) - 0.5
    position = position.clamp(min=0)
    low = position.long().clamp(max=cells - 1)
    return low, (low + 1).clamp(max=cells - 1), position - low


def _reach(inside: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel and end `(n,)` of those that any cell `inside` `(n, cells)` has a share in; equal if none is."""
    first = inside.int().argmax(1)
    last = inside.shape[1] - 1 - inside.flip(1).int().argmax(1)
    start, end = torch.searchsorted(high, first), torch.searchsorted(low, last, right=True)
    return start, torch.where(inside.any(1), end, start)


def _full_masks(logits: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """`(n, h, w)` logits to `(n, height, width)` booleans."""
    masks = torch.zeros((len(logits), *size), dtype=torch.bool, device=logits.device)
    for mask, (part, top, left) in zip(masks, enlarge_masks(logits, size, threshold), strict=True):
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return masks


__all__ = ["Sam3LiteProcessor", "clip_tokenizer", "enlarge_masks"]
