from .checks import DatasetError, check_dataset
from .coco import split_name
from .collate import PromptCollator
from .loader import BatchKeys, epoch_order, eval_batches, make_loader, measure_throughput, steps_per_epoch
from .loading import load_dataset_splits, read_category_map
from .rows import concept_names, has_masks, segmentation_of
from .sampling import PromptSampling
from .torch_dataset import EvalDataset, Sample, TrainDataset
from .transforms import Augmentation

__all__ = [
    "Augmentation",
    "BatchKeys",
    "DatasetError",
    "EvalDataset",
    "PromptCollator",
    "PromptSampling",
    "Sample",
    "TrainDataset",
    "check_dataset",
    "concept_names",
    "epoch_order",
    "eval_batches",
    "has_masks",
    "load_dataset_splits",
    "make_loader",
    "measure_throughput",
    "read_category_map",
    "segmentation_of",
    "split_name",
    "steps_per_epoch",
]
