"""Configuration of a lite SAM 3 that follows what it finds through a film."""

from __future__ import annotations

import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Sam3TrackerVideoConfig, Sam3VideoConfig

from .configuration_sam3_lite import Sam3LiteConfig, parameter_sizes

# Channels of the memory of Transformers' tracker, whatever its configuration says.
MEMORY_WIDTH = 64
_PARTS = ("detector_config", "tracker_config")


@strict
class Sam3LiteVideoConfig(Sam3VideoConfig):
    r"""
    Configuration of [`Sam3LiteVideoModel`]: that of [`Sam3VideoModel`] around a lite detector. Without arguments the
    detector is that of the preset `lite`.

    Args:
        detector_config (`dict` or [`Sam3LiteConfig`], *optional*): the detector.
        tracker_config (`dict` or [`Sam3TrackerVideoConfig`], *optional*): the tracker, at the input resolution, patch
            size and pyramid width of the detector. Default: that of SAM 3 at these.
        kwargs: thresholds and delays of the tracking, as in [`Sam3VideoConfig`].

    Raises:
        ValueError: detector and tracker do not fit together, or a field cannot be; the message names it.

    Example:

    ```python
    >>> from sam3_hf import Sam3LiteVideoConfig

    >>> config = Sam3LiteVideoConfig.from_preset("lite", image_size=672, hotstart_delay=0)
    >>> config.tracker_config.image_size
    672
    ```
    """

    model_type = "sam3_lite_video"

    def __post_init__(self, **kwargs):
        if not isinstance(self.detector_config, PreTrainedConfig):
            self.detector_config = Sam3LiteConfig(**(self.detector_config or {}))
        if not isinstance(self.detector_config, Sam3LiteConfig):
            raise ValueError(
                f"`detector_config` is a {type(self.detector_config).__name__}, must be a Sam3LiteConfig: convert the "
                "model with `Sam3LiteVideoModel.from_pretrained`."
            )
        if self.tracker_config is None:
            self.tracker_config = tracker_for(self.detector_config)
            self.low_res_mask_size = 4 * _grid(self.detector_config)
        elif isinstance(self.tracker_config, dict):
            self.tracker_config = Sam3TrackerVideoConfig(**self.tracker_config)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As [`~PreTrainedConfig.from_dict`], for the content of a file.

        Raises:
            ValueError: a value of a wrong type, or whatever else a damaged file holds, and as in the constructor.
        """
        detector = config_dict.get("detector_config")
        if isinstance(detector, dict):
            config_dict = {**config_dict, "detector_config": Sam3LiteConfig.from_dict(detector)}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, text: str = "standard", **overrides) -> Sam3LiteVideoConfig:
        """
        A config by the name of its detector's preset.

        Args:
            name, text: as in [`~Sam3LiteConfig.from_preset`].
            overrides: fields and sizes of the detector as there, and thresholds and delays of the tracking.

        Raises:
            ValueError: no such preset, text encoder or field, or the sizes do not fit together.
        """
        own = {key: overrides.pop(key) for key in cls.tracking_keywords() & set(overrides)}
        return cls(detector_config=Sam3LiteConfig.from_preset(name, text, **overrides), **own)

    @classmethod
    def tracking_keywords(cls) -> set[str]:
        """Names of the thresholds and delays of the tracking."""
        return set(Sam3VideoConfig.__annotations__) - {*_PARTS, "initializer_range"}

    def with_detector(self, detector: Sam3LiteConfig, **tracking) -> Sam3LiteVideoConfig:
        """
        The same tracker around another detector, at the input resolution of that.

        Args:
            tracking: thresholds and delays to change.

        Raises:
            ValueError: the tracker does not fit the detector.
        """
        config = copy.deepcopy(self)
        config.detector_config = copy.deepcopy(detector)
        for name, value in tracking.items():
            setattr(config, name, value)
        config.image_size = detector.image_size
        config.validate_architecture()
        return config

    @property
    def image_size(self) -> int:
        """Side of the frames as the model sees them, in pixels."""
        return self.detector_config.image_size

    @image_size.setter
    def image_size(self, value: int):
        self.detector_config.image_size = value
        self.tracker_config.image_size = value
        self.low_res_mask_size = 4 * _grid(self.detector_config)

    def validate_architecture(self):
        """
        Raises:
            ValueError: the tracker does not fit the detector, naming the field and a valid value.
        """
        super().validate_architecture()
        detector, tracker = self.detector_config, self.tracker_config
        vit, prompts = detector.vision_config.backbone_config, tracker.prompt_encoder_config
        for field, have, want in (
            ("prompt_encoder_config.image_size", prompts.image_size, vit.image_size),
            ("prompt_encoder_config.patch_size", prompts.patch_size, vit.patch_size),
            ("vision_config.fpn_hidden_size", tracker.vision_config.fpn_hidden_size, _width(detector)),
        ):
            if have != want:
                raise ValueError(f"`tracker_config.{field}` is {have}, the detector needs {want}: set it to that.")
        if _width(detector) <= MEMORY_WIDTH:
            raise ValueError(
                f"`detector_config.vision_config.fpn_hidden_size` is {_width(detector)}, Transformers' tracker needs "
                f"more than the {MEMORY_WIDTH} of its memory: take a wider detector, as all presets but the tiny ones."
            )


def tracker_for(detector: Sam3LiteConfig) -> Sam3TrackerVideoConfig:
    """SAM 3's tracker at the input resolution, patch size and pyramid width of a detector."""
    vit, width = detector.vision_config.backbone_config, _width(detector)
    return Sam3TrackerVideoConfig(
        vision_config=copy.deepcopy(detector.vision_config),
        prompt_encoder_config={"hidden_size": width, "patch_size": vit.patch_size},
        mask_decoder_config={"hidden_size": width, "iou_head_hidden_dim": width},
        memory_attention_hidden_size=width,
        memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=4 * width,
        image_size=vit.image_size,
    )


def video_parameter_sizes(config: Sam3LiteVideoConfig) -> tuple:
    """The fields that decide which parameters a model has and of which shapes."""
    tracker = config.tracker_config.to_dict()
    return parameter_sizes(config.detector_config), {key: tracker[key] for key in tracker if key != "image_size"}


def _grid(detector: Sam3LiteConfig) -> int:
    vit = detector.vision_config.backbone_config
    return vit.image_size // vit.patch_size


def _width(detector: Sam3LiteConfig) -> int:
    return detector.vision_config.fpn_hidden_size


__all__ = ["Sam3LiteVideoConfig"]
