"""A mapping from a standard to a lite model that is fitted to images: no labels, no training, a few minutes."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch

from ...checkpoints.video import no_tracker
from ...configuration_sam3_lite import Sam3LiteConfig
from ...configuration_video_sam3_lite import Sam3LiteVideoConfig
from ...errors import model_errors
from ...modeling_sam3_lite import Sam3LiteModel
from ...modeling_video_sam3_lite import Sam3LiteVideoModel
from ...processing_sam3_lite import Sam3LiteProcessor
from ...sources_sam3_lite import HUB_ARGUMENTS
from ..plan import resolve_dtype
from .steps import Calibration
from .video import VideoCalibration

# What the detector is asked while it is fitted, if the user does not say.
PROMPTS = tuple(
    "person face hand car wheel bicycle dog cat bird horse tree leaf flower building window door chair table bottle "
    "cup book screen shoe bag sign boat fruit plate cell tool box animal".split()
)


@torch.no_grad()
def calibrate_mapping(
    source: Sam3LiteModel | Sam3LiteVideoModel | str | os.PathLike,
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
    first_decoder_layers: bool = False,
    tracker: bool = False,
    **kwargs,
) -> Sam3LiteModel | Sam3LiteVideoModel:
    """
    A smaller model that follows a larger one on unlabelled images.

    The ViT's residual stream is rotated into the strongest directions that the images show. Then, layer by layer on
    the smaller model's own activations, the layers that write to the stream are fitted by ridge regression to the
    larger model's stream: this absorbs the removed width and the removed layers. Feature pyramid, DETR
    encoder and presence head follow in the same way, and, where the DETR decoder gets fewer layers, decoder, mask
    embedding and box head; what the larger model finds counts most. Other tensors are mapped as by
    `mapping="isometry"`.

    Args:
        source: the larger model, or what [`~Sam3LiteModel.from_pretrained`] takes. A model is not changed.
        images: a folder (searched recursively), or paths, PIL images, uint8 arrays or tensors; drawn pictures (dead
            leaves and 1/f noise) if None. The closer to what the model is for, the better.
        preset: sizes of the result, `lite` by default.
        config: sizes of the result, instead of `preset`.
        prompts: phrases that the detector is asked on these images, best the user's own classes. Default: the fixed
            vocabulary of the source, or common nouns if it has none. Each image is asked six of them; of many, mostly
            those that the source finds in it.
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
        first_decoder_layers: where the DETR decoder gets fewer layers, take its first ones instead of the first ones
            and the last. Boxes are better and masks worse, until training with a teacher mends that; it gets further
            from there (docs/results.md, "Learning from a teacher").
        tracker: make a [`Sam3LiteVideoModel`] of a source with a tracker, whose pyramid is fitted to the same images;
            so it is where the source is such a model. `config` can then be a [`Sam3LiteVideoConfig`], of which the
            detector counts.
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
    tracker = tracker or isinstance(source, Sam3LiteVideoModel)
    if tracker and isinstance(source, Sam3LiteModel):
        raise no_tracker(source.name_or_path or "the model")
    kind, teacher = Sam3LiteVideoModel if tracker else Sam3LiteModel, source
    if not isinstance(source, kind):
        with model_errors(os.fspath(source)):
            teacher = kind.from_pretrained(source, preset="same", **where)
    detector = teacher.detector_model if tracker else teacher
    if isinstance(config, Sam3LiteVideoConfig):
        config = config.detector_config
    if config is None:
        config = detector.config.at_preset(preset or "lite", **kwargs)
    elif kwargs:
        config = config.changed(**kwargs)
    dtype = resolve_dtype(dtype, None, teacher.dtype)
    device = torch.device(device or teacher.device)
    label = teacher.name_or_path or "the model"
    detector = _ready(detector, config.image_size, device)
    if isinstance(source, kind):
        processor = Sam3LiteProcessor.of_origin(source.name_or_path, detector.config)
    elif where.get("text_encoder") is not None:
        processor = Sam3LiteProcessor.of_source(where["text_encoder"], detector.config)
    else:
        hub_arguments = {key: value for key, value in where.items() if key in HUB_ARGUMENTS}
        processor = Sam3LiteProcessor.of_source(source, detector.config, **hub_arguments)
    options = detector, processor, label, config, ridge, seed, text_phrases, first_decoder_layers
    calibration = VideoCalibration(teacher, *options) if tracker else Calibration(*options)
    prompts = prompts or config.vocabulary or PROMPTS
    return calibration.run(images, prompts, num_images, search_depth, batch_size).to(dtype)


def _ready(model: Sam3LiteModel, image_size: int, device: torch.device) -> Sam3LiteModel:
    """The model itself, or a copy of it at another input size, in float32, on another device."""
    if model.config.image_size != image_size:
        resized = Sam3LiteModel(model.config.changed(image_size=image_size))
        resized.load_state_dict(model.state_dict())
        model = resized
    elif model.dtype != torch.float32 or model.device != device or model.training:
        model = copy.deepcopy(model)
    return model.to(device=device, dtype=torch.float32).eval()


__all__ = ["calibrate_mapping"]
