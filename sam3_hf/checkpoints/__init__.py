"""SAM 3 checkpoints of every origin under one set of names: Transformers, Meta's native files, and back."""

from .checkpoint import Checkpoint
from .configs import lite_config, stock_config
from .names import CLIP, NAME_TABLE, NECK, UNREAD, VIT, from_native, native_state_dict, to_native
from .opening import open_checkpoint, refuse_training_checkpoint, source_config, weight_files
from .readers import LoadedTensors
from .tracker_names import TRACKER, TRACKER_NECK, from_tracker
from .video import DETECTOR, VideoCheckpoint, lite_video_config

__all__ = [
    "CLIP",
    "DETECTOR",
    "NAME_TABLE",
    "NECK",
    "TRACKER",
    "TRACKER_NECK",
    "UNREAD",
    "VIT",
    "Checkpoint",
    "LoadedTensors",
    "VideoCheckpoint",
    "from_native",
    "from_tracker",
    "lite_config",
    "lite_video_config",
    "native_state_dict",
    "open_checkpoint",
    "refuse_training_checkpoint",
    "source_config",
    "stock_config",
    "to_native",
    "weight_files",
]
