"""PyTorch Sam3LiteVideo model: Transformers' tracking of what SAM 3 finds in a film, around a lite detector."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transformers import Sam3TrackerVideoModel, Sam3VideoModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, Sam3VisionNeck
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession, nms_masks
from transformers.utils import logging

from .configuration_sam3_lite import Sam3LiteConfig
from .configuration_video_sam3_lite import Sam3LiteVideoConfig, video_parameter_sizes
from .loading_sam3_lite import OTHER_MODEL, LiteLoading, Sam3LitePreTrainedModel, needs_package
from .modeling_sam3_lite import Sam3LiteModel

logger = logging.get_logger(__name__)


class Sam3LiteVideoModel(LiteLoading, Sam3VideoModel):
    """
    Finds every instance of some phrases in a film and follows each through it: [`Sam3VideoModel`] with a
    [`Sam3LiteModel`] as its detector. Processor, sessions and outputs are those of [`Sam3VideoProcessor`].

    The tracker is SAM 3's. It reads the trunk of the detector through a feature pyramid of its own, `tracker_neck`,
    which has three levels here: the fourth of SAM 3 is never read.

    Example:

    ```python
    >>> import numpy as np
    >>> from sam3_hf import Sam3LiteProcessor, Sam3LiteVideoConfig, Sam3LiteVideoModel

    >>> model = Sam3LiteVideoModel(Sam3LiteVideoConfig.from_preset("tiny")).eval()
    >>> processor = Sam3LiteProcessor.from_config(model.config.detector_config).to_video()
    >>> session = processor.init_video_session(video=np.zeros((2, 96, 128, 3), dtype=np.uint8))
    >>> session = processor.add_text_prompt(session, ["cat", "red car"])
    >>> [out.frame_idx for out in model.propagate_in_video_iterator(session)]
    [0, 1]
    ```
    """

    config: Sam3LiteVideoConfig
    config_class = Sam3LiteVideoConfig
    base_model_prefix = "sam3_lite_video"
    _supports_flex_attn = Sam3LitePreTrainedModel._supports_flex_attn
    _no_split_modules = Sam3LitePreTrainedModel._no_split_modules

    def __init__(self, config: Sam3LiteVideoConfig):
        config.validate_architecture()
        _check_masks(config.detector_config)
        super(Sam3VideoModel, self).__init__(config)
        # The stock constructor finds the class of the detector among registered ones, where there may be none.
        self.detector_model = Sam3LiteModel(config.detector_config)
        self.tracker_model = Sam3TrackerVideoModel(config.tracker_config, remove_vision_encoder=True)
        self.tracker_neck = Sam3VisionNeck(config.detector_config.vision_config)
        for name in config.tracking_keywords():
            setattr(self, name, getattr(config, name))
        self.eval()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs
    ) -> Sam3LiteVideoModel:
        r"""
        Loads a lite video model as it was saved, or makes one of SAM 3.

        The detector is mapped as by [`~Sam3LiteModel.from_pretrained`], the tracker is copied, and its pyramid is
        mapped as that of the detector.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a model of type `sam3_lite_video` or `sam3_video` (that
                of `facebook/sam3`), or a native `.pt` file of Meta's with a tracker, whose sizes are SAM 3's.
            kwargs: those of [`~Sam3LiteModel.from_pretrained`], with a [`Sam3LiteVideoConfig`] as `config`; and
                thresholds and delays of the tracking, such as `hotstart_delay`, see [`Sam3LiteVideoConfig`].

        Returns:
            The model in evaluation mode. Unless it was loaded as it was saved, `mapping_report` accounts for every
            tensor of detector, tracker and pyramid.

        Raises:
            ValueError: as there, or the source has no tracker, or its detector was trained on boxes alone.
            OSError: a file is missing or truncated.
        """
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @staticmethod
    def _sizes(config: Sam3LiteVideoConfig) -> tuple:
        return video_parameter_sizes(config)

    @staticmethod
    def _plan_mapping(*arguments):
        try:
            from sam3_hf.mapping.video import plan_video_mapping
        except ImportError as error:
            raise needs_package(OTHER_MODEL) from error
        return plan_video_mapping(*arguments)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """
        As [`~PreTrainedModel.save_pretrained`], with the report of the mapping; and under the names of this model,
        where Transformers would put another prefix before those of the tracker.
        """
        super().save_pretrained(save_directory, is_main_process, **{"save_original_format": False, **kwargs})

    def replace_detector(self, detector: Sam3LiteModel) -> Sam3LiteVideoModel:
        """
        Puts another detector in the place of the present one, such as the same after fine-tuning. The tracker goes on
        through the trunk of the new one, at its input resolution.

        Args:
            detector: with a ViT of the same sizes. It becomes part of this model, in the precision and on the device
                of that.

        Returns:
            The model itself.

        Raises:
            ValueError: the ViT has other sizes than the present one, or the detector was trained on boxes alone.
        """
        _check_masks(detector.config)
        new, old = (_trunk(model).state_dict() for model in (detector, self.detector_model))
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (new, old)]
        if shapes[0] != shapes[1]:
            sizes = [
                f"{vit.hidden_size} x {vit.num_hidden_layers}"
                for vit in (model.config.vision_config.backbone_config for model in (detector, self.detector_model))
            ]
            raise ValueError(
                f"The ViT of the detector ({sizes[0]}) has other sizes than the one that the tracker reads "
                f"({sizes[1]}): map a video model to the same preset as the detector."
            )
        config = self.config.with_detector(detector.config)
        config.detector_config = detector.config
        if config.image_size != self.config.image_size:
            tracker = Sam3TrackerVideoModel(config.tracker_config, remove_vision_encoder=True)
            tracker.load_state_dict(self.tracker_model.state_dict())
            self.tracker_model = tracker.to(device=self.device, dtype=self.dtype).train(self.training)
        moved = _relative_difference(new, old)
        if moved > 0:
            logger.warning(
                f"The ViT of the new detector differs by {moved:.1%} from the one that the tracker's pyramid was made "
                "for: fit the pyramid to it with `sam3_hf.mapping.calibration.fit_tracker_neck`."
            )
        self.config = config
        self.detector_model = detector.to(device=self.device, dtype=self.dtype).train(self.training)
        return self

    def run_detection(
        self, inference_session: Sam3VideoInferenceSession, vision_embeds: Sam3VisionEncoderOutput
    ) -> dict[int, dict[str, Tensor]]:
        """
        As the stock method, with all phrases at once, and masks of what is found only.

        Args:
            inference_session: its phrases are asked; their text features are kept there.
            vision_embeds: of the detector's `get_vision_features`, for one frame.

        Returns:
            By the id of the phrase: `bbox` `(found, 4)` xyxy relative to the frame, `mask` `(found, height, width)`
            logits and `scores` `(found,)`.

        Raises:
            ValueError: the session has no phrases.
        """
        session, keys = inference_session, list(inference_session.prompts)
        if not keys:
            raise ValueError("The session has no phrases: add some with `processor.add_text_prompt(session, [...])`.")
        for key in keys:
            if key not in session.prompt_embeddings:
                tokens = session.prompt_input_ids[key], session.prompt_attention_masks[key]
                session.prompt_embeddings[key] = self.detector_model.get_text_features(*tokens)
        # Token 0 is padding for SAM 3's detector, be it part of a word.
        valid = [session.prompt_attention_masks[key].bool() & (session.prompt_input_ids[key] != 0) for key in keys]
        found = self.detector_model.find(
            vision_embeds,
            torch.cat([session.prompt_embeddings[key].pooler_output for key in keys]),
            torch.cat(valid),
            torch.zeros(len(keys), dtype=torch.long, device=self.device),
            threshold=self.score_threshold_detection,
        )
        detections = {}
        for row, key in enumerate(keys):
            own = (found.prompt_index == row).nonzero().squeeze(1)
            if self.det_nms_thresh > 0:
                scores, masks = found.scores[own], found.mask_logits[own]
                own = own[nms_masks(scores, masks, self.score_threshold_detection, self.det_nms_thresh)]
            detections[key] = {
                "bbox": found.boxes[own],
                "mask": found.mask_logits[own],
                "scores": found.scores[own],
            }
        return detections

    def get_vision_features_for_tracker(
        self, vision_embeds: Sam3VisionEncoderOutput
    ) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            vision_embeds: of the detector's `get_vision_features`.

        Returns:
            The three levels of the tracker's pyramid, and their position encodings, `(height * width, images,
            channels)` each, from fine to coarse.
        """
        tokens = vision_embeds.last_hidden_state
        size = self.tracker_model.prompt_encoder.image_embedding_size
        levels, positions = self.tracker_neck(tokens.transpose(1, 2).unflatten(2, size))
        levels = list(levels)
        # Here once per frame, and not for each object.
        levels[0] = self.tracker_model.mask_decoder.conv_s0(levels[0])
        levels[1] = self.tracker_model.mask_decoder.conv_s1(levels[1])
        flat = [[grid.flatten(2).permute(2, 0, 1) for grid in grids] for grids in (levels, positions)]
        return flat[0], flat[1]


def _check_masks(config: Sam3LiteConfig):
    if not config.mask_supervision:
        raise ValueError(
            "The detector was trained on boxes alone (`mask_supervision` is false), and the tracker follows masks: "
            "train it on data with masks."
        )


def _trunk(model: Sam3LiteModel) -> torch.nn.Module:
    return model.vision_encoder.backbone


def _relative_difference(new: dict[str, Tensor], old: dict[str, Tensor]) -> float:
    """Of two sets of weights of the same shapes, in the precision of the old and in units of its norm."""
    pairs = [(new[name].to(old[name]).float(), old[name].float()) for name in old]
    square = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return square.sqrt().item()


__all__ = ["Sam3LiteVideoModel"]
