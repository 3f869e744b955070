"""Faults of a dataset that are found, named and counted before the first step; what is read in their place."""

import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_cases import CATEGORIES, HEIGHT, WIDTH, annotation, damage, image, load_error, write_coco, write_roboflow
from PIL import Image

from sam3_hf import rle
from sam3_hf.data import EvalDataset, TrainDataset, checks, decoding, images, load_dataset_splits
from sam3_hf.reading import read_image
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.data import load_data, warn_of_crowds

HUGE = 10**400
SURROGATE = "\ud800"  # half of a character


# Boxes, masks and flags

FAR = {"bbox": [70, 50, 30, 20]}
NOTHING = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
LINE = [[10, 15, 40, 35, 25, 25]]
FAULTS = [
    ("box in 0..1", {"bbox": [0.1, 0.2, 0.3, 0.4], "segmentation": None}, f"multiply x and width by {WIDTH}"),
    ("box in 0..1", {"bbox": [0.1, 0.2, 0.3, 0.4], "segmentation": [[0.1, 0.2, 0.4, 0.2, 0.4, 0.6]]}, "pixels"),
    ("box in 0..1", {"bbox": [0, 0, 1, 1], "segmentation": None}, "pixels are meant"),
    ("mask far from its box", FAR, "that of the segmentation is [10, 15, 30, 20]"),
    ("empty mask", {"segmentation": NOTHING}, "outline the object"),
    ("empty mask", {"segmentation": LINE}, "outline the object"),
    ("malformed iscrowd", {"iscrowd": "no"}, "write 0 for an object"),
    ("malformed iscrowd", {"iscrowd": 2}, "write 0"),
    ("malformed iscrowd", {"iscrowd": [1]}, "write 0"),
]


@pytest.mark.parametrize("kind, changes, words", FAULTS)
def test_fault_of_an_object(tmp_path, kind, changes, words):
    write_coco(tmp_path, [image(1)], [annotation(1), annotation(42, **changes)])
    error = load_error(tmp_path)
    assert error.counts == {kind: 1}
    (line,) = [line for line in str(error).splitlines() if "annotation 42" in line]
    assert f"[{kind}] 1.png, annotation 42: " in line and words in line


def test_objects_that_look_odd_and_are_right(tmp_path):
    pixel = {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
    thin = {"bbox": [10, 15, 30, 0.4], "segmentation": [[10, 15, 40, 15, 40, 15.4]]}
    small = {"bbox": [20, 20, 1, 1], "segmentation": [[21, 21, 22, 21, 22, 22, 21, 22]]}  # one pixel beside its box
    hidden = {"bbox": [10, 15, 60, 40]}  # of which the mask shows a quarter
    crowd = {**FAR, "iscrowd": 1}
    entries = [annotation(index, **changes) for index, changes in enumerate([pixel, thin, small, hidden, crowd])]
    write_coco(tmp_path, [image(1)], entries)
    assert len(load_dataset_splits(tmp_path)["train"][0]["objects"]) == 5


def test_crowd_flags_as_text_are_read(tmp_path, caplog):
    flags = ["0", "1", 0, 1, True, None, 1.0]
    write_coco(tmp_path, [image(1)], [annotation(index, iscrowd=flag) for index, flag in enumerate(flags)])
    objects = load_dataset_splits(tmp_path)["train"][0]["objects"]
    assert [item["iscrowd"] for item in objects] == [False, True, False, True, True, False, True]
    assert "2 texts for 'iscrowd' read as numbers" in caplog.text


def test_check_looks_at_each_object_once_and_decodes_no_mask(tmp_path, monkeypatch):
    """100,000 annotations take seconds: work is linear, and that of a mask does not grow with the image's pixels."""
    calls = {"check_object": 0, "decode": 0}

    def counted(name, function):
        def wrapper(*args):
            calls[name] += 1
            return function(*args)

        return wrapper

    monkeypatch.setattr(checks, "check_object", counted("check_object", checks.check_object))
    monkeypatch.setattr(rle.mask_api, "decode", counted("decode", rle.mask_api.decode))
    runs = {
        "size": [HEIGHT, WIDTH],
        "counts": rle.encode_segmentation([[10, 15, 40, 15, 40, 35]], HEIGHT, WIDTH)["counts"],
    }
    write_coco(
        tmp_path, [image(1), image(2)], [annotation(index, 1 + index % 2, segmentation=runs) for index in range(50)]
    )
    load_dataset_splits(tmp_path)
    assert calls == {"check_object": 50, "decode": 0}


# Categories

LONG = " ".join(["very"] * 40)


@pytest.mark.parametrize(
    "names, words",
    [
        (["RBC", "rbc", "WBC"], "'RBC' and 'rbc': letters are made small"),
        (["red  cell", "Red cell"], "letters are made small"),
        ([f"{LONG} red cell", f"{LONG} white cell"], "only the first 32 tokens are read"),
    ],
)
def test_categories_that_are_one_to_the_model(tmp_path, names, words):
    categories = [{"id": 3 + index, "name": name} for index, name in enumerate(names)]
    file = write_coco(tmp_path, [image(1)], [annotation(1)], categories)
    error = load_error(tmp_path)
    assert error.counts == {"phrases alike to the model": 1}
    assert str(file) in str(error) and words in str(error) and "category_map" in str(error)
    load_dataset_splits(tmp_path, category_map={names[0]: names[1]})  # one concept


def test_long_phrases_that_differ_early_are_told_apart(tmp_path):
    categories = [{"id": 3, "name": f"red {LONG}"}, {"id": 4, "name": f"white {LONG}"}, {"id": 5, "name": LONG[:60]}]
    write_coco(tmp_path, [image(1)], [annotation(1)], categories)
    load_dataset_splits(tmp_path)


def arguments(data, *flags):
    return parse_arguments(["--data", str(data), "--prompts_per_image", "2", *flags])


def test_validation_split_with_other_categories(tmp_path, caplog):
    write_coco(tmp_path / "train", [image(1)], [annotation(1)])
    write_coco(tmp_path / "valid", [image(1)], [annotation(1, category_id=7), annotation(2)])
    load_data(SimpleNamespace(), arguments(tmp_path), 64)
    assert "the validation split has objects of 1 concepts that no training image shows: 'WBC' (1)" in caplog.text
    write_coco(tmp_path / "valid", [image(1)], [annotation(1, category_id=7)])
    with pytest.raises(ValueError, match=r"no concept of the validation split \(WBC\) .* \(RBC\): .*--category_map"):
        load_data(SimpleNamespace(), arguments(tmp_path), 64)
    write_coco(tmp_path / "valid", [image(1)], [])
    load_data(SimpleNamespace(), arguments(tmp_path), 64)  # nothing to find is not something else


# Damaged images


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The images that the check decodes."""
    files, load = [], decoding.load_image

    def noted(source, width, height):
        files.append(os.path.basename(source["path"] or "embedded"))
        return load(source, width, height)

    monkeypatch.setattr(decoding, "load_image", noted)
    return files


def test_damage_in_the_middle_of_an_image_is_found(tmp_path, cache):
    folder = write_roboflow(tmp_path / "data")
    damage(folder / "train" / "2.png")
    damage(folder / "valid" / "3.png")
    error = load_error(folder)
    assert error.counts == {"unreadable image": 2}
    assert "[unreadable image] 2.png: cannot decode image" in str(error) and "replace the file" in str(error)
    splits = load_dataset_splits(folder, check_images=False)
    with pytest.raises(OSError, match="2.png"):
        EvalDataset(splits["train"], 64)[1]
    assert load_error(folder, check_images=["train"]).counts == {"unreadable image": 1}
    with pytest.raises(ValueError, match="2.png"):
        load_data(SimpleNamespace(), arguments(folder), 64)
    load_data(SimpleNamespace(), arguments(folder, "--check_images", "false"), 64)


def test_images_found_sound_are_not_decoded_again(tmp_path, cache, decoded):
    folder = write_roboflow(tmp_path / "data")
    damage(folder / "train" / "2.png")
    load_error(folder)
    assert sorted(decoded) == ["1.png", "1.png", "2.png", "2.png", "3.png", "3.png", "4.png", "4.png"]
    decoded.clear()
    load_error(folder)
    assert decoded == ["2.png"]
    write_coco(folder / "train", [image(2)], [annotation(1, 2)])
    os.utime(folder / "valid" / "3.png", ns=(1, 1))
    decoded.clear()
    load_dataset_splits(folder)
    assert sorted(decoded) == ["2.png", "3.png"]


def test_what_was_decoded_before_an_interruption_is_remembered(tmp_path, cache, decoded, monkeypatch):
    folder = write_coco(tmp_path / "data", [image(number) for number in (1, 2, 3)], [annotation(1)]).parent
    monkeypatch.setattr(decoding, "CHECK_THREADS", 1)
    fault = decoding.decoding_fault

    def interrupted(split, position):
        if position == 2:
            raise KeyboardInterrupt
        return fault(split, position)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding, "decoding_fault", interrupted)
        load_dataset_splits(folder)
    decoded.clear()
    load_dataset_splits(folder)
    assert decoded == ["3.png"]


def test_a_cache_that_cannot_be_written_or_read_costs_time_only(tmp_path, cache, decoded, caplog):
    folder = write_coco(tmp_path / "data", [image(1)], [annotation(1)]).parent
    load_dataset_splits(folder)
    (memory,) = (cache / "sam3_hf").glob("*.json")
    memory.write_text("[{")
    load_dataset_splits(folder)
    assert decoded == ["1.png", "1.png"] and len(json.loads(memory.read_text())) == 1
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    load_dataset_splits(folder)
    assert decoded == ["1.png"] * 3 and "will be decoded again" in caplog.text


# Images of more than 8 bits, or of several frames


@pytest.fixture
def untold(monkeypatch):
    monkeypatch.setattr(images, "_told", set())


def save_pixels(path, values) -> dict:
    """A picture whose left half has the first value and whose right half has the second."""
    Image.fromarray(np.repeat(np.asarray(values)[None], HEIGHT, 0).repeat(WIDTH // 2, 1)).save(path)
    return {"path": str(path), "bytes": None}


def save_16_bit_colour(path, value: int) -> dict:
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", value) * 3 * WIDTH) * HEIGHT
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return {"path": str(path), "bytes": None}


@pytest.mark.parametrize(
    "name, dtype, values, expected, bits",
    [
        ("a.png", np.uint16, [0, 4080], [0, 255], 12),
        ("a.png", np.uint16, [16, 200], [16, 200], 8),
        ("a.png", np.uint16, [4080, 65280], [15, 255], None),
        ("a.png", np.uint16, [0, 0], [0, 0], None),
        ("a.tif", np.uint16, [0, 4080], [0, 255], 12),
        ("a.tif", np.int32, [0, 4080], [0, 255], 12),
        ("a.tif", np.int32, [0, 65280], [0, 255], None),
        ("a.tif", np.float32, [0, 0.6], [0, 153], None),
    ],
)
def test_deep_grey_is_scaled_and_said(tmp_path, caplog, untold, name, dtype, values, expected, bits):
    source = save_pixels(tmp_path / name, np.array(values, dtype))
    for _ in range(2):
        pixels, _ = images.load_image(source, WIDTH, HEIGHT)
        assert pixels[:, 0, [0, -1]].tolist() == [expected] * 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (bits is not None)  # once, for all images alike
    assert bits is None or (str(tmp_path / name) in said[0] and f"was read as of {bits} bits" in said[0])
    caplog.clear()
    assert torch.equal(read_image(source["path"]), pixels)  # as `predict` reads it
    assert [str(tmp_path / name) in record.getMessage() for record in caplog.records] == [True] * (bits is not None)


@pytest.mark.parametrize("dtype, values", [("float32", [0, 1.5]), ("float32", [-1, 0]), ("int32", [0, 70000])])
def test_deep_grey_of_no_known_range_is_refused(tmp_path, dtype, values):
    write_coco(tmp_path, [image(1, file_name="1.tif")], [annotation(1)])
    source = save_pixels(tmp_path / "1.tif", np.array(values, dtype))
    error = load_error(tmp_path)
    assert error.counts == {"unreadable image": 1}
    mode = "F" if dtype == "float32" else "I"
    assert f"(mode {mode}) from {values[0]} to {values[1]}" in str(error) and "8 bits" in str(error)
    with pytest.raises(OSError, match="1.tif.*mode"):
        read_image(source["path"])


def test_colour_of_16_bits_that_would_be_black_is_refused(tmp_path):
    bright, dark = (save_16_bit_colour(tmp_path / f"{name}.png", value) for name, value in (("a", 40000), ("b", 4000)))
    pixels, _ = images.load_image(bright, WIDTH, HEIGHT)
    assert (pixels == 40000 >> 8).all()
    assert torch.equal(read_image(bright["path"]), pixels)  # as `predict` reads it
    with pytest.raises(OSError, match="b.png.*colour of 16 bits"):
        images.load_image(dark, WIDTH, HEIGHT)
    for read in (read_image, lambda path: read_image(Image.open(path))):
        with pytest.raises((OSError, ValueError), match="colour of 16 bits that uses 12 at most"):
            read(dark["path"])


def test_first_frame_of_a_gif_is_used_and_said(tmp_path, caplog, untold):
    frames = [Image.new("P", (WIDTH, HEIGHT), color) for color in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    frames[0].save(tmp_path / "1.gif", save_all=True, append_images=frames[1:])
    pixels, _ = images.load_image({"path": str(tmp_path / "1.gif"), "bytes": None}, WIDTH, HEIGHT)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert "1.gif: has several frames or pages, of which the first is used" in caplog.text


# More objects than queries


def test_images_with_more_objects_than_queries_are_named(tmp_path, caplog):
    entries = [image(number) for number in range(1, 15)]
    crowded = [annotation(100 * number + index, number) for number in range(2, 15) for index in range(4)]
    write_coco(tmp_path / "train", entries, [annotation(1), *crowded, annotation(9999, 2)])
    write_coco(tmp_path / "valid", entries[:1], [annotation(1)])
    splits = load_dataset_splits(tmp_path)
    train, valid = TrainDataset(splits["train"], 64), EvalDataset(splits["validation"], 64)
    warn_of_crowds(train, valid, 3)
    assert "13 training images have more objects of one concept than the model has queries (3)" in caplog.text
    assert "--num_queries 5 is enough for all: 2.png (5 'RBC'), 3.png (4 'RBC')" in caplog.text
    assert "11.png" in caplog.text and "12.png" not in caplog.text and "validation images" not in caplog.text
    caplog.clear()
    warn_of_crowds(train, valid, 5)
    assert not caplog.records


def test_images_with_too_many_objects_to_train_on_are_named(tmp_path, caplog):
    entries = [annotation(index, 2) for index in range(201)]
    write_coco(tmp_path, [image(1), image(2)], [annotation(999), *entries], CATEGORIES[:1])
    TrainDataset(load_dataset_splits(tmp_path)["train"], 64)
    assert "more than 200 objects in an image are not asked for there: 1 cases, in 1 images: 2.png (201" in caplog.text
    assert "1 images left out: no concept can be asked for in them: 2.png" in caplog.text


# Files that no tool should write

BROKEN_ENTRIES = [
    ("images", {"id": HUGE}, "malformed id"),
    ("images", {"id": 2**63}, "malformed id"),
    ("images", {"id": True}, "malformed id"),
    ("images", {"width": HUGE}, "invalid image size"),
    ("images", {"width": True}, "invalid image size"),
    ("images", {"width": 2**31}, "invalid image size"),
    ("images", {"file_name": f"{SURROGATE}.png"}, "malformed file_name"),
    ("images", {"file_name": ["1.png"]}, "malformed file_name"),
    ("images", {"file_name": "1\0.png"}, "malformed file_name"),
    ("annotations", {"id": 2**63}, "malformed id"),
    ("annotations", {"id": {"a": "\n"}}, "malformed id"),
    ("annotations", {"category_id": HUGE}, "malformed id"),
    ("annotations", {"bbox": [True, False, True, True]}, "malformed box"),
    ("annotations", {"bbox": [HUGE, 15, 30, 20]}, "malformed box"),
    ("annotations", {"bbox": [float("nan"), 15, 30, 20]}, "malformed box"),
    ("annotations", {"bbox": [float("inf"), 15, 30, 20]}, "malformed box"),
    ("annotations", {"segmentation": [[10, 15, 40, 15, 40, True]]}, "invalid polygon"),
    ("annotations", {"segmentation": [[10, 15, 40, 15, 40, HUGE]]}, "invalid polygon"),
    ("annotations", {"segmentation": {"size": 5, "counts": [9600]}}, "invalid run-length encoding"),
    ("annotations", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HUGE]}}, "invalid run-length encoding"),
    ("annotations", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": {}}}, "invalid run-length encoding"),
    ("annotations", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "é" * 4}}, "invalid run-length encoding"),
    ("categories", {"name": f"cell{SURROGATE}"}, "malformed category name"),
    ("categories", {"name": ["cell"]}, "malformed category name"),
    ("categories", {"id": -(2**63) - 1}, "malformed id"),
]


@pytest.mark.parametrize("kind, changes, problem", BROKEN_ENTRIES)
def test_broken_entry_is_named_in_one_line(tmp_path, kind, changes, problem):
    content = {"images": [image(1)], "annotations": [annotation(42)], "categories": CATEGORIES[:1]}
    file = write_coco(tmp_path, *content.values())
    content[kind] = [{**content[kind][0], **changes}]
    file.write_text(json.dumps(content))
    error = load_error(tmp_path)
    assert error.counts[problem] == 1
    lines = [line for line in str(error).splitlines() if line.startswith(f"  [{problem}] ")]
    assert len(lines) == 1 and len(lines[0]) < 500 and lines[0].isprintable()


@pytest.mark.parametrize(
    "changes", [{"supercategory": ["none"]}, {"supercategory": {}}, {"area": HUGE}, {"extra": HUGE}]
)
def test_odd_values_of_what_is_not_needed_do_no_harm(tmp_path, changes):
    write_coco(tmp_path, [image(1, **changes)], [annotation(1, **changes)], [{**CATEGORIES[0], **changes}])
    (item,) = load_dataset_splits(tmp_path)["train"][0]["objects"]
    assert item["area"] == 600


def test_numbers_as_category_names(tmp_path):
    write_coco(tmp_path, [image(1)], [annotation(1)], [{"id": 3, "name": 7}])
    assert load_dataset_splits(tmp_path)["train"].features["objects"].feature["category"].names == ["7"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"images": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"images": [\n}', "not valid JSON"),
        ("\ufeff[]", "lacks the list 'images'"),
    ],
)
def test_broken_file_is_named_in_one_line(tmp_path, text, words):
    file = write_coco(tmp_path, [image(1)], [annotation(1)])
    file.write_text(text)
    message = str(load_error(tmp_path))
    assert str(file) in message and words in message and "\n" not in message


def test_byte_order_mark_is_read(tmp_path):
    file = write_coco(tmp_path, [image(1)], [annotation(1)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_dataset_splits(tmp_path)["train"]) == 1
