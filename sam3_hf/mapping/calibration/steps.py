"""The steps of a calibration: measure, choose layers, map, refit."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from transformers.utils import logging

from ...checkpoints import NECK, VIT, Checkpoint, LoadedTensors
from ...configuration_sam3_lite import Sam3LiteConfig, parameter_sizes
from ...modeling_sam3_lite import Sam3LiteModel
from ...processing_sam3_lite import Sam3LiteProcessor
from ...vision_sam3_lite import Sam3LiteVisionModel
from ..basis import Basis, rotation
from ..depth import layer_maps, search_layers
from ..mapper import map_checkpoint
from ..refit import DETR_DECODER_SITES, DETR_ENCODER_SITES, VIT_SITES
from ..report import MappingReport
from ..signals import TowerSignals
from ..text import fits_text, map_with_phrases
from .asking import Encoded, choose_prompts
from .decoder import refit_detr_decoder, refit_presence
from .detector import refit_detr_encoder, refit_mask_embedder
from .images import batches, draw_images, load_pixels
from .vision import measure_vision, pyramid_cosines, refit_vision, with_layers

logger = logging.get_logger(__name__)

TOKENS_PER_FEATURE = 50  # image tokens for each feature of the widest layer that is fitted (design: at least 50)
SEARCH_TOKENS_PER_FEATURE = 16  # a choice of layers needs less: every choice is fitted once
HELD_OUT = 8  # one image in so many is not fitted, but measured
VISION, VIT_LAYERS, DECODER_LAYERS = "vision_encoder.", f"{VIT}.layers", "detr_decoder.layers"


class Calibration:
    """
    The steps of [`calibrate_mapping`].

    Args:
        teacher: the larger model in float32, at the input size of the smaller.
        processor: its own.
        label: what to call it in messages.
        config: sizes of the smaller model.
        ridge, seed, text_phrases, first_decoder_layers: see [`calibrate_mapping`].
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
        first_decoder_layers: bool,
    ):
        self.teacher, self.processor, self.config, self.ridge, self.seed = teacher, processor, config, ridge, seed
        self.text_phrases, self.first_decoder_layers = text_phrases, first_decoder_layers
        self.checkpoint = Checkpoint(label, LoadedTensors(teacher), teacher.config, is_lite=True)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the smaller model, under the names of the checkpoint."""
        return Sam3LiteModel.parameter_shapes(self.config)

    def assemble(self, state: dict[str, Tensor]) -> nn.Module:
        """The smaller model with these parameters."""
        model = Sam3LiteModel(copy.deepcopy(self.config))
        model.load_state_dict(state)
        return model

    def detector_of(self, model: nn.Module) -> Sam3LiteModel:
        return model

    def pyramids(self, model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Where each pyramid behind the ViT is, that of the smaller model and that of the larger."""
        return {NECK: (self.detector_of(model).vision_encoder.neck, self.teacher.vision_encoder.neck)}

    def run(self, images, prompts: Sequence[str], num_images, search_depth: bool, batch_size: int) -> nn.Module:
        if parameter_sizes(self.config) == parameter_sizes(self.teacher.config):
            return self._map(None, None)[0]
        self._check_queries()
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
            "pyramid_cosines": pyramid_cosines(
                self.detector_of(model).vision_encoder, self.teacher.vision_encoder, held
            ),
            "layer_choices_tried": len(tried),
            "stream_energy_kept": basis.energy,
        }
        logger.warning(report.summary())
        return model

    @property
    def _fits_decoder(self) -> bool:
        """Whether the DETR decoder gets fewer layers."""
        own, source = (side.detr_decoder_config.num_layers for side in (self.config, self.teacher.config))
        return own < source

    def _check_queries(self):
        own, source = (side.detr_decoder_config.num_queries for side in (self.config, self.teacher.config))
        if self._fits_decoder and own != source:
            raise ValueError(
                f"A decoder of fewer layers is fitted query by query, and `num_queries` is {own}, that of the source "
                f"{source}: leave it at that, keep all decoder layers (a preset with -plus), or do not calibrate."
            )

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

    def _map(self, signals: TowerSignals | None, kept: list[int] | None) -> tuple[nn.Module, MappingReport]:
        """The smaller model before it is fitted; `kept` are its ViT layers, evenly spread ones if None."""
        layers = {DECODER_LAYERS: self._decoder_layers()}
        if kept is not None:
            layers[VIT_LAYERS] = kept
        shapes = self.parameter_shapes()
        sides, options = (self.checkpoint, self.config, shapes), {"vision_signals": signals, "layers": layers}
        if fits_text(self.checkpoint.config, self.config):
            tokenizer, device = self.processor.tokenizer, self.teacher.device
            state, report = map_with_phrases(*sides, tokenizer, self.text_phrases, device=device, **options)
        else:
            state, report = map_checkpoint(*sides, "isometry", **options)
        model = self.assemble(state)
        model.mapping_report = report
        return model.to(self.teacher.device).eval(), report

    def _decoder_layers(self) -> list[int]:
        """
        The layers of the source that the DETR decoder keeps.

        Every decoder layer refines the boxes of the one before with the same heads, so the first ones work best one
        after the other. Masks and scores are read from behind the last: they are better with the source's last layer
        there, which was made for that, until a teacher has trained the next one to do its work.
        """
        count, source = (side.detr_decoder_config.num_layers for side in (self.config, self.teacher.config))
        return [*range(count)] if self.first_decoder_layers else [*range(count - 1), source - 1]

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
            sides = candidate, self.teacher.vision_encoder
            necks = [(candidate.neck, self.teacher.vision_encoder.neck)]
            refit_vision(*sides, kept, basis, fitted[:wanted], self.ridge, necks)
            cosines = pyramid_cosines(candidate, self.teacher.vision_encoder, held)
            logger.info(f"ViT layers {kept}: pyramid cosines {cosines}")
            return sum(cosines)

        types = [i in source.global_attn_indexes for i in range(source.num_hidden_layers)]
        return search_layers(start, types, score)

    def _refit(self, model, report: MappingReport, basis: Basis, fitted: list[Tensor], prompts: Sequence[str]):
        detector, pyramids = self.detector_of(model), self.pyramids(model)
        vision, layers = detector.vision_encoder, report.layers[VIT_LAYERS]
        refit_vision(vision, self.teacher.vision_encoder, layers, basis, fitted, self.ridge, list(pyramids.values()))
        names = [f"{VIT_LAYERS}.0.{site.linear}" for site in VIT_SITES]
        for where, (neck, _) in pyramids.items():
            for level, module in enumerate(neck.fpn_layers):
                last = f".scale_layers.{len(module.scale_layers) - 1}" if len(module.scale_layers) else None
                names += [f"{where}.{level}{part}" for part in (last, ".proj1") if part]

        teacher = Encoded.of(self.teacher, self.processor, fitted, prompts)
        choices = choose_prompts(teacher, self.seed)
        sides = Encoded.of(detector, self.processor, fitted, prompts).side(choices), teacher.side(choices)
        wanted = sides[1].decode_all(sides[1].encode())
        encoded = refit_detr_encoder(*sides, wanted, report.layers["detr_encoder.layers"], self.ridge)
        names += [f"detr_encoder.layers.0.{site.linear}" for site in DETR_ENCODER_SITES]
        if self._fits_decoder:
            refit_detr_decoder(*sides, *encoded, wanted, report.layers[DECODER_LAYERS], self.ridge)
            names += [f"{DECODER_LAYERS}.0.{site.linear}" for site in DETR_DECODER_SITES]
            names += [f"{DECODER_LAYERS}.0.mlp_layer_norm.weight", "detr_decoder.box_head.layer3.weight"]
        heads = detector, self.teacher, sides[0].decode_all(encoded[0]), wanted, self.ridge
        if self._fits_decoder:
            refit_mask_embedder(*heads)
            names.append("mask_decoder.mask_embedder.layers.0.weight")
        if refit_presence(*heads):
            names.append("detr_decoder.presence_head.layer3.weight")
        report.mark_refit(names)


__all__ = ["HELD_OUT", "TOKENS_PER_FEATURE", "Calibration"]
