"""How many training images per second the data loading delivers: decoding, augmenting, collating.

    python benchmarks/loader.py path/to/dataset --image-size 1008 --workers 0 2 4 8

`generated` instead of a path draws a dataset of JPEG images with masks. Compare the rates with the images per second
that training reports: if they are not well above, the GPU waits.
"""

import tempfile
from pathlib import Path

from common import jpeg_dataset, parser, reporting

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
    options = parser(__doc__)
    options.add_argument(
        "data", help="folder, COCO file or Hub repository, as sam3_hf.data.load_dataset_splits takes; or `generated`"
    )
    options.add_argument("--image-size", type=int, default=1008, help="side of the model's input in pixels")
    options.add_argument("--batch-size", type=int, default=4, help="images per batch")
    options.add_argument("--prompts", type=int, default=PromptSampling().prompts_per_image, help="prompts per image")
    options.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="numbers of processes to try")
    options.add_argument("--batches", type=int, default=50, help="batches to time for each; many per worker")
    options.add_argument("--generated-images", type=int, default=32, help="size of the dataset `generated`")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.data
        if source == "generated":
            source = jpeg_dataset(Path(folder), arguments.generated_images, arguments.image_size)
        rows = load_dataset_splits(source)["train"]
        dataset = TrainDataset(rows, arguments.image_size, PromptSampling(prompts_per_image=arguments.prompts))
        with reporting(arguments) as (rates, _):
            for workers in arguments.workers:
                rate = throughput(dataset, arguments.batch_size, arguments.batches, workers)
                rates.append({"workers": workers, "images/s": rate, "images/s per process": rate / max(workers, 1)})


if __name__ == "__main__":
    main()
