"""A model whose parts are graphs, in the place of a `Sam3LiteModel`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from ..configuration_sam3_lite import BOX_PADDING_LABEL, context_length
from ..outputs_sam3_lite import (
    Prompts,
    Sam3LiteFindings,
    Sam3LiteOutput,
    Sam3LiteVisionOutput,
    assign_images,
    check_boxes,
    choose_queries,
)
from ..precision_sam3_lite import precision_name
from ..presets_sam3_lite import LITE_TEXT
from ..text_sam3_lite import TOKEN_BLOCK
from ..vocabulary_sam3_lite import Sam3LiteVocabulary
from .engines import OnnxRuntimeGraph, OpenVinoGraph
from .folder import VOCABULARY_FILE, Export
from .graphs import LEVELS

# Bytes of fine pixel features of the prompts that a graph gets at once, in float32: of four prompts at 1008 px.
PIXELS_AT_ONCE = 4 * 288 * 288 * 256 * 4
# Side of the input from which on ONNX Runtime gives the memory of a graph back before the next one asks for its own.
# `lite` in int8 at 1008 px then takes 1.6 GB instead of 3.0 without PyTorch, and 3% more time; at 336 px 10% more.
HANDS_BACK_FROM = 672


class ExportedModel(nn.Module):
    """
    What [`Sam3LitePipeline`] and `evaluate` ask a [`Sam3LiteModel`] for, from the graphs of a folder. Each graph is
    loaded when it is first needed. Tensors are on the CPU; those that are handed out are float32, but for vision
    features.

    Args:
        export: from [`read_export`].
        device: "cpu", or what the runtime calls another one.
        dtype: float32, or with OpenVINO bfloat16: what it computes in.

    Attributes:
        runs_on: the device of the runtime, while `device` is that of the tensors.

    Raises:
        ValueError: a precision that the runtime does not take, or a file that it cannot read.
    """

    def __init__(self, export: Export, device: str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        if dtype not in (torch.float32, *([torch.bfloat16] if export.format == "openvino" else [])):
            raise ValueError(
                f"{export.folder} computes in the precision that it was exported in ({export.precision}), `dtype` "
                f"{precision_name(dtype)} is not for it: leave it out, or export with another --precision."
            )
        self.export, self.config = export, export.config
        self.runs_on = device
        self._computed_in = dtype
        if export.format == "openvino":
            runtime = partial(OpenVinoGraph, bfloat16=dtype == torch.bfloat16)
        else:
            hands_back = device == "cpu" and export.config.image_size >= HANDS_BACK_FROM
            runtime = partial(OnnxRuntimeGraph, hands_back=hands_back)
        self._open = partial(runtime, device=device, threads=torch.get_num_threads())
        self._graphs: dict[str, Callable[..., list[Tensor]]] = {}
        self.vocabulary = None if self.config.vocabulary is None else _read_vocabulary(export)

    device, dtype = torch.device("cpu"), torch.float32

    @property
    def precision(self) -> str:
        """That of the export, or bf16."""
        return self.export.precision if self._computed_in == torch.float32 else precision_name(self._computed_in)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all files."""
        return self.export.fingerprint

    def run(self, name: str, **inputs: Tensor) -> list[Tensor]:
        """The outputs of a graph."""
        if name not in self._graphs:
            self._graphs[name] = self._open(self.export.graph(name))
        return self._graphs[name](**inputs)

    def get_vision_features(self, pixel_values: Tensor) -> Sam3LiteVisionOutput:
        """As [`~Sam3LiteModel.get_vision_features`]; there is no `last_hidden_state`."""
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"`pixel_values` has size {tuple(pixel_values.shape[-2:])}, this model was exported for ({size}, "
                f"{size}): use its processor, or export it with --image-size."
            )
        levels = tuple(self.run("vision", pixel_values=pixel_values))
        return Sam3LiteVisionOutput(fpn_hidden_states=levels, summary=self._summary(levels[-1]))

    def _summary(self, coarse: Tensor) -> Tensor | None:
        """The summary tokens of the images, `(images, 1, hidden)`: what a box that is padding leaves."""
        if not self.config.summary_token:
            return None
        count = len(coarse)
        labels = torch.full((count, 1), BOX_PADDING_LABEL)
        boxes, owner = torch.zeros(count, 1, 4), torch.arange(count)
        (shown,) = self.run("boxes", input_boxes=boxes, input_boxes_labels=labels, coarse=coarse, image_index=owner)
        return shown[:, 1:]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """As [`~Sam3LiteModel.get_text_features`]; there is no `last_hidden_state`."""
        if self.vocabulary is not None:
            return BaseModelOutputWithPooling(pooler_output=self.vocabulary(input_ids, attention_mask))
        num_tokens = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        config, longest = self.config.text_config, int((mask != 0).nonzero()[:, 1].max()) + 1
        if config.model_type == LITE_TEXT:  # whose tokens see all others: as `Sam3LiteMobileTextEncoder`
            length = context_length(config)
            ids = F.pad(input_ids, (0, length - num_tokens))
            mask = F.pad(mask, (0, length - num_tokens))
            ids = ids.where(mask != 0, config.vocab_size - 1)
            (features,) = self.run("text", input_ids=ids, attention_mask=mask)
        else:
            length = min(-(-longest // TOKEN_BLOCK) * TOKEN_BLOCK, num_tokens)
            (features,) = self.run("text", input_ids=input_ids[:, :length])
        return BaseModelOutputWithPooling(pooler_output=F.pad(features.float(), (0, 0, 0, num_tokens - length)))

    def forward(
        self,
        vision_embeds: Sam3VisionEncoderOutput,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_boxes_labels: Tensor | None = None,
        labels: list | None = None,
    ) -> Sam3LiteOutput:
        """As [`~Sam3LiteModel.forward`], without losses and `semantic_seg`; `labels` are not read."""
        vision = vision_embeds
        asked = self._prompts(vision, image_index, text_embeds, attention_mask, input_boxes, input_boxes_labels)
        found = self._detect(vision, asked)
        masks = None
        if self.config.mask_supervision:
            rows = torch.arange(len(asked.image_index))
            every = torch.arange(found["queries"].shape[1]).expand(len(rows), -1)
            masks = torch.cat(list(self._masks(vision, asked, found, rows, every)))
        return Sam3LiteOutput(pred_masks=masks, **_predictions(found))

    @torch.no_grad()
    def find(
        self,
        vision_embeds: Sam3VisionEncoderOutput,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_index: Tensor,
        input_boxes: Tensor | None = None,
        input_boxes_labels: Tensor | None = None,
        threshold: float | Tensor = 0.3,
        max_detections: int | None = None,
    ) -> Sam3LiteFindings:
        """As [`~Sam3LiteModel.find`]."""
        vision = vision_embeds
        asked = self._prompts(vision, image_index, text_embeds, attention_mask, input_boxes, input_boxes_labels)
        found = self._detect(vision, asked)
        output = Sam3LiteOutput(**_predictions(found))
        chosen = choose_queries(output, asked.image_index, threshold, max_detections)
        masks = None
        if self.config.mask_supervision:
            masks = self._masks_of(vision, asked, found, chosen.prompt, chosen.query)
        return chosen.findings(output.pred_boxes, masks)

    def _prompts(self, vision, image_index, text, text_mask, boxes, labels) -> Prompts:
        if boxes is not None:
            labels = check_boxes(boxes, labels)
        return assign_images(len(vision.fpn_hidden_states[0]), image_index, text, text_mask.bool(), boxes, labels)

    def _detect(self, vision, asked: Prompts) -> dict[str, Tensor]:
        """What the detector says of the prompts, and what it was told of them."""
        coarse, owner = vision.fpn_hidden_states[2], asked.image_index
        prompt, mask = asked.text, asked.text_mask
        shown = shown_mask = None  # what the box encoder adds to the words
        if asked.input_boxes is not None:
            labels = asked.input_boxes_labels
            (shown,) = self.run(
                "boxes", input_boxes=asked.input_boxes, input_boxes_labels=labels, coarse=coarse, image_index=owner
            )
            valid = labels != BOX_PADDING_LABEL
            summed_up = valid.any(1, keepdim=True) | self.config.summary_token
            shown_mask = torch.cat([valid, summed_up], dim=1)
        elif vision.summary is not None:
            shown = vision.summary[owner]
            shown_mask = torch.ones(shown.shape[:2], dtype=torch.bool)
        if shown is not None:
            prompt = torch.cat([prompt.float(), shown.float()], dim=1)
            mask = torch.cat([mask, shown_mask], dim=1)
        given = {"prompt": prompt, "prompt_mask": mask}
        names = ("boxes", "logits", "presence_logits", "queries", "encoded")
        parts = []
        for some in torch.arange(len(owner)).split(self._prompts_at_once(vision.fpn_hidden_states[0])):
            images, own = owner[some].unique(return_inverse=True)
            asked_now = {name: tensor[some] for name, tensor in given.items()}
            parts.append(self.run("detector", coarse=coarse[images], image_index=own, **asked_now))
        return {**given, **dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))}

    def _masks_of(self, vision, asked: Prompts, found: dict, prompt: Tensor, query: Tensor) -> Tensor:
        """Mask logits `(matches, h, w)` of single queries; `prompt` and `query` `(matches,)`, sorted by prompt."""
        fine = vision.fpn_hidden_states[0]
        if not len(prompt):
            return torch.zeros(0, *fine.shape[-2:])
        rows, counts = prompt.unique(return_counts=True)
        # The graph takes as many queries of each prompt: those with fewer repeat one.
        place = torch.arange(int(counts.max()))
        last = counts.cumsum(0) - 1
        columns = query[torch.minimum(last[:, None], (last - counts + 1)[:, None] + place)]
        own = (place < counts[:, None]).split(self._prompts_at_once(fine))
        masks = self._masks(vision, asked, found, rows, columns)
        return torch.cat([mask[kept] for mask, kept in zip(masks, own, strict=True)])

    def _masks(self, vision, asked: Prompts, found: dict, rows: Tensor, queries: Tensor):
        """Yields mask logits `(some, queries, h, w)` of prompts `rows` `(n,)`, by their queries `(n, queries)`."""
        levels = vision.fpn_hidden_states
        step = self._prompts_at_once(levels[0])
        for own, columns in zip(rows.split(step), queries.split(step), strict=True):
            images, owner = asked.image_index[own].unique(return_inverse=True)
            maps = levels if len(images) == len(levels[0]) else [level[images] for level in levels]
            (masks,) = self.run(
                "masks",
                **dict(zip(LEVELS, maps, strict=True)),
                encoded=found["encoded"][own],
                prompt=found["prompt"][own],
                prompt_mask=found["prompt_mask"][own],
                image_index=owner,
                queries=found["queries"][own[:, None], columns],
            )
            yield masks

    @staticmethod
    def _prompts_at_once(fine: Tensor) -> int:
        return max(1, PIXELS_AT_ONCE // (fine[0].numel() * 4))


def precision_of(model: nn.Module, autocast: str | None = None) -> str:
    """
    What a model computes in: fp32, fp16 or bf16; of an `ExportedModel` its own, as int8.

    Args:
        autocast: the precision of products where it is not that of the weights.
    """
    if isinstance(model, ExportedModel):
        return model.precision
    return precision_name(autocast or model.dtype)


def _predictions(found: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"pred_boxes": "boxes", "pred_logits": "logits", "presence_logits": "presence_logits"}
    return {name: found[own] for name, own in names.items()}


def _read_vocabulary(export: Export) -> Sam3LiteVocabulary:
    config = export.config
    hidden, tokens = config.detr_encoder_config.hidden_size, context_length(config.text_config)
    vocabulary = Sam3LiteVocabulary(config.vocabulary, hidden, tokens)
    path = export.folder / VOCABULARY_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            vocabulary.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    except (ValueError, RuntimeError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or another model's: export the model again. ({error})") from error
    return vocabulary
