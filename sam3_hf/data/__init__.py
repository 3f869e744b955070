from .checks import DatasetError, check_dataset
from .coco import split_name
from .collate import PromptCollator
from .loader import EpochBatchSampler, eval_loader, measure_throughput, train_loader
from .loading import load_dataset_splits, read_category_map
from .rows import concept_names, has_masks, segmentation_of
from .sampling import PromptSampling
from .torch_dataset import EvalDataset, Sample, TrainDataset
from .transforms import Augmentation

__all__ = [
    "Augmentation",
    "DatasetError",
    "EpochBatchSampler",
    "EvalDataset",
    "PromptCollator",
    "PromptSampling",
    "Sample",
    "TrainDataset",
    "check_dataset",
    "concept_names",
    "eval_loader",
    "has_masks",
    "load_dataset_splits",
    "measure_throughput",
    "read_category_map",
    "segmentation_of",
    "split_name",
    "train_loader",
]
