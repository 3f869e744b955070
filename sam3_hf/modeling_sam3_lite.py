"""PyTorch Sam3Lite model: SAM 3 at any size, one vision pass per image, and a training loss."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Sam3LiteTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import (
    Sam3DotProductScoring,
    Sam3Model,
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
    box_cxcywh_to_xyxy,
)
from transformers.utils import can_return_tuple

from .configuration_sam3_lite import BOX_PADDING_LABEL, Sam3LiteConfig, check_vocabulary, context_length
from .detr_sam3_lite import Sam3LiteDetrDecoder, Sam3LiteDetrEncoder, Sam3LiteGeometryEncoder, additive_mask
from .loading_sam3_lite import Sam3LitePreTrainedModel, needs_package
from .masks_sam3_lite import Sam3LiteMaskDecoder
from .outputs_sam3_lite import (
    DetectorOutput,
    Prompts,
    Sam3LiteFindings,
    Sam3LiteOutput,
    Sam3LiteVisionOutput,
    assign_images,
    check_boxes,
    choose_queries,
    refuse_arguments,
)
from .passes_sam3_lite import TrainingPass
from .text_sam3_lite import build_text_encoder
from .vision_sam3_lite import Sam3LiteVisionModel
from .vocabulary_sam3_lite import Sam3LiteVocabulary

# `find` runs the mask head for so many prompts at once: each has an 85 MB map at 1008 px in float32.
PROMPTS_SEGMENTED_AT_ONCE = 4


class Sam3LiteModel(Sam3LitePreTrainedModel):
    """
    Finds and segments every instance of a concept named by text or shown by boxes.

    Parameter names are those of [`Sam3Model`]. Parameters that no output of SAM 3 depends on (the fourth FPN level,
    the text encoder's own projection, the third stage of the pixel decoder) do not exist here.

    With a fixed vocabulary (`config.vocabulary`, see [`~Sam3LiteModel.freeze_vocabulary`]) there is no text encoder,
    but `vocabulary`: prompts are then its phrases or their ids, and all inputs of the full model stay valid.

    Example:

    ```python
    >>> import torch
    >>> from sam3_hf import Sam3LiteConfig, Sam3LiteModel

    >>> model = Sam3LiteModel(Sam3LiteConfig.from_preset("tiny")).eval()
    >>> tokens = torch.randint(0, 1024, (3, 8))
    >>> outputs = model(pixel_values=torch.zeros(1, 3, 128, 128), input_ids=tokens)  # one image, three prompts
    >>> outputs.pred_boxes.shape
    torch.Size([3, 50, 4])
    ```
    """

    input_modalities = ["image", "text"]

    def __init__(self, config: Sam3LiteConfig):
        config.validate_architecture()
        super().__init__(config)
        self.vision_encoder = Sam3LiteVisionModel(config.vision_config)
        hidden_size = config.detr_encoder_config.hidden_size
        self.text_encoder = self.text_projection = self.vocabulary = None
        if config.vocabulary is None:
            self.text_encoder = build_text_encoder(config.text_config)
            self.text_projection = nn.Linear(config.text_config.hidden_size, hidden_size)
        else:
            num_tokens = context_length(config.text_config)
            self.vocabulary = Sam3LiteVocabulary(config.vocabulary, hidden_size, num_tokens)

        parts = ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
        for part in parts:
            getattr(config, f"{part}_config")._attn_implementation = config._attn_implementation
        self.geometry_encoder = Sam3LiteGeometryEncoder(config.geometry_encoder_config)
        self.detr_encoder = Sam3LiteDetrEncoder(config.detr_encoder_config)
        self.detr_decoder = Sam3LiteDetrDecoder(config.detr_decoder_config)
        self.mask_decoder = Sam3LiteMaskDecoder(config.mask_decoder_config)
        self.dot_product_scoring = Sam3DotProductScoring(config)
        self.vision_position = Sam3SinePositionEmbedding(num_position_features=hidden_size // 2, normalize=True)
        self._compiled_detect: Callable | None = None
        self.post_init()

    def to_sam3(self) -> Sam3Model | Sam3LiteTextModel:
        """
        The same model as a stock [`Sam3Model`], or with a text encoder of SAM3-LiteText [`Sam3LiteTextModel`], whose
        saved folder Transformers loads without this package. The few parameters that only the stock model has, and
        nothing reads, are freshly initialised.

        Outputs are equal but for prompts without boxes of a model with `config.summary_token`: the stock class leaves
        their summary token out, which a warning says. There, a box of label -10 (padding) brings it back.

        Raises:
            ValueError: the model has a fixed vocabulary, for which the stock class has no place.
        """
        if self.vocabulary is not None:
            raise ValueError(
                "A model with a fixed vocabulary has no text encoder, and `Sam3Model` needs one: give it back with "
                "`restore_text_encoder` first."
            )
        try:
            from sam3_hf.checkpoints.stock import to_stock
        except ImportError as error:
            raise needs_package("`to_sam3`") from error
        return to_stock(self)

    def freeze_vocabulary(self, classes: list[str], processor) -> Sam3LiteModel:
        """
        Puts the text features of some phrases into the place of the text encoder, for good: `vocabulary` instead of
        `text_encoder` and `text_projection`. Outputs for these phrases stay what they are; other phrases are errors.
        The features of "visual", which box prompts use, are always kept, also where it is none of the classes.
        `mapping_report` stays that of the model with its text encoder.

        Args:
            classes: the phrases, at least one and none twice; their places in the list are the `class_ids` of
                [`~Sam3LiteModel.forward`]. A model with a vocabulary can be given a part of it, or another order.
            processor: a [`Sam3LiteProcessor`]; its tokenizer is the one that prompts must be made with later.

        Returns:
            The model itself.

        Raises:
            ValueError: no phrases, a blank or repeated one, or one that a vocabulary in place does not have.

        Example:

        ```python
        >>> from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor

        >>> model = Sam3LiteModel(Sam3LiteConfig.from_preset("tiny")).eval()
        >>> processor = Sam3LiteProcessor.from_config(model.config)
        >>> model.freeze_vocabulary(["red blood cell", "platelet"], processor).config.vocabulary
        ['red blood cell', 'platelet']
        ```
        """
        check_vocabulary(classes)
        if self.text_encoder is not None:
            self.text_encoder.eval()
        self.vocabulary = Sam3LiteVocabulary.encode(classes, processor, self)
        self.text_encoder = self.text_projection = None
        self.config.vocabulary = list(classes)
        return self

    def restore_text_encoder(self, source: str | os.PathLike, **hub_arguments) -> Sam3LiteModel:
        """
        Gives a model with a fixed vocabulary a text encoder again: the inverse of
        [`~Sam3LiteModel.freeze_vocabulary`].

        Args:
            source: a checkpoint with the encoder that the vocabulary was made with, of any kind that
                [`~Sam3LiteModel.from_pretrained`] takes. Its vision encoder and detector are not read.
            hub_arguments: `revision`, `token`, `cache_dir`, ... as in `from_pretrained`.

        Returns:
            The model itself.

        Raises:
            ValueError: the model has a text encoder; the source has none, or one with another tokenizer, of another
                projected width, or that gives other features for the phrases of the vocabulary.
            OSError: the source or one of its files is missing or truncated.
        """
        if self.vocabulary is None:
            raise ValueError("The model has a text encoder: there is nothing to restore.")
        try:
            from sam3_hf.checkpoints.text_encoder import read_text_encoder
        except ImportError as error:
            raise needs_package("`restore_text_encoder`") from error
        encoder, projection = read_text_encoder(source, self, **hub_arguments)
        self.text_encoder, self.text_projection, self.vocabulary = encoder, projection, None
        self.config.text_config, self.config.vocabulary = encoder.config, None
        return self

    def compile(self, **kwargs):
        """
        Compiles the vision encoder, the box encoder and the detector in place, each as one graph. Matching, on the
        CPU, stays outside, as does the mask head, whose number of prompts changes from call to call. Copies and
        pickles of the model are not compiled.

        Args:
            kwargs: passed to `torch.compile`. With CUDA graphs (`mode="reduce-overhead"`), call
                `torch.compiler.cudagraph_mark_step_begin()` before each use of the model: it has several graphs.
        """
        self.vision_encoder.compile(**kwargs)
        self.geometry_encoder.compile(**kwargs)
        self._compiled_detect = torch.compile(self.detect, **kwargs)

    def __getstate__(self) -> dict:
        # As `nn.Module` does with what it compiled: a copy that kept it would run the weights of the original.
        return {**super().__getstate__(), "_compiled_detect": None}

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: `(prompts, tokens)` int.
            attention_mask: `(prompts, tokens)`, 1 for tokens, 0 for padding.

        Returns:
            `pooler_output` `(prompts, tokens, hidden)`: what `forward` takes as `text_embeds`. With a fixed vocabulary
            there is no `last_hidden_state`.

        Raises:
            ValueError: a prompt is not in the fixed vocabulary of the model.
        """
        if self.vocabulary is not None:
            return BaseModelOutputWithPooling(pooler_output=self.vocabulary(input_ids, attention_mask))
        outputs = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        features = self.text_projection(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=features)

    def get_vision_features(self, pixel_values: Tensor) -> Sam3LiteVisionOutput:
        """
        Args:
            pixel_values: `(images, 3, height, width)` normalised to mean and standard deviation 0.5.

        Returns:
            What `forward` takes as `vision_embeds`.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"`pixel_values` has size {tuple(pixel_values.shape[-2:])}, this model is configured for "
                f"({size}, {size}): use its processor, or load it with another `image_size`."
            )
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_encoder.parameters())
        # Gradient checkpointing would save what its layers start from, though no weight of it learns.
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = self.vision_encoder(pixel_values)
        return Sam3LiteVisionOutput(**features, summary=self.image_summary(features))

    def image_summary(self, vision_embeds: Sam3VisionEncoderOutput) -> Tensor | None:
        """
        Args:
            vision_embeds: of [`~Sam3LiteModel.get_vision_features`], or of the vision encoder alone.

        Returns:
            The summary tokens of the images, `(images, 1, hidden)`, for prompts without boxes; None if none gets it.
        """
        summary = getattr(vision_embeds, "summary", None)
        # Where phrases do not get it, training makes it all the same: masked, it keeps the box encoder in the graph.
        if summary is None and (self.config.summary_token or self.training):
            coarse = vision_embeds.fpn_hidden_states[2]
            summary = self.geometry_encoder.summarize(coarse, self._position_encoding(coarse))
        return summary

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        vision_embeds: Sam3VisionEncoderOutput | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_embeds: Tensor | BaseModelOutputWithPooling | None = None,
        input_boxes: Tensor | None = None,
        input_boxes_labels: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        prompt_chunk_size: int | None = None,
        original_sizes: Tensor | None = None,
        class_ids: Tensor | None = None,
        criterion: Callable[[TrainingPass], Sam3LiteOutput] | None = None,
        **kwargs,
    ) -> Sam3LiteOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): normalised images. Exactly
                one of this and `vision_embeds`.
            vision_embeds: output of [`~Sam3LiteModel.get_vision_features`].
            input_ids (`torch.LongTensor` of shape `(num_prompts, num_tokens)`): exactly one of this, `text_embeds` and
                `class_ids`. Of a model with a fixed vocabulary none of them asks every image for every class: all
                classes of the first image, then those of the next.
            attention_mask (`torch.LongTensor` of shape `(num_prompts, num_tokens)`, *optional*): 0 for padding.
            text_embeds (`torch.FloatTensor` of shape `(num_prompts, num_tokens, hidden_size)`): `pooler_output` of
                [`~Sam3LiteModel.get_text_features`], or that output itself; any float dtype.
            input_boxes (`torch.FloatTensor` of shape `(num_prompts, num_boxes, 4)`, *optional*): box prompts, cxcywh
                in [0, 1]. The text of a prompt by boxes alone is "visual".
            input_boxes_labels (`torch.LongTensor` of shape `(num_prompts, num_boxes)`, *optional*): 1 positive,
                0 negative, -10 padding. All positive by default.
            image_index (`torch.LongTensor` of shape `(num_prompts,)`, *optional*): the image that each prompt belongs
                to. By default one prompt per image; with a single image, all prompts are for it; a single prompt is
                for all images.
            labels (`list[dict[str, torch.Tensor]]`, *optional*): one per prompt: `boxes` `(n, 4)` cxcywh in [0, 1] and
                optionally `masks` `(n, height, width)` bool, or None. `n` is 0 where the concept is absent. A prompt
                without masks takes no part in the mask losses.
            prompt_chunk_size (`int`, *optional*): how many prompts the detector handles at once. Bounds the memory of
                inference with many prompts; does not go with `labels`.
            original_sizes: not used; lets the output of the processor be passed whole.
            class_ids (`torch.LongTensor` of shape `(num_prompts,)`, *optional*): prompts by their places in
                `config.vocabulary`, for a model that has one.
            criterion (`Callable`, *optional*): makes the output of the pass, instead of the losses on `labels` and the
                predictions: what it asks the pass for is computed, and nothing else. `labels` may then be those of the
                first prompts only.
            kwargs: `return_dict`; all else is refused, `output_attentions` and `output_hidden_states` among it.

        Raises:
            ValueError: inputs that are missing, exclusive, or of sizes that do not match.
            TypeError: an argument that is none.
        """
        refuse_arguments(kwargs, self.config)
        if (pixel_values is None) == (vision_embeds is None):
            raise ValueError("Pass exactly one of `pixel_values` and `vision_embeds`.")
        given = (input_ids is not None) + (text_embeds is not None) + (class_ids is not None)
        if given > 1 or (given == 0 and self.vocabulary is None):
            raise ValueError("Pass exactly one of `input_ids`, `text_embeds` and `class_ids`.")
        if labels is not None and prompt_chunk_size is not None:
            raise ValueError("`prompt_chunk_size` is for inference: pass it without `labels`.")
        if vision_embeds is None:
            vision_embeds = self.get_vision_features(pixel_values)
        levels, summary = tuple(vision_embeds.fpn_hidden_states[:3]), self.image_summary(vision_embeds)
        if not given:
            class_ids, image_index = self._every_class(len(levels[0]), image_index, input_boxes)
        if class_ids is not None:
            if self.vocabulary is None:
                raise ValueError("`class_ids` are for a model with a fixed vocabulary: see `freeze_vocabulary`.")
            text_embeds, attention_mask = self.vocabulary.select(class_ids)
        elif text_embeds is None:
            text_embeds = self.get_text_features(input_ids, attention_mask)
        text = text_embeds if isinstance(text_embeds, Tensor) else text_embeds.pooler_output
        if not torch.is_autocast_enabled(text.device.type):
            text = text.to(levels[-1].dtype)  # cached features are often kept in float32
        text_mask = None if attention_mask is None else attention_mask.bool()
        if input_ids is not None:  # what is token 0 is padding for SAM 3's detector, be it part of a word
            tokens = input_ids != 0
            text_mask = tokens if text_mask is None else text_mask & tokens
        if input_boxes is not None:
            input_boxes_labels = check_boxes(input_boxes, input_boxes_labels)
        prompts = assign_images(len(levels[0]), image_index, text, text_mask, input_boxes, input_boxes_labels)
        unlabelled = 0 if labels is None else len(prompts.image_index) - len(labels)
        if unlabelled < 0 or (unlabelled and criterion is None):
            raise ValueError(f"`labels` has {len(labels)} entries for {len(prompts.image_index)} prompts.")
        if labels is not None or criterion is not None:
            training_pass = TrainingPass(self, levels, summary, prompts, labels)
            return (criterion or self._forward_with_labels)(training_pass)
        return self._forward_in_chunks(levels, summary, prompts, prompt_chunk_size)

    def _every_class(
        self, num_images: int, image_index: Tensor | None, input_boxes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The `class_ids` and `image_index` that ask every image for every class of the vocabulary."""
        if image_index is not None or input_boxes is not None:
            raise ValueError(
                "Without prompts every image is asked for every class: `image_index` and `input_boxes` need "
                "`input_ids` or `class_ids` (the text of prompts by boxes alone is 'visual')."
            )
        classes = torch.arange(len(self.config.vocabulary), device=self.device)
        images = torch.arange(num_images, device=self.device)
        return classes.repeat(num_images), images.repeat_interleave(len(classes))

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
        r"""
        What `forward` finds, with masks of the kept detections only: the mask head runs for prompts that have any.
        For inference; see `forward` for the other arguments.

        Args:
            threshold (`float` or `(num_prompts, 1)` tensor, *optional*, defaults to 0.3): detections have a higher
                score than this.
            max_detections (`int`, *optional*): of each image, the best so many over its prompts.
        """
        levels = tuple(vision_embeds.fpn_hidden_states[:3])
        if input_boxes is not None:
            input_boxes_labels = check_boxes(input_boxes, input_boxes_labels)
        prompts = assign_images(
            len(levels[0]),
            image_index,
            text_embeds.to(levels[-1].dtype),
            attention_mask.bool(),
            input_boxes,
            input_boxes_labels,
        )
        found = self._run_detector(levels, self.image_summary(vision_embeds), prompts)
        output = self._predictions(found)
        chosen = choose_queries(output, prompts.image_index, threshold, max_detections)
        masks = None
        if self.config.mask_supervision:
            masks = self._masks_of(levels, prompts.image_index, found, chosen.prompt, chosen.query)
        return chosen.findings(output.pred_boxes, masks)

    def _masks_of(
        self, levels: tuple[Tensor, ...], image_index: Tensor, found: DetectorOutput, prompt: Tensor, query: Tensor
    ) -> Tensor:
        """Mask logits `(matches, h, w)` of single queries; `prompt` and `query` `(matches,)`, sorted by prompt."""
        masks = [levels[0].new_zeros((0, *levels[0].shape[-2:]))]
        segmented = prompt.unique()
        images, owner = image_index[segmented].unique(return_inverse=True)
        if len(images) < len(levels[0]):
            levels = tuple(level[images] for level in levels)
        shared = self.mask_decoder.shared_maps(levels, len(segmented)) if len(segmented) else None
        for start in range(0, len(segmented), PROMPTS_SEGMENTED_AT_ONCE):
            group = slice(start, start + PROMPTS_SEGMENTED_AT_ONCE)
            rows = segmented[group]
            pixels = self._mask_features(levels, owner[group], found.of_prompts(rows), shared)
            own = torch.isin(prompt, rows)
            row = torch.searchsorted(rows, prompt[own])
            masks.append(self.mask_decoder.matched_masks(found.queries[rows], pixels, row, query[own]))
        return torch.cat(masks)

    def detect(
        self,
        levels: tuple[Tensor, ...],
        image_index: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        input_boxes: Tensor | None,
        input_boxes_labels: Tensor | None,
        one_to_many: bool,
        summary: Tensor | None = None,
    ) -> DetectorOutput:
        """
        Everything between the features and the masks, for `(prompts,)` prompts on `(images,)` feature maps.
        See [`~Sam3LiteModel.forward`] for the arguments; `levels` are the vision maps from fine to coarse, `summary`
        the tokens `(images, 1, hidden)` of prompts without boxes.
        """
        coarse = levels[-1]
        position = self._position_encoding(coarse)
        shown, shown_mask = None, None  # what the box encoder adds to the words
        if input_boxes is not None:
            shown, shown_mask = self.geometry_encoder(input_boxes, input_boxes_labels, coarse, position, image_index)
            if not self.config.summary_token:  # a prompt without boxes gets none, whatever its neighbours have
                has_boxes = (input_boxes_labels != BOX_PADDING_LABEL).any(dim=1, keepdim=True)
                shown_mask = shown_mask & has_boxes
        elif summary is not None:
            shown = summary[image_index]
            shown_mask = torch.full(shown.shape[:2], self.config.summary_token, device=text.device)
        if shown is not None:
            if text_mask is None:
                text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            text = torch.cat([text, shown.to(text.dtype)], dim=1)
            text_mask = torch.cat([text_mask, shown_mask], dim=1)
        prompt_bias = additive_mask(text_mask, coarse.dtype)
        vision = coarse.flatten(2).transpose(1, 2)  # (images, height * width, hidden)
        encoded = self.detr_encoder(vision, image_index, text, position, prompt_bias)
        hidden, boxes, presence = self.detr_decoder(
            encoded, text, position, prompt_bias, tuple(coarse.shape[-2:]), one_to_many
        )
        logits = self.dot_product_scoring(hidden, text, text_mask).squeeze(-1)  # (layers, prompts, queries)
        count = self.config.detr_decoder_config.num_queries
        return DetectorOutput(
            logits=logits[:, :, :count],
            boxes=boxes[:, :, :count],
            presence_logits=presence,
            one_to_many_logits=logits[:, :, count:] if one_to_many else None,
            one_to_many_boxes=boxes[:, :, count:] if one_to_many else None,
            hidden=hidden,
            encoded=encoded,
            prompt_features=text,
            prompt_mask=text_mask,
        )

    def _position_encoding(self, coarse: Tensor) -> Tensor:
        """`(1, height * width, hidden)` sine encoding of the coarsest level, computed in float32."""
        shape = torch.Size((1, *coarse.shape[1:]))
        return self.vision_position(shape, coarse.device, torch.float32).flatten(2).transpose(1, 2).to(coarse.dtype)

    def _run_detector(
        self, levels: tuple[Tensor, ...], summary: Tensor | None, prompts: Prompts, one_to_many: bool = False
    ) -> DetectorOutput:
        return (self._compiled_detect or self.detect)(levels, *prompts, one_to_many, summary)

    def _mask_features(
        self,
        levels: tuple[Tensor, ...],
        image_index: Tensor,
        found: DetectorOutput,
        shared: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        bias = additive_mask(found.prompt_mask, levels[-1].dtype)
        return self.mask_decoder(levels, found.encoded, image_index, found.prompt_features, bias, shared)

    def _forward_in_chunks(
        self, levels: tuple[Tensor, ...], summary: Tensor | None, prompts: Prompts, prompt_chunk_size: int | None
    ) -> Sam3LiteOutput:
        num_prompts = len(prompts.image_index)
        size = prompt_chunk_size or max(num_prompts, 1)
        shared = self.mask_decoder.shared_maps(levels, num_prompts) if size < num_prompts else None
        chunks = []
        for start in range(0, num_prompts, size):
            chunk = Prompts(*(tensor if tensor is None else tensor[start : start + size] for tensor in prompts))
            found = self._run_detector(levels, summary, chunk)
            pixels = self._mask_features(levels, chunk.image_index, found, shared)
            chunks.append(self._predictions(found, pixels, self.mask_decoder.semantic_projection(pixels)))
        if not chunks:
            raise ValueError("There are no prompts: `input_ids` or `text_embeds` has no rows.")
        if len(chunks) == 1:
            return chunks[0]
        return Sam3LiteOutput(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})

    def _predictions(
        self, found: DetectorOutput, pixels: Tensor | None = None, semantic: Tensor | None = None
    ) -> Sam3LiteOutput:
        return Sam3LiteOutput(
            pred_masks=None if pixels is None else self.mask_decoder.masks(found.queries, pixels),
            pred_boxes=box_cxcywh_to_xyxy(found.boxes[-1]),
            pred_logits=found.logits[-1],
            presence_logits=found.presence_logits[-1].unsqueeze(-1),
            semantic_seg=semantic,
        )

    def _forward_with_labels(self, training_pass: TrainingPass) -> Sam3LiteOutput:
        segmented = training_pass.segment(training_pass.prompts_with_masks())
        loss, loss_dict = training_pass.label_loss(segmented)
        found = training_pass.found
        if self.training:
            outputs = self._predictions(found)
        else:  # where every prompt was segmented
            outputs = self._predictions(found, segmented.pixels, segmented.semantic)
        return Sam3LiteOutput(loss=loss, loss_dict=loss_dict, **outputs)  # as a tuple, the loss comes first


__all__ = [
    "Sam3LiteFindings",
    "Sam3LiteModel",
    "Sam3LiteOutput",
    "Sam3LitePreTrainedModel",
    "Sam3LiteVisionOutput",
]
