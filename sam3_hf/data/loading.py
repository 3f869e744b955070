"""The way in: from what a user has to checked `datasets` splits."""

import glob
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import yaml

from ..errors import joined
from .checks import DatasetError, Problems, check_dataset
from .coco import find_annotation_files, find_roboflow_files, read_coco, split_name
from .concepts import check_phrases, warn_of_unseen_concepts
from .decoding import decode_images
from .formats import Found, find_format
from .objects import read_objects
from .rows import RawSplit, build_dataset

logger = logging.getLogger(__name__)

Source = str | Path
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


def load_dataset_splits(
    data: Source | Mapping[str, Source],
    image_folder: Source | Mapping[str, Source] | None = None,
    category_map: Source | Mapping[str, str] | None = None,
    check_images: bool | Collection[str] = True,
    opened: datasets.Dataset | datasets.DatasetDict | None = None,
) -> datasets.DatasetDict:
    """Reads a dataset, checks and repairs it, and brings it into one row schema (see `sam3_hf.data.rows`).

    Args:
        data: one of
            a folder in the Roboflow layout (train/, valid/, test/ with _annotations.coco.json, images beside it or
            under images/);
            a COCO file, or a folder with annotations/instances_train.json and the like, as CVAT writes it;
            a folder of YOLO (or its data.yaml), Pascal VOC or LabelMe, or of pictures with masks (see
            `sam3_hf.data.formats`);
            {split: COCO file, or folder of one split};
            a folder written by `datasets` (`save_to_disk`, parquet) or a repository of the Hub with the columns
            `image` and `objects` (see `sam3_hf.data.objects`).
        image_folder: for COCO files: where their file names start, or {split: folder}; default: the folder of the
            file, or images/ in it.
        category_map: YAML file, or dict, {category name: phrase to prompt with}; names left out stay as they are, two
            names with one phrase become one concept.
        check_images: whether every image is decoded once (and not again while its file stays as it is; see
            `sam3_hf.data.decoding`), or the splits whose images are. All are checked by their headers in any case.
        opened: what `open_dataset` made of `data`, if that was done already.

    Returns:
        {"train": ..., "validation": ..., "test": ...}, those that there are. Concepts are the same in all splits:
        `concept_names(split)`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        DatasetError: the dataset has faults; the message lists the first ten and counts each kind. Or the category map
            has an unknown name, or leaves numbers without a name; or two phrases are one to the model.
    """
    problems = Problems()
    splits = read_splits(data, image_folder, problems, opened)
    return prepare_splits(splits, category_map, check_images, problems)


def prepare_splits(
    splits: list[RawSplit],
    category_map: Source | Mapping[str, str] | None,
    check_images: bool | Collection[str],
    problems: Problems,
) -> datasets.DatasetDict:
    """
    Checks and repairs what `read_splits` returns, in place, and brings it into one row schema; arguments and errors as
    of `load_dataset_splits`.
    """
    names = list(dict.fromkeys(name for split in splits for name in split.category_names))
    category_map = read_category_map(category_map, names)
    unnamed = [name for name in names if name not in category_map]
    if unnamed and any(split.numbered for split in splits):
        raise DatasetError(
            f"categories {', '.join(unnamed[:10])} are numbers without a name; give a category_map, "
            f"e.g. '{unnamed[0]}: red blood cell'"
        )
    phrases = [category_map.get(name, name) for name in names]
    concepts = list(dict.fromkeys(phrases))
    check_phrases(concepts, " and ".join(dict.fromkeys(split.source for split in splits)), problems)
    check_dataset(splits, problems)
    for split in splits:
        if check_images is True or (check_images and split.name in check_images):
            decode_images(split, problems)
    problems.raise_if_any()
    if len(concepts) < len(names):
        logger.info("the category map merges %d categories into %d concepts", len(names), len(concepts))
    category_index = {name: concepts.index(phrase) for name, phrase in zip(names, phrases, strict=True)}
    for split in splits:
        _log_counts(split, len(concepts))
    result = datasets.DatasetDict({split.name: build_dataset(split, concepts, category_index) for split in splits})
    warn_of_unseen_concepts(result)
    return result


def _log_counts(split: RawSplit, concepts: int) -> None:
    regions = [item for row in split.rows for item in row["objects"]]
    objects = [item for item in regions if not item["iscrowd"]]
    text = "%s: %d images (%d without annotations), %d objects, %d crowd regions, %d concepts"
    empty = sum(not row["objects"] for row in split.rows)
    logger.info(text, split.name, len(split.rows), empty, len(objects), len(regions) - len(objects), concepts)
    bare = sum(item["segmentation"] is None for item in objects)
    if 0 < bare < len(objects):
        text = (
            "%s: %d of %d objects have no segmentation: a prompt with one of them is trained by boxes alone, and an "
            "evaluation of this split scores boxes, not masks; give these objects a segmentation or remove them"
        )
        logger.warning(text, split.source, bare, len(objects))


def read_category_map(category_map: Source | Mapping[str, str] | None, names: list[str]) -> dict[str, str]:
    """{category name: phrase} from a YAML file or a dict.

    Args:
        names: the categories of the dataset.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: not a mapping of names to phrases, or a key is not a category; the message lists those known.
    """
    if category_map is None:
        return {}
    where = "category_map"
    if not isinstance(category_map, Mapping):
        where = f"category map {category_map}"
        with open(category_map, encoding="utf-8") as file:
            try:
                # BaseLoader leaves everything text, so that a category named 'no' or '0' stays one
                category_map = yaml.load(file, Loader=yaml.BaseLoader)
            except yaml.YAMLError as error:
                raise DatasetError(joined(f"{where} is not valid YAML: {error}")) from error
    if not isinstance(category_map, Mapping):
        raise DatasetError(f"{where} must hold one 'category: phrase' a line")
    category_map = {str(name): phrase for name, phrase in category_map.items()}
    unknown = [name for name in category_map if name not in names]
    if unknown:
        raise DatasetError(f"{where}: unknown categories {', '.join(unknown)}; those known are {', '.join(names)}")
    for name, phrase in category_map.items():
        if not isinstance(phrase, str) or not phrase.strip():
            raise DatasetError(f"{where}: '{name}' must be followed by a phrase, got {phrase!r}")
    return {name: phrase.strip() for name, phrase in category_map.items()}


def read_splits(data, image_folder, problems: Problems, opened=None) -> list[RawSplit]:
    """The splits of a dataset as they are, before the checks; arguments as of `load_dataset_splits`."""
    if isinstance(data, Mapping) and any(os.path.isdir(source) or find_format(source) for source in data.values()):
        folders = image_folder if isinstance(image_folder, Mapping) else dict.fromkeys(data, image_folder)
        return [_only_split(name, source, folders.get(name), problems) for name, source in data.items()]
    files = _coco_files(data)
    if files:
        folders = image_folder if isinstance(image_folder, Mapping) else dict.fromkeys(files, image_folder)
        folders = {split_name(name): Path(folder) for name, folder in folders.items() if folder is not None}
        if not folders.keys() <= files.keys():
            raise DatasetError(f"image_folder has {', '.join(folders)}; the dataset has {', '.join(files)}")
        return [read_coco(name, file, folders.get(name), problems) for name, file in files.items()]
    if image_folder is not None:
        raise DatasetError(f"image_folder is for COCO files; {data} is not one")
    found = None if opened is not None else _find_format(data)
    if found:
        logger.info("%s is read as %s", data, found.format)
        return _without_unlabelled_test([read(problems) for read in found.splits.values()])
    loaded = load_with_datasets(str(data)) if opened is None else opened
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    return [read_objects(split_name(name), split, str(data), problems) for name, split in loaded.items()]


def format_of(data: Source) -> str:
    """The name of the format that `read_splits` takes a dataset for; errors as there."""
    if _coco_files(data):
        return "COCO"
    found = _find_format(data)
    return found.format if found else "datasets"


def _find_format(data: Source) -> Found | None:
    """As `find_format`; None for what `datasets` wrote."""
    return None if is_saved(str(data)) else find_format(data)


def _only_split(name: str, source: Source, image_folder, problems: Problems) -> RawSplit:
    """The one split of a source, under another name."""
    splits = read_splits(source, image_folder, problems)
    if len(splits) != 1:
        listed = ", ".join(split.name for split in splits)
        raise DatasetError(f"{source} holds the splits {listed}, where one is meant for {name}: name a folder of it")
    return replace(splits[0], name=split_name(name))


def _without_unlabelled_test(splits: list[RawSplit]) -> list[RawSplit]:
    """The splits but for a test split whose labels were not given away."""
    empty = [split for split in splits if split.name == "test" and not any(row["objects"] for row in split.rows)]
    for split in empty:
        logger.info("%s: the test split has no labels; left out", split.source)
    return [split for split in splits if split not in empty]


def _coco_files(data) -> dict[str, Path]:
    """{split: COCO file}; empty if `data` is for the `datasets` library."""
    if isinstance(data, Mapping):
        files = {split_name(name): Path(file) for name, file in data.items()}
        if len(files) < len(data):
            raise DatasetError(f"two of the splits {', '.join(data)} are the same")
    elif str(data).endswith(".json"):
        files = {"train": Path(data)}
    else:
        files = find_roboflow_files(Path(data)) or find_annotation_files(Path(data))
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"there is no annotation file {file}")
    return files


def open_dataset(data: Source | Mapping[str, Source]) -> datasets.Dataset | datasets.DatasetDict | None:
    """What the `datasets` library has to open: neither annotated in files nor pictures alone, for which it is None."""
    if isinstance(data, Mapping) or _coco_files(data) or _find_format(data) or is_picture_source(str(data)):
        return None
    return load_with_datasets(str(data))


def is_labelled(data: Source | Mapping[str, Source], opened: datasets.Dataset | datasets.DatasetDict | None) -> bool:
    """
    Whether these are annotated in files, or a dataset with `objects`, rather than pictures alone.

    Args:
        opened: what `open_dataset` made of them.
    """
    if opened is None:
        return bool(_coco_files(data) or _find_format(data))
    splits = [opened] if isinstance(opened, datasets.Dataset) else opened.values()
    return all("objects" in split.features for split in splits)


def is_picture_source(data: str) -> bool:
    """Whether this is a folder, a file or a pattern that `datasets` did not write."""
    return not is_saved(data) and (os.path.lexists(data) or glob.has_magic(data))


def is_saved(data: str) -> bool:
    """Whether this is a folder that `datasets` wrote."""
    return any(os.path.isfile(os.path.join(data, name)) for name in SAVED_BY_DATASETS)


def load_with_datasets(data: str) -> datasets.Dataset | datasets.DatasetDict:
    """
    A folder that `datasets` wrote, or a repository of the Hub.

    Raises:
        FileNotFoundError: a path to nothing, or a folder without data.
        ConnectionError: it is no path, and the Hub cannot be reached.
    """
    folder = Path(data)
    if is_saved(data):
        return datasets.load_from_disk(data)
    if not folder.exists() and (folder.is_absolute() or data.startswith(".") or data.count("/") > 1):
        raise FileNotFoundError(f"there is no dataset {data}: neither a file or folder, nor 'owner/name' of the Hub")
    try:
        return datasets.load_dataset(data)
    except (ConnectionError, FileNotFoundError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        where = f"in {data}" if folder.exists() else f"{data}: no such file or folder, and none of the Hub"
        raise kind(joined(f"there is no dataset {where} ({error}): correct the path or name")) from error
