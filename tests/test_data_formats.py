"""Datasets as annotation tools export them, against the COCO files that they were made from."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import pytest
from data_cases import HEIGHT, WIDTH, annotation, image, load_error, save_image, write_coco
from PIL import Image

from sam3_hf.data import DatasetError, concept_names, has_masks, load_dataset_splits, segmentation_of
from sam3_hf.data.composed import write_composed
from sam3_hf.data.generated import write_dataset
from sam3_hf.data.loading import is_labelled, open_dataset
from sam3_hf.rle import decode_mask, encode_segmentation
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.data import load_data

SPLITS = ("train", "valid")


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Drawn pictures: whole shapes have polygons, covered ones run-length encodings; the 20th shows nothing."""
    return write_dataset(tmp_path_factory.mktemp("coco"), 20, 3, image_size=64)


def content_of(coco: Path, split: str) -> tuple[list[str], list[tuple[dict, list[dict]]]]:
    """The names of the categories by id from 1 on, and each image with its annotations."""
    content = json.loads((coco / split / "_annotations.coco.json").read_text())
    names = ["", *(category["name"] for category in content["categories"])]
    of = {entry["id"]: [] for entry in content["images"]}
    for item in content["annotations"]:
        of[item["image_id"]].append(item)
    return names, [(entry, of[entry["id"]]) for entry in content["images"]]


def objects_of(split, with_ids: bool = False) -> list[tuple]:
    """(file name, concept, box, segmentation) of each object, in the order of the files."""
    names = concept_names(split)
    rows = sorted(split, key=lambda row: Path(row["file_name"]).name)
    return [
        (Path(row["file_name"]).name, names[item["category"]], item["bbox"], segmentation_of(item))
        for row in rows
        for item in row["objects"]
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_untouched(folder: Path):
    """The splits of a folder, in which nothing is written."""
    before = snapshot(folder)
    assert is_labelled(folder, open_dataset(folder))
    splits = load_dataset_splits(folder)
    assert snapshot(folder) == before
    return splits


def as_yolo(coco: Path, folder: Path, polygons: bool) -> Path:
    for split in SPLITS:
        names, images = content_of(coco, split)
        for entry, items in images:
            for kind in ("images", "labels"):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(coco / split / entry["file_name"], folder / split / "images")
            sides, lines = (entry["width"], entry["height"]), []
            for item in items:
                x, y, width, height = item["bbox"]
                values = [x + width / 2, y + height / 2, width, height]
                if polygons and isinstance(item["segmentation"], list):
                    values = item["segmentation"][0]
                shares = [value / sides[index % 2] for index, value in enumerate(values)]
                lines.append(" ".join(map(repr, [item["category_id"] - 1, *shares])))
            if lines:
                (folder / split / "labels" / f"{Path(entry['file_name']).stem}.txt").write_text("\n".join(lines))
    listed = "".join(f"- {name}\n" for name in names[1:])
    (folder / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\nnames:\n{listed}")
    return folder


@pytest.mark.parametrize("polygons", [False, True])
def test_yolo(coco, tmp_path, polygons):
    original = load_dataset_splits(coco)
    for source in (as_yolo(coco, tmp_path, polygons), tmp_path / "data.yaml"):
        splits = load_untouched(tmp_path) if source == tmp_path else load_dataset_splits(source)
        for split in ("train", "validation"):
            assert concept_names(splits[split]) == concept_names(original[split])
            assert len(splits[split]) == len(original[split])  # with those of nothing
            for found, meant in zip(objects_of(splits[split]), objects_of(original[split]), strict=True):
                assert found[:2] == meant[:2]
                if polygons and isinstance(meant[3], list):
                    np.testing.assert_allclose(found[3], meant[3], atol=1e-9)
                    np.testing.assert_allclose(found[2], meant[2], atol=2)  # of the polygon, not of its pixels
                else:
                    assert found[3] is None
                    np.testing.assert_allclose(found[2], meant[2], atol=1e-9)
    assert has_masks(splits["train"]) is False


YOLO_FAULTS = {
    "0 .5 .5 .2 .2\n5 .5 .5 .2 .2": ("class beyond the names", "line 2: class 5", "the last of which is 1"),
    "0 .1 .1 .5 .1 .5 .5 .2": ("invalid polygon", "line 1: 7 numbers", "odd"),
    "0 .1 .1 .5": ("malformed line", "line 1: 3 numbers", "correct or remove the line"),
    "0 .1 .1 x .2": ("malformed line", "line 1: ", '"x" is no number'),
    "0 .1 nan .1 .2": ("malformed line", "line 1: ", "no finite number"),
    "0.5 .1 .1 .1 .2": ("malformed class", "line 1: ", "no whole number"),
    "0 20 30 10 10": ("box in pixels", "line 1: ", "divide x and width by 120"),
    "1 .95 .5 .4 .2": ("box out of the image", "annotation 1", "image 120x80"),
}


def write_yolo(folder: Path, label: str | None) -> Path:
    save_image(folder / "images" / "train" / "a.png")
    save_image(folder / "images" / "train" / "b.png")
    (folder / "labels" / "train").mkdir(parents=True)
    (folder / "labels" / "train" / "b.txt").write_text("")
    if label is not None:
        (folder / "labels" / "train" / "a.txt").write_text(label)
    (folder / "data.yaml").write_text("path: /elsewhere\ntrain: images/train\nnames: {0: cat, 1: dog}\n")
    return folder


@pytest.mark.parametrize("label", YOLO_FAULTS)
def test_faults_of_yolo_name_file_and_line(tmp_path, label):
    error, (kind, *texts) = load_error(write_yolo(tmp_path, label)), YOLO_FAULTS[label]
    assert error.counts == {kind: 1}
    line = str(error).splitlines()[-1]
    assert "labels/train/a.txt" in line and all(text in line for text in texts)


def test_yolo_classes_as_fractions_and_pictures_of_nothing(tmp_path):
    splits = load_dataset_splits(write_yolo(tmp_path, "1.0 .5 .5 .5 .5\n\n 0 .25 .25 .5 .5\n"))
    assert [len(row["objects"]) for row in splits["train"]] == [2, 0]
    assert objects_of(splits["train"])[0][1:3] == ("dog", [30, 20, 60, 40])


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/train\n", "lacks 'names'"),
        ("train: images/none\nnames: [cat]\n", "train: images/none is neither in"),
        ("train: images/train\nnames: [cat, cat]\n", 'has "cat" twice'),
        ("train: images/train\nnames: {a: cat}\n", "where a whole number is meant"),
        ("train: images/train\nnames: 3\n", "a list of names"),
        ("names: [cat]\n", "names no pictures"),
        ("names: [\n", "not valid YAML"),
    ],
)
def test_faults_of_data_yaml(tmp_path, text, message):
    write_yolo(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "data.yaml").write_text(text)
    error = str(load_error(tmp_path / "data.yaml"))
    assert message in error and "data.yaml" in error and "\n" not in error


def test_yolo_without_data_yaml_and_with_lists_of_files(tmp_path):
    write_yolo(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "list.txt").write_text("./images/train/a.png\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    assert len(load_dataset_splits(tmp_path)["train"]) == 1
    (tmp_path / "list.txt").write_text("./images/train/c.png\n")
    assert "list.txt: line 1: there is no file" in str(load_error(tmp_path))
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "list.txt").unlink()
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    assert concept_names(load_dataset_splits(tmp_path)["train"]) == ["cat", "dog"]


def test_yolo_without_names_says_what_is_missing(tmp_path):
    write_yolo(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "data.yaml").unlink()
    assert "labels of YOLO and no names of its classes: name its data.yaml" in str(load_error(tmp_path))


def voc_of(entry: dict, items: list[dict], names: list[str], first: int = 0) -> str:
    text = f"<size><width>{entry['width']}</width><height>{entry['height']}</height><depth>3</depth></size>"
    for item in items:
        x, y, width, height = item["bbox"]
        corners = {"xmin": x + first, "ymin": y + first, "xmax": x + width, "ymax": y + height}
        box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        text += f"<object><name>{escape(names[item['category_id']])}</name><bndbox>{box}</bndbox></object>"
    return f"<annotation><filename>{entry['file_name']}</filename>{text}</annotation>"


@pytest.mark.parametrize("devkit", [False, True])
def test_pascal_voc(coco, tmp_path, devkit):
    """Corners counted from 0 beside the pictures, and counted from 1 in VOC's own folders."""
    original = load_dataset_splits(coco)
    lists = tmp_path / "ImageSets" / "Main"
    for split in SPLITS:
        names, images = content_of(coco, split)
        pictures = tmp_path / ("JPEGImages" if devkit else split)
        labels = tmp_path / "Annotations" if devkit else pictures
        for folder in (pictures, labels, *([lists] if devkit else [])):
            folder.mkdir(parents=True, exist_ok=True)
        for entry, items in images:
            stem = f"{split}_{Path(entry['file_name']).stem}"
            shutil.copy(coco / split / entry["file_name"], pictures / f"{stem}.png")
            if items:
                (labels / f"{stem}.xml").write_text(voc_of(entry, items, names, first=int(devkit)))
        if devkit:
            stems = [f"{split}_{Path(entry['file_name']).stem}" for entry, _ in images]
            (lists / f"{split.removesuffix('id')}.txt").write_text("\n".join(stems))
    splits = load_untouched(tmp_path)
    for split in ("train", "validation"):
        assert len(splits[split]) == len(original[split])
        found = [(name.split("_")[1], concept, box) for name, concept, box, _ in objects_of(splits[split])]
        assert found == [(name, concept, box) for name, concept, box, _ in objects_of(original[split])]


VOC_FAULTS = {
    "<annotation><object><name>cat</name></object></annotation>": ("object without a box", 'object 1 ("cat")'),
    "<annotation><object><bndbox/></object></annotation>": ("object without a name", "object 1 lacks 'name'"),
    "<annotation><object>": ("malformed XML", "correct or remove the file"),
    "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation></annotation>": ("malformed XML", "remove that"),
    "<other><annotation/></other>": ("malformed XML", "the outermost element is 'other'"),
}


@pytest.mark.parametrize("text", VOC_FAULTS)
def test_faults_of_pascal_voc_name_file_and_object(tmp_path, text):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(text)
    error, (kind, detail) = load_error(tmp_path), VOC_FAULTS[text]
    assert kind in error.counts
    assert any("a.xml: " in line and detail in line for line in str(error).splitlines())


def test_labels_without_pictures_and_pictures_without_labels(tmp_path):
    entry, item = {"width": WIDTH, "height": HEIGHT, "file_name": "a.png"}, {"bbox": [1, 2, 30, 40], "category_id": 0}
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    (tmp_path / "a.xml").write_text(voc_of(entry, [item], ["cat"]))
    assert [len(row["objects"]) for row in load_dataset_splits(tmp_path)["train"]] == [1, 0]
    (tmp_path / "c.xml").write_text(voc_of(entry, [item], ["cat"]))
    error = load_error(tmp_path)
    assert error.counts == {"label without a picture": 1} and "c.xml: there is no picture c.*" in str(error)
    (tmp_path / "c.xml").unlink()
    save_image(tmp_path / "a.jpg")
    assert load_error(tmp_path).counts == {"two pictures of one label": 1}


def test_labelme(coco, tmp_path):
    original = load_dataset_splits(coco)
    for split in SPLITS:
        names, images = content_of(coco, split)
        (tmp_path / split).mkdir()
        for entry, items in images:
            shutil.copy(coco / split / entry["file_name"], tmp_path / split)
            shapes = []
            for item in items:
                x, y, width, height = item["bbox"]
                shape = {"shape_type": "rectangle", "points": [[x + width, y], [x, y + height]]}
                if isinstance(item["segmentation"], list):
                    points = np.reshape(item["segmentation"][0], (-1, 2)).tolist()
                    shape = {"shape_type": "polygon", "points": points}
                shapes.append({"label": names[item["category_id"]], "group_id": None, **shape})
            sides = {"imageWidth": entry["width"], "imageHeight": entry["height"]}
            content = {"shapes": shapes, "imagePath": f"..\\{entry['file_name']}", "imageData": None, **sides}
            (tmp_path / split / entry["file_name"]).with_suffix(".json").write_text(json.dumps(content))
    splits = load_untouched(tmp_path)
    for split in ("train", "validation"):
        assert len(splits[split]) == len(original[split])
        for found, meant in zip(objects_of(splits[split]), objects_of(original[split]), strict=True):
            assert found[:2] == meant[:2]
            if isinstance(meant[3], list):
                assert found[3] == meant[3]
            else:
                assert found[2:] == (meant[2], None)


def write_labelme(folder: Path, *shapes) -> Path:
    save_image(folder / "a.png")
    (folder / "a.json").write_text(json.dumps({"shapes": shapes, "imageWidth": WIDTH, "imageHeight": HEIGHT}))
    return folder


def test_shapes_of_labelme(tmp_path, caplog):
    square = {"label": "cat", "points": [[10, 10], [30, 10], [30, 30], [10, 30]], "group_id": 1}
    other = {**square, "points": [[50, 50], [60, 50], [60, 60]]}
    circle = {"label": "sun", "shape_type": "circle", "points": [[60, 40], [60, 50]]}
    point = {"label": "sun", "shape_type": "point", "points": [[60, 40]]}
    cat, sun = load_dataset_splits(write_labelme(tmp_path, square, other, circle, point))["train"][0]["objects"]
    assert len(segmentation_of(cat)) == 2 and cat["bbox"] == [10, 10, 50, 50]
    assert decode_mask(encode_segmentation(segmentation_of(sun), HEIGHT, WIDTH)).sum() == pytest.approx(314, abs=6)
    assert "1 shapes of kind 'point' left out" in caplog.text


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"label": ""}, "shape without a label"),
        ({"points": [[1, 2], [3, 4]]}, "malformed points"),
        ({"points": [[1, 2], [3, 4], [5]]}, "malformed points"),
        ({"shape_type": "mask"}, "unknown shape"),
    ],
)
def test_faults_of_labelme_name_file_and_shape(tmp_path, changes, kind):
    shape = {"label": "cat", "points": [[10, 10], [30, 10], [30, 30]], **changes}
    error = load_error(write_labelme(tmp_path, shape))
    assert error.counts == {kind: 1} and "a.json: shape 1" in str(error)


@pytest.mark.parametrize("subsets", [("default",), ("train", "Validation"), ("train2017", "val2017")])
def test_coco_of_cvat(coco, tmp_path, subsets):
    original = load_dataset_splits(coco)
    (tmp_path / "annotations").mkdir()
    for subset, split in zip(subsets, SPLITS, strict=False):
        folder = tmp_path if subset.endswith("2017") else tmp_path / "images"
        shutil.copytree(coco / split, folder if subset == "default" else folder / subset, dirs_exist_ok=True)
    for file in [*tmp_path.rglob("_annotations.coco.json")]:
        name = "default" if file.parent.name == "images" else file.parent.name
        file.rename(tmp_path / "annotations" / f"instances_{name}.json")
    splits = load_untouched(tmp_path)
    for split in splits:
        assert objects_of(splits[split]) == objects_of(original[split])
    assert len(splits) == len(subsets)


def masks_of(entry: dict, items: list[dict]) -> list[np.ndarray]:
    return [decode_mask(encode_segmentation(item["segmentation"], entry["height"], entry["width"])) for item in items]


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> Path:
    """Drawn pictures of which every object has a mask, one for each phrase."""
    return write_composed(tmp_path_factory.mktemp("composed"), {"train": 6, "valid": 2}, image_size=96, num_phrases=3)


@pytest.mark.parametrize("layout", ["id image", "colours", "folder", "numbered"])
def test_folders_of_masks(composed, tmp_path, layout):
    """All four forms, in folders by class; one pixel belongs to one object of a class."""
    original = load_dataset_splits(composed)
    for split in SPLITS:
        names, images = content_of(composed, split)
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "masks" / split).mkdir(parents=True)
        for entry, items in images:
            shutil.copy(composed / split / entry["file_name"], tmp_path / "images" / split)
            stem, values = Path(entry["file_name"]).stem, {}
            for number, (item, mask) in enumerate(zip(items, masks_of(entry, items), strict=True), start=1):
                folder = tmp_path / "masks" / split / names[item["category_id"]]
                if layout in ("folder", "numbered"):
                    file = folder / (f"{stem}/{number}.png" if layout == "folder" else f"{stem}_{number}.png")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(file)
                else:
                    folder.mkdir(exist_ok=True)
                    ids = values.setdefault(folder / f"{stem}.png", np.zeros(mask.shape, np.uint16))
                    ids[mask] = 300 * number
            for file, ids in values.items():
                if layout == "colours":
                    ids = np.stack([ids % 256, ids // 256, 0 * ids], axis=-1).astype(np.uint8)
                Image.fromarray(ids).save(file)
    splits = load_untouched(tmp_path)
    for split in ("train", "validation"):
        assert sorted(map(repr, objects_of(splits[split]))) == sorted(map(repr, objects_of(original[split])))


def test_masks_without_a_class_ask_for_its_name(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / name / "images" / f"{name}.png")
        (tmp_path / name / "masks").mkdir()
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[10:20, 30:50] = 255
    Image.fromarray(ids).save(tmp_path / "a" / "masks" / "x.png")
    assert "categories 1 are numbers without a name" in str(load_error(tmp_path))
    train = load_dataset_splits(tmp_path, category_map={"1": "nucleus"})["train"]
    assert [(item[1], item[2]) for item in objects_of(train)] == [("nucleus", [30, 10, 20, 10])]
    assert len(train) == 2
    Image.fromarray(ids[:50]).save(tmp_path / "a" / "masks" / "y.png")
    error = load_error(tmp_path, category_map={"1": "nucleus"})
    assert error.counts == {"mask of another size": 1} and "120x50, where its picture has 120x80" in str(error)


def test_a_mask_without_a_picture_is_named(tmp_path):
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    error = load_error(tmp_path, category_map={"1": "cell"})
    assert error.counts == {"label without a picture": 1} and "b.png" in str(error)


def test_pictures_alone_are_not_labelled(tmp_path):
    save_image(tmp_path / "train" / "a.png")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("names: 3\n")
    assert not is_labelled(tmp_path, open_dataset(tmp_path))


def test_a_split_of_which_no_picture_has_a_label_is_refused_but_for_the_test_split(coco, tmp_path, caplog):
    as_yolo(coco, tmp_path, polygons=False)
    (tmp_path / "data.yaml").write_text((tmp_path / "data.yaml").read_text() + "test: ../test/images\n")
    shutil.copytree(tmp_path / "valid" / "images", tmp_path / "test" / "images")
    with caplog.at_level(logging.INFO, "sam3_hf"):
        assert set(load_dataset_splits(tmp_path)) == {"train", "validation"}
    assert "the test split has no labels" in caplog.text
    shutil.rmtree(tmp_path / "valid" / "labels")
    error = load_error(tmp_path)
    assert error.counts == {"no labels": 1} and "none of the 3 pictures" in str(error)


def test_one_folder_for_each_split(coco, tmp_path):
    as_yolo(coco, tmp_path / "yolo", polygons=False)
    source = {"train": coco / "train", "validation": tmp_path / "yolo" / "valid"}
    (tmp_path / "yolo" / "valid" / "classes.txt").write_text(
        "\n".join(concept_names(load_dataset_splits(coco)["train"]))
    )
    splits = load_dataset_splits(source)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 3}
    error = str(load_error({"train": coco, "validation": tmp_path / "yolo" / "valid"}))
    assert "holds the splits train, validation, where one is meant" in error


# COCO as it should not be


def test_ids_as_fractions_and_texts(tmp_path):
    items = [annotation(1, image_id="1", category_id=3.0), annotation("2", image_id=1.0, category_id="7")]
    file = write_coco(tmp_path, [image(1)], items)
    content = json.loads(file.read_text())
    content["images"][0]["id"] = "1"
    content["categories"][0]["id"] = 3.0
    file.write_text(json.dumps(content))
    train = load_dataset_splits(tmp_path)["train"]
    assert [(item["id"], item["category"]) for item in train[0]["objects"]] == [(1, 0), (2, 1)]


def test_boxes_of_two_corners_are_named_as_such(tmp_path):
    write_coco(tmp_path, [image(1)], [annotation(1, bbox=[70, 20, 110, 60], segmentation=None)])
    error = load_error(tmp_path)
    assert error.counts == {"box out of the image": 1}
    assert "likely it is [x1, y1, x2, y2]: then write [70, 20, 40, 40]" in str(error)
    write_coco(tmp_path, [image(1)], [annotation(1, bbox=[10, 15, 40, 35])])  # in the image, and near its mask
    assert load_error(tmp_path).counts == {"box as two corners": 1}


# Held out for validation


def held_out_of(coco: Path, *flags: str) -> tuple[list[int], list[int]]:
    """Which images `load_data` trains on and validates with."""
    arguments = parse_arguments(["--data", str(coco / "train"), *flags])
    train, validation = load_data(SimpleNamespace(), arguments, 64)
    return list(train.rows["image_id"]), list(validation.rows["image_id"])


def test_a_part_is_held_out_by_seed_where_there_is_no_validation_split(coco, caplog):
    with caplog.at_level(logging.INFO, "sam3_hf"):
        train, validation = held_out_of(coco, "--validation_split", "0.2")
    assert "4 of 20 pictures are held out for validation (--validation_split 0.2)" in caplog.text
    assert len(validation) == 4 and sorted(train + validation) == list(range(1, 21))
    assert held_out_of(coco, "--validation_split", "0.2") == (train, validation)
    assert held_out_of(coco, "--validation_split", "0.2", "--seed", "1")[1] != validation
    given = held_out_of(coco, "--validation_data", str(coco / "valid"))
    assert given == (list(range(1, 21)), [1, 2, 3])


def test_one_picture_cannot_be_held_out(tmp_path):
    write_coco(tmp_path / "train", [image(1)], [annotation(1)])
    with pytest.raises(DatasetError, match="there is 1 picture, and one is held out for validation: add pictures"):
        held_out_of(tmp_path)
