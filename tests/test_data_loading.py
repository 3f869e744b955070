"""Reading datasets in all their forms, and what the check before training finds in them."""

import json
import logging
import os

import datasets
import numpy as np
import pytest
from data_cases import CATEGORIES, HEIGHT, WIDTH, annotation, image, load_error, save_image, write_coco, write_roboflow
from faster_coco_eval.core import mask as mask_api
from PIL import Image

from sam3_hf.data import concept_names, has_masks, load_dataset_splits, segmentation_of
from sam3_hf.data.images import load_image
from sam3_hf.rle import decode_mask, encode_segmentation

RECTANGLE = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
RECTANGLE[15:35, 10:40] = 1


def rle_of(mask: np.ndarray, compressed: bool) -> dict:
    if compressed:
        rle = mask_api.encode(np.asfortranarray(mask))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    columns = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns]))).tolist()
    counts = np.diff([0, *edges, len(columns)]).tolist()
    return {"size": list(mask.shape), "counts": counts}


def decode(item: dict) -> np.ndarray:
    return decode_mask(encode_segmentation(segmentation_of(item), HEIGHT, WIDTH))


# Forms of input


def test_roboflow_layout(tmp_path):
    splits = load_dataset_splits(write_roboflow(tmp_path))
    assert set(splits) == {"train", "validation"}
    train = splits["train"]
    assert concept_names(train) == ["RBC", "WBC", "platelet"] and has_masks(train)
    assert [len(row["objects"]) for row in train] == [0, 2, 2, 4]  # the first image has no annotations
    second = train[1]
    assert (second["image_id"], second["width"], second["height"]) == (2, WIDTH, HEIGHT)
    assert second["image"]["path"] == str(tmp_path / "train" / "2.png")
    red, white = second["objects"]
    assert red["bbox"] == [2, 5, 20, 25] and red["category"] == 0 and red["id"] == 20 and not red["iscrowd"]
    assert segmentation_of(white) == [[50, 40, 90, 40, 70, 70]] and white["category"] == 1


def test_roboflow_images_in_a_folder_of_their_own(tmp_path):
    file = write_coco(tmp_path / "train", [image(1)], [annotation(1)])
    (tmp_path / "train" / "images").mkdir()
    (tmp_path / "train" / "1.png").rename(tmp_path / "train" / "images" / "1.png")
    assert load_dataset_splits(tmp_path)["train"][0]["image"]["path"] == str(file.parent / "images" / "1.png")


def test_coco_file_with_image_folder(tmp_path):
    file = write_coco(tmp_path / "labels", [image(1)], [annotation(1)], name="instances.json")
    (tmp_path / "labels" / "1.png").rename(tmp_path / "1.png")
    assert "missing image" in load_error(file).counts
    assert load_dataset_splits(file, image_folder=tmp_path)["train"][0]["image"]["path"] == str(tmp_path / "1.png")
    splits = load_dataset_splits({"train": file, "val": file}, image_folder={"train": tmp_path, "val": tmp_path})
    assert set(splits) == {"train", "validation"}
    assert "image_folder has test" in str(load_error(file, image_folder={"test": tmp_path}))
    with pytest.raises(FileNotFoundError, match="other.json"):
        load_dataset_splits(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="no dataset"):
        load_dataset_splits(tmp_path / "nothing")


def test_all_forms_of_segmentation_give_the_same_pixels(tmp_path):
    annotations = [
        annotation(1),
        annotation(2, segmentation=rle_of(RECTANGLE, compressed=True)),
        annotation(3, segmentation=rle_of(RECTANGLE, compressed=False)),
        annotation(4, segmentation=rle_of(RECTANGLE, compressed=False), iscrowd=1),
    ]
    write_coco(tmp_path, [image(1)], annotations)
    objects = load_dataset_splits(tmp_path)["train"][0]["objects"]
    for item in objects:
        np.testing.assert_array_equal(decode(item), RECTANGLE)
    assert [item["iscrowd"] for item in objects] == [False, False, False, True]


def test_boxes_only(tmp_path):
    write_coco(tmp_path, [image(1)], [annotation(1, segmentation=None), annotation(2, segmentation=[], area=None)])
    train = load_dataset_splits(tmp_path)["train"]
    assert not has_masks(train)
    assert [segmentation_of(item) for item in train[0]["objects"]] == [None, None]
    assert train[0]["objects"][1]["area"] == 600  # of the box


def test_objects_without_a_segmentation_among_others_are_counted(tmp_path, caplog):
    crowd = annotation(9, iscrowd=1, segmentation=None)
    file = write_coco(tmp_path, [image(1)], [annotation(1), annotation(2), crowd])
    assert has_masks(load_dataset_splits(tmp_path)["train"])  # a crowd region is no object
    assert "no segmentation" not in caplog.text
    write_coco(tmp_path, [image(1)], [annotation(1), annotation(2), annotation(3, segmentation=None), crowd])
    assert not has_masks(load_dataset_splits(tmp_path)["train"])
    assert f"{file}: 1 of 3 objects have no segmentation" in caplog.text
    caplog.clear()
    write_coco(tmp_path, [image(1)], [annotation(1, segmentation=None), crowd])
    assert not has_masks(load_dataset_splits(tmp_path)["train"])  # boxes only, as a whole
    assert "no segmentation" not in caplog.text
    write_coco(tmp_path, [image(1)], [annotation(1, iscrowd=1)])
    assert not has_masks(load_dataset_splits(tmp_path)["train"])


def test_missing_area_is_that_of_the_mask(tmp_path):
    triangle = annotation(1, area=None, segmentation=[[10, 15, 40, 15, 10, 35]])
    write_coco(tmp_path, [image(1)], [triangle])
    assert load_dataset_splits(tmp_path)["train"][0]["objects"][0]["area"] == pytest.approx(300, rel=0.05)


def test_concepts_are_the_union_over_splits(tmp_path):
    write_coco(tmp_path / "train", [image(1)], [annotation(1)], [{"id": 3, "name": "RBC"}])
    other = [{"id": 1, "name": "WBC"}, {"id": 2, "name": "RBC"}]  # the same name under another id
    write_coco(tmp_path / "valid", [image(1)], [annotation(1, category_id=2), annotation(2, category_id=1)], other)
    splits = load_dataset_splits(tmp_path)
    assert concept_names(splits["train"]) == concept_names(splits["validation"]) == ["RBC", "WBC"]
    assert [item["category"] for item in splits["validation"][0]["objects"]] == [0, 1]


def test_roboflow_project_category_is_left_out(tmp_path, caplog):
    categories = [
        {"id": 0, "name": "RBC", "supercategory": "none"},
        {"id": 3, "name": "RBC", "supercategory": "RBC"},
    ]
    write_coco(tmp_path, [image(1)], [annotation(1)], categories)
    with caplog.at_level(logging.INFO, "sam3_hf"):
        assert concept_names(load_dataset_splits(tmp_path)["train"]) == ["RBC"]
    assert "names the project" in caplog.text
    write_coco(tmp_path, [image(1)], [annotation(1), annotation(2, category_id=0)], categories)
    assert load_error(tmp_path).counts == {"duplicate category name": 1}  # now it is in use


# Repositories and folders of the datasets library


def objects_dataset(label, values, as_lists: bool = True, segmentation: bool = False) -> datasets.Dataset:
    fields = {"bbox": datasets.List(datasets.Value("float32")), "category": label}
    items = {"bbox": [[10, 15, 30, 20]] * len(values), "category": values}
    if segmentation:
        fields["segmentation"] = datasets.List(datasets.List(datasets.Value("float32")))
        items["segmentation"] = [annotation(1)["segmentation"]] * len(values)
    if as_lists:
        objects = {name: datasets.List(feature) for name, feature in fields.items()}
        rows = [items, {name: [] for name in items}]
    else:
        objects = datasets.List(fields)
        rows = [[dict(zip(items, entry, strict=True)) for entry in zip(*items.values(), strict=True)], []]
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_dict({"image": pictures, "objects": rows}, features=features)


@pytest.mark.parametrize("as_lists", [True, False])
def test_saved_dataset_with_class_labels(tmp_path, as_lists):
    label = datasets.ClassLabel(names=["RBC", "WBC"])
    dataset = objects_dataset(label, [1, 0], as_lists, segmentation=True)
    datasets.DatasetDict({"train": dataset, "valid": dataset}).save_to_disk(tmp_path / "saved")
    splits = load_dataset_splits(tmp_path / "saved", category_map={"RBC": "red blood cell"})
    assert set(splits) == {"train", "validation"}
    train = splits["train"]
    assert concept_names(train) == ["red blood cell", "WBC"]
    first, second = train
    assert (first["width"], first["height"], first["image_id"], second["image_id"]) == (WIDTH, HEIGHT, 0, 1)
    assert [item["category"] for item in first["objects"]] == [1, 0] and second["objects"] == []
    np.testing.assert_array_equal(decode(first["objects"][0]), RECTANGLE)
    pixels, _ = load_image(second["image"], WIDTH, HEIGHT)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]


def test_saved_dataset_with_text_or_numbers(tmp_path):
    objects_dataset(datasets.Value("string"), ["WBC", "RBC"]).save_to_disk(tmp_path / "text")
    assert concept_names(load_dataset_splits(tmp_path / "text")["train"]) == ["RBC", "WBC"]
    objects_dataset(datasets.Value("int64"), [10, 2]).save_to_disk(tmp_path / "numbers")
    assert "without a name" in str(load_error(tmp_path / "numbers"))
    train = load_dataset_splits(tmp_path / "numbers", category_map={"2": "cell", "10": "platelet"})["train"]
    assert concept_names(train) == ["cell", "platelet"]
    assert [item["category"] for item in train[0]["objects"]] == [1, 0]


def test_run_length_encodings_in_a_saved_dataset(tmp_path):
    """Fields that are all empty state that there is no segmentation; one that is missing alone is a fault."""
    runs = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}
    fields = {
        "bbox": datasets.List(datasets.Value("float32")),
        "category": datasets.ClassLabel(names=["RBC"]),
        "id": datasets.Value("int64"),
        "segmentation": runs,
    }
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(fields)})

    def save(name, *segmentations):
        objects = [
            {"bbox": [10, 15, 30, 20], "category": 0, "id": 40 + index, "segmentation": segmentation}
            for index, segmentation in enumerate(segmentations)
        ]
        row = {"image": [Image.new("RGB", (WIDTH, HEIGHT))], "objects": [objects]}
        datasets.Dataset.from_dict(row, features=features).save_to_disk(tmp_path / name)
        return tmp_path / name

    whole, nothing = rle_of(RECTANGLE, compressed=True), {"size": None, "counts": None}
    objects = load_dataset_splits(save("good", whole, nothing, None))["train"][0]["objects"]
    np.testing.assert_array_equal(decode(objects[0]), RECTANGLE)
    assert [segmentation_of(item) for item in objects[1:]] == [None, None]
    error = load_error(save("bad", whole, {"size": [HEIGHT, WIDTH], "counts": None}))
    assert error.counts == {"invalid run-length encoding": 1}
    assert "annotation 41" in str(error) and "'counts' is missing" in str(error)


def test_parquet_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = objects_dataset(datasets.ClassLabel(names=["RBC"]), [0])
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    train = load_dataset_splits(tmp_path / "data")["train"]
    assert concept_names(train) == ["RBC"] and len(train[0]["objects"]) == 1


def test_dataset_without_objects_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert "lacks the column 'image'; it has text" in str(load_error(tmp_path / "saved"))


# Category map


def test_category_map_file(tmp_path):
    folder, file = write_roboflow(tmp_path / "data"), tmp_path / "map.yaml"
    file.write_text("RBC: red blood cell\nWBC: white blood cell\n")
    train = load_dataset_splits(folder, category_map=file)["train"]
    assert concept_names(train) == ["red blood cell", "white blood cell", "platelet"]
    file.write_text("RBC: cell\nWBC: cell\n")
    train = load_dataset_splits(folder, category_map=file)["train"]
    assert concept_names(train) == ["cell", "platelet"]
    assert [item["category"] for item in train[1]["objects"]] == [0, 0]


def test_category_map_errors(tmp_path):
    folder, file = write_roboflow(tmp_path / "data"), tmp_path / "map.yaml"
    file.write_text("rbc: red blood cell\n")
    assert "unknown categories rbc; those known are RBC, WBC, platelet" in str(load_error(folder, category_map=file))
    file.write_text("RBC:\n")
    assert "'RBC' must be followed by a phrase" in str(load_error(folder, category_map=file))
    file.write_text("- RBC\n")
    assert "one 'category: phrase' a line" in str(load_error(folder, category_map=file))
    file.write_text("RBC: [\n")
    assert "not valid YAML" in str(load_error(folder, category_map=file))


# Checks

FATAL_ANNOTATIONS = {
    "box of no area": {"bbox": [10, 10, -5, 5]},
    "box out of the image": {"bbox": [100, 10, 25, 5]},
    "malformed box": {"bbox": [1, 2, 3]},
    "polygon out of the image": {"segmentation": [[10, 15, 40, 15, 40, HEIGHT + 3]]},
    "dangling image_id": {"image_id": 99},
    "dangling category_id": {"category_id": 99},
    "malformed id": {"image_id": "1.5"},
    "invalid segmentation": {"segmentation": "all of it"},
    "invalid run-length encoding": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}},
}
LEADING_OUT = ["../1.png", "a/../../1.png", "linked/../../1.png", "/etc/1.png", "..\\1.png", "C:\\1.png"]


@pytest.mark.parametrize("kind", FATAL_ANNOTATIONS)
def test_fatal_annotation(tmp_path, kind):
    write_coco(tmp_path, [image(1)], [annotation(1), annotation(42, **FATAL_ANNOTATIONS[kind])])
    error = load_error(tmp_path)
    assert error.counts == {kind: 1}
    assert "annotation 42" in str(error) and kind in str(error)


@pytest.mark.parametrize(
    "polygon", [[10, 15, 40, 15, 40], [10, 15, 40, 15], [10, 15, 40, 15, 40, float("nan")], [10, 15, 40, 15, 40, "35"]]
)
def test_invalid_polygon(tmp_path, polygon):
    write_coco(tmp_path, [image(1)], [annotation(42, segmentation=[annotation(1)["segmentation"][0], polygon])])
    assert load_error(tmp_path).counts == {"invalid polygon": 1}


@pytest.mark.parametrize("counts", ["abc", "~~~~zzz", "", [5, 5], [9600.0], [-1, 9601], [9600, 1], [10**12], 7])
def test_broken_rle(tmp_path, counts):
    write_coco(tmp_path, [image(1)], [annotation(42, segmentation={"size": [HEIGHT, WIDTH], "counts": counts})])
    assert load_error(tmp_path).counts == {"invalid run-length encoding": 1}


def test_rle_of_another_size(tmp_path):
    write_coco(tmp_path, [image(1)], [annotation(42, segmentation=rle_of(RECTANGLE.T, compressed=True))])
    assert f"is not [{HEIGHT}, {WIDTH}]" in str(load_error(tmp_path))


@pytest.mark.parametrize(
    "kind, field",
    [("images", "file_name"), ("images", "width"), ("annotations", "bbox"), ("annotations", "category_id")]
    + [("categories", "name"), ("annotations", "id")],
)
def test_missing_field_is_named(tmp_path, kind, field):
    content = {"images": [image(1)], "annotations": [annotation(1)], "categories": [{"id": 3, "name": "RBC"}]}
    del content[kind][0][field]
    write_coco(tmp_path, *content.values())
    error = load_error(tmp_path)
    assert error.counts["missing field"] == 1 and f"{kind}[0] lacks '{field}'" in str(error)


@pytest.mark.parametrize("field", ["images", "annotations", "categories"])
def test_missing_list_is_named(tmp_path, field):
    file = write_coco(tmp_path, [image(1)], [annotation(1)])
    content = json.loads(file.read_text())
    del content[field]
    file.write_text(json.dumps(content))
    assert f"lacks the list '{field}'" in str(load_error(tmp_path))
    file.write_text("{")
    assert "not valid JSON" in str(load_error(tmp_path))


def test_duplicates(tmp_path):
    categories = [*CATEGORIES, {"id": 4, "name": "RBC"}, {"id": 7, "name": "other"}]
    write_coco(tmp_path, [image(1), image(2), image(1)], [annotation(1), annotation(1)], categories)
    assert load_error(tmp_path).counts == {
        "duplicate id in images": 1,
        "duplicate id in annotations": 1,
        "duplicate id in categories": 1,
        "duplicate category name": 1,
    }


@pytest.mark.parametrize("name", LEADING_OUT)
def test_file_name_that_leads_out(tmp_path, name):
    save_image(tmp_path / "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    file = write_coco(tmp_path / "data", [], [])
    content = json.loads(file.read_text()) | {"images": [image(5, file_name=name)]}
    file.write_text(json.dumps(content))
    error = load_error(tmp_path / "data")
    assert error.counts == {"file_name leads out of the image folder": 1} and name in str(error)


def test_image_folder_may_itself_be_a_link(tmp_path):
    write_coco(tmp_path / "real" / "train", [image(1)], [annotation(1)])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(load_dataset_splits(tmp_path / "link")["train"]) == 1


def test_images_may_be_links_out_of_the_folder(tmp_path):
    """As the Hub's client lays out what it downloads: snapshots/REVISION/train/1.png -> ../../../blobs/HASH."""
    folder, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
    write_coco(folder / "train", [image(1), image(2, file_name="linked/2.png")], [annotation(1)])
    blobs.mkdir()
    (folder / "train" / "linked" / "2.png").rename(blobs / "2.png")
    (folder / "train" / "linked").rmdir()
    (folder / "train" / "linked").symlink_to(blobs)
    for file in ("1.png", "_annotations.coco.json"):
        (folder / "train" / file).rename(blobs / file)
        (folder / "train" / file).symlink_to(os.path.join("..", "..", "..", "blobs", file))
    rows = load_dataset_splits(folder)["train"]
    assert len(rows) == 2
    for row in rows:
        assert load_image(row["image"], WIDTH, HEIGHT)[0].shape == (3, HEIGHT, WIDTH)
    (blobs / "1.png").unlink()
    assert load_error(folder).counts == {"missing image": 1}


def test_broken_images(tmp_path):
    names = ["1.jpg", "2.jpg", "3.jpg", "4.png", "5.jpg", "6.png", "7.bmp"]
    images = [image(index + 1, file_name=name) for index, name in enumerate(names)]
    write_coco(tmp_path, images, [annotation(1)])
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    for cut in ("3.jpg", "4.png", "7.bmp"):
        (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-600])
    save_image(tmp_path / "5.jpg", WIDTH + 1, HEIGHT)
    with (tmp_path / "6.png").open("ab") as file:
        file.write(b"\0" * 5000)  # a whole picture with something behind it is fine
    error = load_error(tmp_path)
    assert error.counts == {"missing image": 1, "unreadable image": 4, "image size differs": 1}
    assert f"{WIDTH}x{HEIGHT} in the annotations, {WIDTH + 1}x{HEIGHT} in the file" in str(error)
    assert "6.png" not in str(error)


def test_message_lists_ten_and_counts_all_of_all_splits(tmp_path):
    bad = [annotation(number, bbox=[0, 0, 5, -1]) for number in range(1, 10)]
    write_coco(tmp_path / "train", [image(1)], bad)
    write_coco(tmp_path / "valid", [image(1)], [*bad, annotation(77, image_id=5)])
    error = load_error(tmp_path)
    assert error.counts == {"box of no area": 18, "dangling image_id": 1}
    message = str(error).splitlines()
    assert message[0].startswith("19 problems") and "  box of no area: 18" in message
    assert sum("annotation " in line for line in message) == 10


def test_harmless_faults_are_repaired_and_counted(tmp_path, caplog):
    over = annotation(1, bbox=[-1, 10, WIDTH + 1.5, 20], segmentation=[[-1, 10, WIDTH + 1, 10, 60, 30]])
    stray = annotation(5, bbox=[3, 4, 0, 0], segmentation=None)
    write_coco(tmp_path, [image(1)], [over, annotation(2), stray])
    objects = load_dataset_splits(tmp_path)["train"][0]["objects"]
    assert objects[0]["bbox"] == [0, 10, WIDTH, 20] and objects[1]["bbox"] == annotation(2)["bbox"]
    assert segmentation_of(objects[0]) == [[0, 10, WIDTH, 10, 60, 30]]
    assert len(objects) == 2
    assert "1 boxes over the edge" in caplog.text and "1 polygons over the edge" in caplog.text
    assert "1 boxes 0 pixels wide or high left out; first 1: 1.png, annotation 5" in caplog.text


# Pixels


def save_turned(path, width, height, orientation=6):
    """A JPEG whose left half is white as stored, to be turned by a quarter: the top is white when upright."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return {"path": str(path), "bytes": None}


def test_exif_orientation_follows_the_size_in_the_annotations(tmp_path):
    source = save_turned(tmp_path / "a.jpg", WIDTH, HEIGHT)
    upright, _ = load_image(source, HEIGHT, WIDTH)
    assert upright.shape == (3, WIDTH, HEIGHT)
    assert upright[:, : WIDTH // 2 - 8].min() > 200 and upright[:, WIDTH // 2 + 8 :].max() < 50
    stored, _ = load_image(source, WIDTH, HEIGHT)
    assert stored.shape == (3, HEIGHT, WIDTH)
    assert stored[:, :, : WIDTH // 2 - 8].min() > 200
    square = save_turned(tmp_path / "b.jpg", HEIGHT, HEIGHT)
    assert load_image(square, HEIGHT, HEIGHT)[0][:, : HEIGHT // 2 - 8].min() > 200  # told by nothing: upright


def test_large_jpeg_is_decoded_small(tmp_path):
    save_image(tmp_path / "a.jpg", 801, 400)
    source = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    full, factor = load_image(source, 801, 400)
    assert full.shape == (3, 400, 801) and factor == 1
    small, factor = load_image(source, 801, 400, at_least=(150, 100))
    assert small.shape == (3, 100, 201) and factor == 4
    turned = save_turned(tmp_path / "b.jpg", 800, 400)
    small, factor = load_image(turned, 400, 800, at_least=(100, 200))
    assert small.shape == (3, 200, 100) and factor == 4


@pytest.mark.parametrize("mode, value, expected", [("I;16", 40000, 156), ("L", 156, 156), ("RGBA", (156,) * 4, 156)])
def test_image_modes(tmp_path, mode, value, expected):
    Image.new(mode, (WIDTH, HEIGHT), value).save(tmp_path / "a.png")
    pixels, _ = load_image({"path": str(tmp_path / "a.png"), "bytes": None}, WIDTH, HEIGHT)
    assert pixels.shape == (3, HEIGHT, WIDTH) and (pixels == expected).all()


def test_decoding_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="gone.jpg"):
        load_image({"path": str(tmp_path / "gone.jpg"), "bytes": None}, 10, 10)
