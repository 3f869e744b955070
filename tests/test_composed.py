"""The composed world: what is drawn, what is called what, and what training never sees."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_hf.data import composed
from sam3_hf.data.composed import SPLITS, compose, write_composed
from sam3_hf.data.words import (
    COLORS,
    FILLS,
    HELD_OUT,
    SCORED_PHRASES,
    SEEN_PHRASES,
    SHAPES,
    SIZES,
    TRAINED,
    UNSEEN_PHRASES,
    absent_phrases,
    phrases_of,
)
from sam3_hf.rle import decode_mask

COUNTS = {"train": 24, "seen": 4, "unseen": 14, "dense": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_composed(tmp_path_factory.mktemp("world"), COUNTS, seed=3)


def read(folder, split):
    return json.loads((folder / split / "_annotations.coco.json").read_text())


def test_words_combine_to_phrases_of_one_to_three():
    assert len(SHAPES) >= 8 and len(FILLS) >= 9 and len(SEEN_PHRASES) >= 150
    assert {phrase.count(" ") for phrase in SEEN_PHRASES} == {0, 1, 2}
    assert {phrase.count(" ") for phrase in SCORED_PHRASES} == {0, 1, 2} and set(SCORED_PHRASES) < set(SEEN_PHRASES)
    assert phrases_of("star", "red", "small") == ["star", "red star", "small star", "small red star"]
    assert phrases_of("star", None, None) == ["star"] and phrases_of("bolt", "red", "small") == []


def test_held_out_pairs_are_new_but_their_words_are_not():
    assert len(HELD_OUT) >= 12 and not set(HELD_OUT) & set(TRAINED) and not set(UNSEEN_PHRASES) & set(SEEN_PHRASES)
    fills, shapes = zip(*TRAINED, strict=True)
    assert all(fill in fills and shape in shapes for fill, shape in HELD_OUT)
    words = {word for phrase in SEEN_PHRASES for word in phrase.split()}
    assert all(set(phrase.split()) <= words for phrase in UNSEEN_PHRASES)


def test_training_neither_shows_nor_asks_for_them(monkeypatch):
    for split in ("train", "valid", "seen", "dense"):
        shown = {(each.kind.fill, each.kind.shape) for index in range(5) for each in compose(split, index)[1]}
        with monkeypatch.context() as patch:  # what is to be drawn, which takes no time
            patch.setattr(composed, "draw_scene", lambda rng, size, kinds: kinds)
            chosen = {(kind.fill, kind.shape) for index in range(200) for kind in compose(split, index)}
        assert shown <= chosen and len(chosen) > len(TRAINED) and not chosen & set(HELD_OUT)
        assert not set(SPLITS[split][0]) & set(UNSEEN_PHRASES)
    leading = [{(each.kind.fill, each.kind.shape) for each in compose("unseen", index)[1]} for index in range(12)]
    assert sum(bool(kinds & set(HELD_OUT)) for kinds in leading) >= 11  # one may have found no room


def test_the_same_files_for_the_same_seed_whatever_else_is_written(folder, tmp_path):
    again = write_composed(tmp_path / "again", {"unseen": 14, "train": 5}, seed=3)
    for file in sorted((again / "unseen").iterdir()):
        assert file.read_bytes() == (folder / "unseen" / file.name).read_bytes()
    for index in range(5):
        assert (again / f"train/{index:05d}.png").read_bytes() == (folder / f"train/{index:05d}.png").read_bytes()
    other = write_composed(tmp_path / "other", {"train": 1}, seed=4)
    assert (other / "train/00000.png").read_bytes() != (folder / "train/00000.png").read_bytes()


def test_a_phrase_means_every_object_that_fits(folder):
    for split, count in COUNTS.items():
        document = read(folder, split)
        names = {category["id"]: category["name"] for category in document["categories"]}
        assert tuple(names.values()) == SPLITS[split][0]
        for index in range(count):
            _, objects = compose(split, index, seed=3)
            expected = [
                (phrase, each.mask.tobytes())
                for each in objects
                for phrase in phrases_of(each.kind.shape, each.kind.fill, each.size)
                if phrase in SPLITS[split][0]
            ]
            annotations = [each for each in document["annotations"] if each["image_id"] == index + 1]
            masks = [decode_mask(each["segmentation"]) for each in annotations]
            found = [
                (names[each["category_id"]], mask.copy(order="C").tobytes())
                for each, mask in zip(annotations, masks, strict=True)
            ]
            assert found == expected
            for each, mask in zip(annotations, masks, strict=True):
                rows, columns = np.nonzero(mask)
                left, top, width, height = each["bbox"]
                assert (left, top) == (columns.min(), rows.min()) and each["area"] == mask.sum()
                assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


def test_colours_and_sizes_are_those_that_the_words_say():
    radii = []
    for index in range(40):
        picture, objects = compose("train", index, seed=5)
        for each in objects:
            share = each.radius / max(picture.shape)
            radii.append(share)
            if each.size is not None:
                assert SIZES[each.size][0] <= share <= SIZES[each.size][1]
            if each.kind.fill in COLORS and each.mask.sum() > 60:
                average = picture[each.mask].mean(axis=0)
                chroma = {name: np.asarray(color) / np.linalg.norm(color) for name, color in COLORS.items()}
                nearest = min(chroma, key=lambda name: np.abs(average / np.linalg.norm(average) - chroma[name]).sum())
                assert nearest == each.kind.fill
    assert max(radii) > 6 * min(radii)


def test_dense_pictures_have_twenty_objects_or_more_and_some_have_none():
    assert min(len(compose("dense", index, seed=9)[1]) for index in range(12)) >= 20
    pictures = [compose("train", index, seed=9)[1] for index in range(30)]
    assert min(map(len, pictures)) == 0 and max(map(len, pictures)) <= 40
    shapes = {each.kind.shape for objects in pictures for each in objects}
    assert shapes > set(SHAPES)  # there are shapes that no phrase names


def test_absent_phrases_are_never_drawn_and_never_trained():
    absent = absent_phrases()
    trained = (Path(__file__).parents[1] / "training" / "configs" / "other_words.txt").read_text().splitlines()
    words = {word for phrase in SEEN_PHRASES for word in phrase.split()}
    for phrases in (absent, trained):
        assert len(set(phrases)) == len(phrases) >= 100
        assert not any(set(phrase.split()) <= words for phrase in phrases)
    assert not set(absent) & set(trained)
    for index in range(40):
        assert not {each.kind.shape for each in compose("absent", index)[1]} & set(absent)


def test_bad_arguments_are_refused(tmp_path):
    for arguments, message in (
        ({"counts": {"train": 1}, "image_size": 64}, "image_size"),
        ({"counts": {"trian": 1}}, "no split trian"),
        ({"counts": {"train": -1}}, "train must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            write_composed(tmp_path, **arguments)


def test_pictures_are_read_as_they_were_drawn(folder):
    picture, _ = compose("dense", 2, seed=3)
    assert np.array_equal(np.asarray(Image.open(folder / "dense" / "00002.png")), picture)


def test_the_demo_asks_for_words_that_combine():
    demo = runpy.run_path(str(Path(__file__).parents[1] / "training" / "demo.py"))
    image, asked = demo["picture_and_phrases"]()
    word, pair, three, absent = asked
    assert [len(phrase.split()) for phrase in asked] == [1, 2, 3, 2] and image.size[0] >= 300
    assert pair in UNSEEN_PHRASES and {word, three, absent} < set(SEEN_PHRASES)
    assert asked[word] > 1 and asked[pair] and asked[three] and not asked[absent]
