"""A mapping from a standard to a lite model that is fitted to images: no labels, no training, a few minutes."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ...checkpoints import NECK, VIT, Checkpoint, LoadedTensors
from ...configuration_sam3_lite import Sam3LiteConfig, parameter_sizes
from ...errors import model_errors
from ...modeling_sam3_lite import Sam3LiteModel
from ...processing_sam3_lite import Sam3LiteProcessor
from ...sources_sam3_lite import HUB_ARGUMENTS
from ...vision_sam3_lite import Sam3LiteVisionModel
from ...vocabulary_sam3_lite import phrase_features
from ..basis import Basis, rotation
from ..depth import layer_maps, search_layers
from ..mapper import map_checkpoint
from ..plan import resolve_dtype
from ..refit import DETR_ENCODER_SITES, VIT_SITES
from ..report import MappingReport
from ..signals import TowerSignals
from ..text import fits_text, map_with_phrases
from .detector import PromptBatch, Side, refit_detr_encoder, refit_mask_embedder
from .images import batches, draw_images, load_pixels
from .vision import measure_vision, pyramid_cosines, refit_vision, with_layers

logger = logging.get_logger(__name__)

TOKENS_PER_FEATURE = 50  # image tokens for each feature of the widest layer that is fitted (design: at least 50)
SEARCH_TOKENS_PER_FEATURE = 16  # a choice of layers needs less: every choice is fitted once
HELD_OUT = 8  # one image in so many is not fitted, but measured
PROMPTS_PER_IMAGE = 4
VISION, VIT_LAYERS, DECODER_LAYERS = "vision_encoder.", f"{VIT}.layers", "detr_decoder.layers"
# What the detector is asked while it is fitted, if the user does not say.
PROMPTS = tuple(
    "person face hand car wheel bicycle dog cat bird horse tree leaf flower building window door chair table bottle "
    "cup book screen shoe bag sign boat fruit plate cell tool box animal".split()
)


@torch.no_grad()
def calibrate_mapping(
    source: Sam3LiteModel | str | os.PathLike,
    images: str | os.PathLike | Sequence | None = None,
    *,
    preset: str | None = None,
    config: Sam3LiteConfig | None = None,
    prompts: Sequence[str] | None = None,
    text_phrases: Sequence[str] | None = None,
    num_images: int | None = None,
    search_depth: bool = True,
    ridge: float = 1e-2,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs,
) -> Sam3LiteModel:
    """
    A smaller model that follows a larger one on unlabelled images.

    The ViT's residual stream is rotated into the strongest directions that the images show. Then, layer by layer on
    the smaller model's own activations, the layers that write to the stream are fitted by ridge regression to the
    larger model's stream: this absorbs the removed width and the removed layers. Feature pyramid, DETR encoder and
    mask embedding follow in the same way. Other tensors are mapped as by `mapping="isometry"`.

    Args:
        source: the larger model, or what [`~Sam3LiteModel.from_pretrained`] takes. A model is not changed.
        images: a folder (searched recursively), or paths, PIL images, uint8 arrays or tensors; drawn pictures (dead
            leaves and 1/f noise) if None. The closer to what the model is for, the better.
        preset: sizes of the result, `lite` by default.
        config: sizes of the result, instead of `preset`.
        prompts: phrases that the detector is asked on these images, best the user's own classes. Default: the fixed
            vocabulary of the source, or common nouns if it has none.
        text_phrases: what a text encoder that becomes smaller is fitted to; see [`map_with_phrases`].
        num_images: how many images to use at most. Default: enough for 50 image tokens per feature of the widest
            fitted layer.
        search_depth: try other choices of ViT layers than evenly spread ones, and keep the one whose pyramid is
            nearest to the source's on images that were not fitted. Takes one fit of the ViT per choice.
        ridge: strength of the pull to the mapped weights, in units of the mean variance of a layer's inputs.
        batch_size: images at once.
        seed: of the choice of images and prompts, and of drawn pictures.
        device: where to compute; that of the source by default. Images and streams are kept there: memory grows with
            `num_images`, but not with the number of layers.
        dtype: of the result; that of the source by default. All computations are in float32.
        kwargs: fields of the config such as `image_size`, and `revision`, `token`, `variant`, `text_encoder`, ... of
            the source.

    Returns:
        The model in evaluation mode; `mapping_report` accounts for every tensor, and `mapping_report.calibration`
        has the cosines between both pyramids on held-out images, per level from fine to coarse.

    Raises:
        ValueError: there are no images, or the sizes cannot be mapped.
        OSError, ValueError: an image or the source cannot be read.
    """
    where = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, "variant", "text_encoder") if key in kwargs}
    if config is not None and preset is not None:
        raise ValueError("`preset` and `config` both say the sizes of the model: pass one of them.")
    teacher = source
    if not isinstance(source, Sam3LiteModel):
        with model_errors(os.fspath(source)):
            teacher = Sam3LiteModel.from_pretrained(source, preset="same", **where)
    if config is None:
        config = teacher.config.at_preset(preset or "lite", **kwargs)
    elif kwargs:
        config = config.changed(**kwargs)
    dtype = resolve_dtype(dtype, None, teacher.dtype)
    device = torch.device(device or teacher.device)
    label = teacher.name_or_path or "the model"
    teacher = _ready(teacher, config.image_size, device)
    if isinstance(source, Sam3LiteModel):
        processor = Sam3LiteProcessor.of_origin(source.name_or_path, teacher.config)
    elif where.get("text_encoder") is not None:
        processor = Sam3LiteProcessor.of_source(where["text_encoder"], teacher.config)
    else:
        hub_arguments = {key: value for key, value in where.items() if key in HUB_ARGUMENTS}
        processor = Sam3LiteProcessor.of_source(source, teacher.config, **hub_arguments)
    return (
        _Calibration(teacher, processor, label, config, ridge, seed, text_phrases)
        .run(images, prompts or config.vocabulary or PROMPTS, num_images, search_depth, batch_size)
        .to(dtype)
    )


def _ready(model: Sam3LiteModel, image_size: int, device: torch.device) -> Sam3LiteModel:
    """The model itself, or a copy of it at another input size, in float32, on another device."""
    if model.config.image_size != image_size:
        resized = Sam3LiteModel(model.config.changed(image_size=image_size))
        resized.load_state_dict(model.state_dict())
        model = resized
    elif model.dtype != torch.float32 or model.device != device or model.training:
        model = copy.deepcopy(model)
    return model.to(device=device, dtype=torch.float32).eval()


class _Calibration:
    """
    The steps of [`calibrate_mapping`].

    Args:
        teacher: the larger model in float32, at the input size of the smaller.
        processor: its own.
        label: what to call it in messages.
        config: sizes of the smaller model.
    """

    def __init__(
        self,
        teacher: Sam3LiteModel,
        processor: Sam3LiteProcessor,
        label: str,
        config: Sam3LiteConfig,
        ridge: float,
        seed: int,
        text_phrases: Sequence[str] | None,
    ):
        self.teacher, self.processor, self.config, self.ridge, self.seed = teacher, processor, config, ridge, seed
        self.text_phrases = text_phrases
        self.checkpoint = Checkpoint(label, LoadedTensors(teacher), teacher.config, is_lite=True)

    def run(self, images, prompts: Sequence[str], num_images, search_depth: bool, batch_size: int) -> Sam3LiteModel:
        if parameter_sizes(self.config) == parameter_sizes(self.teacher.config):
            return self._map(None, None)[0]
        pixels = self._pixels(images, num_images)
        held_out = max(1, len(pixels) // HELD_OUT)
        if len(pixels) < 2:
            raise ValueError("Calibration needs at least two images: one of them is held out.")
        device = self.teacher.device
        fitted = [batch.to(device) for batch in batches(pixels[held_out:], batch_size)]
        held = [batch.to(device) for batch in batches(pixels[:held_out], batch_size)]

        signals = measure_vision(self.teacher.vision_encoder, fitted)
        basis = self._basis(signals)
        kept, tried = self._choose_layers(signals, basis, fitted, held) if search_depth else (None, {})
        model, report = self._map(signals, kept)
        self._refit(model, report, basis, fitted, prompts)
        report.strategy = "calibrated"
        report.calibration |= {
            "images": "drawn" if images is None else "given",
            "images_fitted": len(pixels) - held_out,
            "images_held_out": held_out,
            "pyramid_cosines": pyramid_cosines(model.vision_encoder, self.teacher.vision_encoder, held),
            "layer_choices_tried": len(tried),
            "stream_energy_kept": basis.energy,
        }
        logger.warning(report.summary())
        return model

    def _pixels(self, images, num_images: int | None) -> tuple[Tensor, ...]:
        if num_images is None:
            num_images = self._images_for(TOKENS_PER_FEATURE)
            num_images += math.ceil(num_images / (HELD_OUT - 1))
        if images is None:
            images = draw_images(num_images, self.config.image_size, self.seed)
        return load_pixels(images, num_images, self.processor, self.seed)

    def _images_for(self, tokens_per_feature: int) -> int:
        """Images whose tokens are so many times the features of the widest layer that is fitted."""
        vit = self.config.vision_config.backbone_config
        tokens = (vit.image_size // vit.patch_size) ** 2
        return math.ceil(tokens_per_feature * vit.intermediate_size / tokens)

    def _basis(self, signals: TowerSignals) -> Basis:
        width = self.config.vision_config.backbone_config.hidden_size
        if width >= len(signals.moment):
            return Basis()
        basis = rotation(signals.moment, width)
        return replace(basis, matrix=basis.matrix.to(self.teacher.device))

    def _map(self, signals: TowerSignals | None, kept: list[int] | None) -> tuple[Sam3LiteModel, MappingReport]:
        """The smaller model before it is fitted; `kept` are its ViT layers, evenly spread ones if None."""
        # Every decoder layer refines the boxes of the one before with the same heads: the first ones work alone, but
        # for the masks, which are refit.
        layers = {DECODER_LAYERS: list(range(self.config.detr_decoder_config.num_layers))}
        if kept is not None:
            layers[VIT_LAYERS] = kept
        shapes = Sam3LiteModel.parameter_shapes(self.config)
        sides, options = (self.checkpoint, self.config, shapes), {"vision_signals": signals, "layers": layers}
        if fits_text(self.checkpoint.config, self.config):
            tokenizer, device = self.processor.tokenizer, self.teacher.device
            state, report = map_with_phrases(*sides, tokenizer, self.text_phrases, device=device, **options)
        else:
            state, report = map_checkpoint(*sides, "isometry", **options)
        model = Sam3LiteModel(copy.deepcopy(self.config))
        model.load_state_dict(state)
        model.mapping_report = report
        return model.to(self.teacher.device).eval(), report

    def _map_all_layers(self, signals: TowerSignals) -> Sam3LiteVisionModel:
        """The vision encoder in the width of the smaller model, with as many layers as the larger one."""
        source = self.teacher.config.vision_config.backbone_config
        config = self.config.changed(
            vision_num_hidden_layers=source.num_hidden_layers,
            vision_global_attn_indexes=list(source.global_attn_indexes),
        )
        shapes = Sam3LiteModel.parameter_shapes(config)
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
        state, _ = map_checkpoint(self.checkpoint, config, shapes, "isometry", vision_signals=signals)
        vision = Sam3LiteVisionModel(config.vision_config)
        vision.load_state_dict({name.removeprefix(VISION): tensor for name, tensor in state.items()})
        return vision.to(self.teacher.device).eval()

    def _choose_layers(
        self, signals: TowerSignals, basis: Basis, fitted: list[Tensor], held: list[Tensor]
    ) -> tuple[list[int] | None, dict]:
        """The ViT layers to keep: the even spread is improved; None where all stay."""
        source = self.teacher.config.vision_config.backbone_config
        target = self.config.vision_config.backbone_config
        if source.num_hidden_layers == target.num_hidden_layers:
            return None, {}
        start = layer_maps(self.teacher.config, self.config)[VIT_LAYERS]
        narrow = self._map_all_layers(signals)
        wanted = math.ceil(self._images_for(SEARCH_TOKENS_PER_FEATURE) / len(fitted[0]))

        def score(kept: list[int]) -> float:
            candidate = with_layers(narrow, kept)
            refit_vision(candidate, self.teacher.vision_encoder, kept, basis, fitted[:wanted], self.ridge)
            cosines = pyramid_cosines(candidate, self.teacher.vision_encoder, held)
            logger.info(f"ViT layers {kept}: pyramid cosines {cosines}")
            return sum(cosines)

        types = [i in source.global_attn_indexes for i in range(source.num_hidden_layers)]
        return search_layers(start, types, score)

    def _refit(self, model, report: MappingReport, basis: Basis, fitted: list[Tensor], prompts: Sequence[str]):
        vision, teacher_vision = model.vision_encoder, self.teacher.vision_encoder
        layers = report.layers[VIT_LAYERS]
        refit_vision(vision, teacher_vision, layers, basis, fitted, self.ridge)
        names = [f"{VIT_LAYERS}.0.{site.linear}" for site in VIT_SITES]
        for level, module in enumerate(vision.neck.fpn_layers):
            last = f".scale_layers.{len(module.scale_layers) - 1}" if len(module.scale_layers) else None
            names += [f"{NECK}.{level}{part}" for part in (last, ".proj1") if part]

        sides = self._sides(model, fitted, prompts)
        encoded = refit_detr_encoder(*sides, report.layers["detr_encoder.layers"], self.ridge)
        names += [f"detr_encoder.layers.0.{site.linear}" for site in DETR_ENCODER_SITES]
        if len(model.detr_decoder.layers) < len(self.teacher.detr_decoder.layers):
            refit_mask_embedder(*sides, *encoded, self.ridge)
            names.append("mask_decoder.mask_embedder.layers.0.weight")
        report.mark_refit(names)

    def _sides(self, student: Sam3LiteModel, fitted: list[Tensor], prompts: Sequence[str]) -> list[Side]:
        """Student and teacher with what their detectors get: for each image a few prompts, the same for both."""
        generator = torch.Generator().manual_seed(self.seed)
        count = min(PROMPTS_PER_IMAGE, len(prompts))
        choices = []
        for batch in fitted:
            rows = torch.stack([torch.randperm(len(prompts), generator=generator)[:count] for _ in batch]).flatten()
            owners = torch.arange(len(batch)).repeat_interleave(count)
            choices.append((owners.to(student.device), rows))
        sides = []
        for model in (student, self.teacher):
            features, mask = phrase_features(model, self.processor, list(prompts), padded=False)
            coarse, asked = [], []
            for batch, (owners, rows) in zip(fitted, choices, strict=True):
                vision = model.get_vision_features(batch)
                text, valid = features[rows], mask.bool()[rows]
                if vision.summary is not None:
                    text = torch.cat([text, vision.summary[owners]], dim=1)
                    valid = F.pad(valid, (0, 1), value=True)
                coarse.append(vision.fpn_hidden_states[-1])
                asked.append(PromptBatch(owners, text, valid))
            sides.append(Side(model, coarse, asked))
        return sides


__all__ = ["calibrate_mapping"]
