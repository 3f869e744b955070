"""A valid COCO file, broken at random: it is read and can be trained on, or refused in words, and nothing else."""

import copy
import json
import random
from pathlib import Path

import pytest
from data_cases import HEIGHT, WIDTH, annotation, image, write_coco

from sam3_hf.data import DatasetError, EvalDataset, TrainDataset, load_dataset_splits
from sam3_hf.rle import encode_segmentation

OUTLINE = annotation(1)["segmentation"]
COLUMNS = {"size": [HEIGHT, WIDTH], "counts": [10 * HEIGHT, 30 * HEIGHT, 80 * HEIGHT]}
DEEP = json.loads("[" * 300 + "]" * 300)
ODD = [None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float("nan"), float("-inf")]
ODD += ["", "0", "1", "x", "\ud800", "\0", "line\nbreak", "../x.png", "none", "é" * 500, "~" * 50, [], [[]], {}, DEEP]
ODD += [[1, 2, 3, 4], [[1, 2, 3]], {"size": 5, "counts": "a"}, {"size": [HEIGHT, WIDTH], "counts": "0" * 9}]


def valid_content() -> dict:
    compressed = encode_segmentation(OUTLINE, HEIGHT, WIDTH)
    columns = {"bbox": [10, 0, 30, HEIGHT], "segmentation": COLUMNS}
    annotations = [
        annotation(1),
        annotation(2, segmentation=compressed),
        annotation(3, 2, 7, **columns, area=None),
        annotation(4, 2, 3, **columns, iscrowd=1),
        annotation(5, 3, 9, segmentation=None),
    ]
    categories = [{"id": index, "name": name, "supercategory": "cell"} for index, name in [(3, "RBC"), (7, "WBC")]]
    categories += [{"id": 9, "name": "cell", "supercategory": "none"}]
    content = {"images": [image(1), image(2), image(3)], "annotations": annotations, "categories": categories}
    return json.loads(json.dumps({"info": {"year": 2025}, **content}))  # no part of it is shared


def nodes_of(content) -> list[tuple]:
    """(container, key) of every value in the tree."""
    found, left = [], [content]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                left.append(container[key])
    return found


def mutate(content: dict, rng: random.Random) -> None:
    """Changes one value of the tree, takes it away, or doubles it."""
    nodes = nodes_of(content)
    if not nodes:
        return
    container, key = rng.choice(nodes)
    other, its_key = rng.choice(nodes)
    change = rng.choice(["odd", "odd", "odd", "delete", "swap", "double", "number", "wrap"])
    value = container[key]
    if change == "delete":
        del container[key]
    elif change == "swap":
        container[key] = copy.deepcopy(other[its_key])
    elif change == "double" and isinstance(container, list):
        container.append(copy.deepcopy(value))
    elif change == "number" and type(value) in (int, float):
        container[key] = rng.choice([-value, value + 1, value * 10**6, str(value), value / 1000])
    elif change == "wrap":
        container[key] = rng.choice([[value], {"value": value}])
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))


def mutate_text(text: bytes, rng: random.Random) -> bytes:
    """Changes, takes away or doubles a few bytes."""
    start = rng.randrange(len(text))
    end = min(start + rng.choice([1, 1, 2, 20, 400]), len(text))
    middle = rng.choice([b"", bytes(rng.randrange(256) for _ in range(end - start)), text[start:end] * 2, b"[", b'"'])
    return text[:start] + middle + text[end:]


def outcome(file: Path) -> str:
    """ "loaded" or "refused"; whatever else is raised fails the test."""
    try:
        rows = load_dataset_splits(file)["train"]
    except DatasetError as error:
        lines = str(error).splitlines()
        assert lines and all(line.isprintable() and len(line) < 1000 for line in lines), str(error)
        assert len(lines) == 1 or lines[0].endswith("to correct in the dataset:"), str(error)
        return "refused"
    if len(rows):
        data = EvalDataset(rows, 32)
        for index in range(len(data)):
            assert len(data[index].labels) == len(data.concepts)
        if data.concepts:
            assert TrainDataset(rows, 32)[0].phrases
    return "loaded"


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_broken_files_are_read_or_refused(tmp_path, count):
    content = valid_content()
    file = write_coco(tmp_path, content["images"], content["annotations"])
    file.write_text(json.dumps(content))
    assert outcome(file) == "loaded"
    rng, outcomes = random.Random(count), []
    for _ in range(count):
        broken = copy.deepcopy(content)
        for _ in range(rng.choice([1, 1, 1, 3])):
            mutate(broken, rng)
        text = json.dumps(broken).encode()
        file.write_bytes(mutate_text(text, rng) if rng.random() < 0.2 else text)
        outcomes.append(outcome(file))
    assert set(outcomes) == {"loaded", "refused"}
