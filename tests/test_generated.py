import json

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image

from sam3_hf.data.generated import COLORS, CONCEPTS, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shapes"), num_train=24, num_valid=6, image_size=112, seed=3)


def read(folder, split="train"):
    return json.loads((folder / split / "_annotations.coco.json").read_text())


def test_layout(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["train", "valid"]
    for split, count in (("train", 24), ("valid", 6)):
        document = read(folder, split)
        assert [category["name"] for category in document["categories"]] == list(CONCEPTS[:8])
        assert len(document["images"]) == count == len(list((folder / split).glob("*.png")))
        for image in document["images"]:
            picture = Image.open(folder / split / image["file_name"])
            assert picture.size == (image["width"], image["height"]) and picture.mode == "RGB"
            assert max(picture.size) == 112 and min(picture.size) >= 89


def test_same_seed_same_bytes_and_more_images_change_nothing(folder, tmp_path):
    write_dataset(tmp_path / "again", num_train=24, num_valid=6, image_size=112, seed=3)
    write_dataset(tmp_path / "more", num_train=25, num_valid=0, image_size=112, seed=3)
    write_dataset(tmp_path / "other", num_train=1, num_valid=0, image_size=112, seed=4)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    for path in (folder / "train").glob("*.png"):
        assert (tmp_path / "more" / "train" / path.name).read_bytes() == path.read_bytes()
    first = (folder / "train" / "00000.png").read_bytes()
    assert (tmp_path / "other" / "train" / "00000.png").read_bytes() != first
    assert (folder / "valid" / "00000.png").read_bytes() != first


def test_annotations_agree_with_each_other(folder):
    document = read(folder)
    coco = COCO(str(folder / "train" / "_annotations.coco.json"))
    encodings = {type(annotation["segmentation"]) for annotation in document["annotations"]}
    assert encodings == {list, dict}
    covered = {image["id"]: np.zeros((image["height"], image["width"]), dtype=int) for image in document["images"]}
    for annotation in document["annotations"]:
        mask = coco.annToMask(annotation).astype(bool)
        x, y, width, height = annotation["bbox"]
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.06, abs=6)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        bounds = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(bounds - [x, y, x + width, y + height]).max() <= 1
        if isinstance(annotation["segmentation"], dict):
            assert mask.sum() == annotation["area"]
            assert (bounds == [x, y, x + width, y + height]).all()
        covered[annotation["image_id"]] += mask
    # visible masks only: what overlaps is the rounding of polygons at most
    assert max((layers > 1).mean() for layers in covered.values()) < 0.01


def test_what_the_pictures_show(folder):
    document = read(folder)
    per_image = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        per_image[annotation["image_id"]].append(annotation["category_id"])
    assert set().union(*per_image.values()) == set(range(1, 9))
    assert any(len(shown) == 0 for shown in per_image.values())
    assert any(len(shown) > len(set(shown)) for shown in per_image.values())  # several of one concept
    assert all(len(set(shown)) < 8 for shown in per_image.values())  # an absent concept in every image


def test_colours_are_those_that_the_names_say(folder):
    document = read(folder)
    coco = COCO(str(folder / "train" / "_annotations.coco.json"))
    names = {category["id"]: category["name"] for category in document["categories"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    for annotation in document["annotations"]:
        adjective = names[annotation["category_id"]].split()[0]
        picture = np.asarray(Image.open(folder / "train" / files[annotation["image_id"]]), dtype=float)
        pixels = picture[coco.annToMask(annotation).astype(bool)]
        if adjective in COLORS:
            average = pixels.mean(axis=0)
            nearest = min(COLORS, key=lambda name: np.abs(average - COLORS[name]).sum())
            assert nearest == adjective
        else:
            # a pattern is both dark and light, a plain shape is not
            assert pixels.mean(axis=1).std() > 25


def test_eight_concepts_use_every_word_twice():
    adjectives, nouns = zip(*(concept.split() for concept in CONCEPTS[:8]), strict=True)
    assert all(adjectives.count(word) == 2 for word in adjectives) and all(nouns.count(word) == 2 for word in nouns)
    assert len(set(CONCEPTS)) == len(CONCEPTS)


def test_bad_arguments_are_refused(tmp_path):
    for arguments, message in (
        ({"num_concepts": 1}, "num_concepts"),
        ({"num_concepts": 13}, "num_concepts"),
        ({"image_size": 20}, "image_size"),
        ({"num_test": -1}, "num_test"),
    ):
        with pytest.raises(ValueError, match=message):
            write_dataset(tmp_path, num_train=1, num_valid=1, **arguments)
