"""Lite SAM 3 for Hugging Face Transformers. Importing this package registers it with `AutoConfig` and friends."""

from transformers import AutoConfig, AutoModel, AutoProcessor, Sam3VideoProcessor

from .configuration_sam3_lite import Sam3LiteConfig, Sam3LiteLossConfig
from .configuration_video_sam3_lite import Sam3LiteVideoConfig
from .modeling_sam3_lite import Sam3LiteModel, Sam3LiteOutput
from .modeling_video_sam3_lite import Sam3LiteVideoModel
from .prediction.detections import Detections
from .prediction.pipeline import Prompt, Sam3LitePipeline
from .processing_sam3_lite import Sam3LiteProcessor
from .version import __version__

AutoConfig.register("sam3_lite", Sam3LiteConfig)
AutoModel.register(Sam3LiteConfig, Sam3LiteModel)
AutoProcessor.register(Sam3LiteConfig, Sam3LiteProcessor)
AutoConfig.register("sam3_lite_video", Sam3LiteVideoConfig)
AutoModel.register(Sam3LiteVideoConfig, Sam3LiteVideoModel)
AutoProcessor.register(Sam3LiteVideoConfig, Sam3VideoProcessor)
# Saved folders carry this code, so that `trust_remote_code=True` loads them where the package is not installed.
Sam3LiteConfig.register_for_auto_class()
Sam3LiteModel.register_for_auto_class("AutoModel")
Sam3LiteProcessor.register_for_auto_class("AutoProcessor")
Sam3LiteVideoConfig.register_for_auto_class()
Sam3LiteVideoModel.register_for_auto_class("AutoModel")

__all__ = [
    "Detections",
    "Prompt",
    "Sam3LiteConfig",
    "Sam3LiteLossConfig",
    "Sam3LiteModel",
    "Sam3LiteOutput",
    "Sam3LitePipeline",
    "Sam3LiteProcessor",
    "Sam3LiteVideoConfig",
    "Sam3LiteVideoModel",
    "__version__",
]
