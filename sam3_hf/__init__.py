"""Lite SAM 3 for Hugging Face Transformers. Importing this package registers it with `AutoConfig` and friends."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_sam3_lite import Sam3LiteConfig, Sam3LiteLossConfig
from .modeling_sam3_lite import Sam3LiteModel, Sam3LiteOutput
from .prediction.detections import Detections
from .prediction.pipeline import Prompt, Sam3LitePipeline
from .processing_sam3_lite import Sam3LiteProcessor
from .version import __version__

AutoConfig.register("sam3_lite", Sam3LiteConfig)
AutoModel.register(Sam3LiteConfig, Sam3LiteModel)
AutoProcessor.register(Sam3LiteConfig, Sam3LiteProcessor)
# Saved folders carry this code, so that `trust_remote_code=True` loads them where the package is not installed.
Sam3LiteConfig.register_for_auto_class()
Sam3LiteModel.register_for_auto_class("AutoModel")
Sam3LiteProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "Detections",
    "Prompt",
    "Sam3LiteConfig",
    "Sam3LiteLossConfig",
    "Sam3LiteModel",
    "Sam3LiteOutput",
    "Sam3LitePipeline",
    "Sam3LiteProcessor",
    "__version__",
]
