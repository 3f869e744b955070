"""The training and validation splits of a run."""

import json
import logging
from pathlib import Path

import datasets
from accelerate import Accelerator

from ..data import (
    Augmentation,
    DatasetError,
    EvalDataset,
    PromptSampling,
    TrainDataset,
    concept_names,
    load_dataset_splits,
)
from ..data.composed import write_composed
from ..data.concepts import check_common_concepts
from ..data.generated import write_dataset
from ..data.held_out import hold_out
from ..data.loading import is_labelled, open_dataset
from ..data.rows import crowded_images, first_of, objects_per_category
from ..data.unlabelled import UnlabelledDataset, load_pictures
from ..phrases import everyday_nouns, read_phrases
from .arguments import DRAWN, Arguments, DataArguments

logger = logging.getLogger(__name__)

# Share of absent concepts among prompts where it is left to the data, at least and at most. With more there is little
# to learn boxes and masks from.
NEGATIVE_RATIOS = (0.5, 0.75)
DRAWN_FILE = "drawn.json"  # beside drawn pictures: what they were drawn by, once all of them are


def load_data(accelerator: Accelerator, arguments: Arguments, image_size: int) -> tuple[TrainDataset, EvalDataset]:
    """
    The checked training and validation splits. Where there is none for validation, a part of the other is held out.

    Args:
        image_size: side of the model's input in pixels.

    Raises:
        DatasetError: the dataset has faults, no training split, or one picture and no validation split.
    """
    options = arguments.data
    splits = load_splits(arguments, data_source(accelerator, arguments, image_size))
    if "train" not in splits:
        raise DatasetError(f"{options.data} has no train split, only {', '.join(splits)}: name a folder train/")
    seed = arguments.optimization.seed
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], options.validation_split, seed)
    check_common_concepts(splits["train"], splits["validation"], options.data)
    augmentation = Augmentation(**arguments.augmentation.settings())
    sampling = prompt_sampling(options, usual_negative_ratio(splits["train"]))
    logger.info("negative_ratio: %g of the prompts ask for what is not in the image", sampling.negative_ratio)
    train = TrainDataset(splits["train"], image_size, sampling, augmentation, seed)
    return train, EvalDataset(splits["validation"], image_size)


def load_unlabelled(
    accelerator: Accelerator, arguments: Arguments, image_size: int
) -> tuple[UnlabelledDataset, EvalDataset | datasets.Dataset]:
    """
    Pictures whose labels, if any, are not used in training, and what to evaluate on: a labelled validation split, or
    else pictures held out, as rows without objects.

    Raises:
        DatasetError: the dataset has faults or less than two pictures.
    """
    options, seed = arguments.data, arguments.optimization.seed
    source, phrases = data_source(accelerator, arguments, image_size), read_words(options.phrases)
    validation, opened = None, open_dataset(source)
    if is_labelled(source, opened):
        splits = load_splits(arguments, source, opened)
        rows, validation = splits["train"], splits.get("validation")
    else:
        rows = load_pictures(source, phrases or everyday_nouns(), options.check_images, opened)
        if options.validation_data is not None:
            validation = load_dataset_splits(
                {"validation": options.validation_data},
                options.validation_image_folder and {"validation": options.validation_image_folder},
                options.category_map,
                options.check_images,
            )["validation"]
    if validation is None:
        rows, held_out = hold_out(rows, options.validation_split, seed)
    else:
        held_out = EvalDataset(validation, image_size)
    asked = dict.fromkeys([*(phrases or concept_names(rows)), *read_words(options.negative_words)])
    augmentation = Augmentation(**arguments.augmentation.settings())
    sampling = prompt_sampling(options, NEGATIVE_RATIOS[0])
    train = UnlabelledDataset(rows, asked, image_size, sampling, augmentation, seed)
    return train, held_out


def data_source(accelerator: Accelerator, arguments: Arguments, image_size: int) -> str | Path:
    """What --data names; pictures are drawn first where it asks for that."""
    if arguments.data.data not in DRAWN:
        return arguments.data.data
    source = Path(arguments.output.output_dir) / "data"
    if accelerator.is_main_process:
        draw(arguments, source, image_size)
    accelerator.wait_for_everyone()
    return source


def load_splits(
    arguments: Arguments, source: str | Path, opened: datasets.Dataset | datasets.DatasetDict | None = None
) -> datasets.DatasetDict:
    """
    The splits of a labelled source, with those of --validation_data.

    Args:
        opened: what `open_dataset` made of the source, if that was done already.
    """
    options = arguments.data
    folders = options.image_folder
    if options.validation_data is not None:
        source = {"train": source, "validation": options.validation_data}
        folders = {"train": folders, "validation": options.validation_image_folder or folders}
    used = ("train", "validation") if options.check_images else False
    return load_dataset_splits(source, folders, options.category_map, used, opened)


def usual_negative_ratio(rows: datasets.Dataset) -> float:
    """
    The `negative_ratio` for a labelled split: the share of its pairs of an image and a class where the image does not
    show the class, within `NEGATIVE_RATIOS`. A model that is asked for fewer absent classes than there are learns to
    expect them.
    """
    counts = objects_per_category(rows)
    share = float((counts == 0).mean()) if counts.size else 0.0
    return round(min(max(share, NEGATIVE_RATIOS[0]), NEGATIVE_RATIOS[1]), 2)


def prompt_sampling(options: DataArguments, usual: float) -> PromptSampling:
    """How prompts are drawn; `usual` is the `negative_ratio` where none is given."""
    return PromptSampling(
        prompts_per_image=options.prompts_per_image,
        negative_ratio=usual if options.negative_ratio is None else options.negative_ratio,
        box_prompt_probability=options.box_prompt_probability,
        negative_words=read_words(options.negative_words),
        negative_words_ratio=options.negative_words_ratio,
    )


def draw(arguments: Arguments, folder: Path, image_size: int) -> None:
    """Writes the pictures that --data names instead of a path, unless a run that goes on has them."""
    options = arguments.data
    counts = {"train": options.generated_train, "valid": options.generated_valid}
    common = {"image_size": image_size, "seed": arguments.optimization.seed}
    if options.generated_concepts is not None:
        common["num_phrases" if options.data == "composed" else "num_concepts"] = options.generated_concepts
    finished, settings = folder / DRAWN_FILE, json.dumps({"data": options.data, **counts, **common})
    if finished.is_file() and finished.read_text(encoding="utf-8") == settings:
        return
    finished.unlink(missing_ok=True)
    if options.data == "composed":
        write_composed(folder, counts, **common)
    else:
        write_dataset(folder, num_train=counts["train"], num_valid=counts["valid"], **common)
    finished.write_text(settings, encoding="utf-8")


def warn_of_crowds(train: TrainDataset, validation: EvalDataset, num_queries: int) -> None:
    """Logs which images have more objects of one concept than the model has queries."""
    for name, data in (("training", train), ("validation", validation)):
        images, most = crowded_images(data.rows, num_queries)
        if images:
            text = (
                "%d %s images have more objects of one concept than the model has queries (%d), which finds at most "
                "one each; --num_queries %d is enough for all: %s"
            )
            logger.warning(text, len(images), name, num_queries, most, first_of(images))


def read_words(path: str | None) -> tuple[str, ...]:
    """The phrases of a text file; none without one. See [`read_phrases`]."""
    return () if path is None else read_phrases(path)
