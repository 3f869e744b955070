"""Prints, as JSON, how many images per second the training data of a dataset come at, per number of worker processes.

    python benchmarks/loader.py path/to/dataset --image-size 1008 --workers 0 2 4 8

Compare the numbers with the images per second that training reports: if they are not well above, the GPU waits.
"""

import argparse
import json
import sys

from sam3_hf.data import (
    BatchKeys,
    PromptSampling,
    TrainDataset,
    load_dataset_splits,
    make_loader,
    measure_throughput,
)


def throughput(dataset: TrainDataset, batch_size: int, batches: int, num_workers: int) -> float:
    """Images per second over `batches` batches, the start of the workers left out."""
    keys = BatchKeys(len(dataset), batch_size, seed=0, first_step=1, last_step=batches + 1)
    return measure_throughput(make_loader(dataset, keys, num_workers=num_workers), batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder, COCO file or Hub repository, as sam3_hf.data.load_dataset_splits takes")
    parser.add_argument("--image-size", type=int, default=1008, help="side of the model's input in pixels")
    parser.add_argument("--batch-size", type=int, default=4, help="images per batch")
    parser.add_argument("--prompts", type=int, default=PromptSampling().prompts_per_image, help="prompts per image")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="numbers of processes to try")
    parser.add_argument("--batches", type=int, default=50, help="batches to time for each; many per worker")
    arguments = parser.parse_args()
    rows = load_dataset_splits(arguments.data)["train"]
    dataset = TrainDataset(rows, arguments.image_size, PromptSampling(prompts_per_image=arguments.prompts))
    rates = {
        str(workers): round(throughput(dataset, arguments.batch_size, arguments.batches, workers), 2)
        for workers in arguments.workers
    }
    fields = ("data", "image_size", "batch_size", "prompts", "batches")
    settings = {field: getattr(arguments, field) for field in fields}
    sys.stdout.write(json.dumps({**settings, "images_per_second_by_workers": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
