"""Pictures without labels, and the phrases that a teacher is asked for them."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sam3_hf.data import Augmentation, DatasetError, PromptCollator, TrainDataset, concept_names, load_dataset_splits
from sam3_hf.data.generated import write_dataset
from sam3_hf.data.unlabelled import UnlabelledDataset, load_pictures
from sam3_hf.phrases import everyday_nouns
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.data import load_unlabelled
from sam3_hf.training.phrase_choice import ABSENT, PRESENT, ROUNDS, PhraseChoice


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "deep/er/b.jpg", "deep/c.webp")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + number, 40), (number * 60, 120, 30)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.mark.parametrize("inside", ["", "deep/*"])
def test_pictures_of_folders_and_patterns(folder, inside):
    rows = load_pictures(folder / inside, ["cat", "dog"])
    assert len(rows) == (2 if inside else 3) and concept_names(rows) == ["cat", "dog"]
    assert all(row["objects"] == [] and row["height"] == 40 for row in rows)
    assert len(set(rows["image_id"])) == len(rows)


def test_pictures_of_a_saved_dataset_and_of_labelled_ones(folder, tmp_path):
    pictures = [str(path) for path in sorted(folder.rglob("*.*")) if path.suffix != ".txt"]
    columns = datasets.Features({"image": datasets.Image()})
    saved = datasets.Dataset.from_dict({"image": pictures}, features=columns)
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(load_pictures(tmp_path / "saved", ["cat"])) == 4
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(DatasetError, match="lacks a column 'image'"):
        load_pictures(tmp_path / "texts", ["cat"])


@pytest.mark.parametrize("columns", [["image"], ["image", "objects"]])
def test_a_saved_dataset_is_opened_once(tmp_path, monkeypatch, columns):
    rows = load_dataset_splits(write_dataset(tmp_path / "data", 4, 1, image_size=64, num_concepts=2))["train"]
    objects = [[{"bbox": [1.0, 1.0, 9.0, 9.0], "category": "cat"}]] * 4
    table = {"image": [row["image"]["path"] for row in rows], "objects": objects}
    saved = datasets.Dataset.from_dict({name: table[name] for name in columns}).cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    opened, load = [], datasets.load_from_disk
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: opened.append(path) or load(path))
    arguments = parse_arguments(["--data", str(tmp_path / "saved"), "--teacher", "y"])
    train, held_out = load_unlabelled(Accelerator(cpu=True), arguments, 64)
    assert len(train) + len(held_out) == 4 and opened == [str(tmp_path / "saved")]
    assert train.concepts == (["cat"] if "objects" in columns else list(everyday_nouns()))


def test_what_is_no_picture_is_named(folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "none.jpg").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"(?s)2 .*broken\.png|none\.jpg") as raised:
        load_pictures(folder, ["cat"])
    assert "broken.png" in str(raised.value) and "none.jpg" in str(raised.value)
    for nothing in (folder / "missing", folder / "*.bmp"):
        with pytest.raises((DatasetError, FileNotFoundError), match=nothing.name.replace("*", r"\*")):
            load_pictures(nothing, ["cat"])
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError, match="empty"):
        load_pictures(empty, ["cat"])


def test_samples_are_those_of_training_without_prompts(tmp_path):
    rows = load_dataset_splits(write_dataset(tmp_path, 3, 1, image_size=64, num_concepts=2))["train"]
    labelled = TrainDataset(rows, 64, augmentation=Augmentation(), seed=4)
    unlabelled = UnlabelledDataset(rows, ["cat", "dog"], 64, augmentation=Augmentation(), seed=4)
    for key in ((0, 0), (3, 2)):
        sample = unlabelled[key]
        assert torch.equal(sample.pixel_values, labelled[key].pixel_values)
        assert sample.phrases == [] and sample.key == key
    batch = PromptCollator()([unlabelled[0, 1], unlabelled[0, 2]])
    assert batch["keys"] == [(0, 1), (0, 2)] and batch["pixel_values"].shape == (2, 3, 64, 64)


def test_everyday_nouns():
    nouns = everyday_nouns()
    assert len(nouns) >= 1000 and len(set(nouns)) == len(nouns)
    assert all(noun == noun.strip().lower() and noun for noun in nouns)


def answers_of(choice: PhraseChoice, keys: list, truth: np.ndarray) -> dict:
    batch = choice.ask({"keys": keys})
    owners = [keys[image][1] for image in batch["image_index"].tolist()]
    numbers = [choice.number[phrase] for phrase in batch["phrases"]]
    choice.note(
        batch, torch.tensor([bool(truth[owner, number]) for owner, number in zip(owners, numbers, strict=True)])
    )
    return batch


def test_a_share_of_the_phrases_is_absent_once_that_is_known():
    rng = np.random.default_rng(0)
    truth = rng.random((6, 40)) < 0.2
    choice = PhraseChoice(6, [f"thing {number}" for number in range(40)], 8, 0.5, seed=1)
    shares = []
    for epoch in range(60):
        present = []
        for picture in range(6):
            batch = answers_of(choice, [(epoch, picture)], truth)
            assert len(set(batch["phrases"])) == 8
            present += [truth[picture, choice.number[phrase]] for phrase in batch["phrases"]]
        shares.append(np.mean(present))
    to_have = np.minimum(truth.sum(axis=1), 4).mean() / 8
    assert shares[0] < 0.75 * to_have  # by chance
    assert np.mean(shares[50:]) == pytest.approx(to_have, abs=0.03)
    known = choice.known
    assert (known[truth] != ABSENT).all() and (known[~truth] != PRESENT).all()
    assert (known > 0).mean() > 0.9


def test_of_many_phrases_those_that_other_pictures_show_are_asked_first():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 300)) < 0.001
    truth[:, 100:112] = rng.random((200, 12)) < 0.7
    choice = PhraseChoice(200, [f"thing {number}" for number in range(300)], 6, 0.5, seed=1)
    shares = []
    for epoch in range(5):
        drawn = [answers_of(choice, [(epoch, picture)], truth)["phrases"] for picture in range(200)]
        shown = [truth[picture, [choice.number[phrase] for phrase in drawn[picture]]] for picture in range(200)]
        shares.append(np.mean(shown))
    assert shares[0] == pytest.approx(truth.mean(), abs=0.015)
    assert min(shares[1:]) > 5 * shares[0]
    assert max(shares) < 0.55


def test_a_teacher_is_asked_for_more_until_enough_is_known():
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.random((30, 100)) < 0.1, np.zeros((1, 100), dtype=bool)])
    choice = PhraseChoice(31, [f"thing {number}" for number in range(100)], 6, 0.5, seed=1)
    asked, shares = [], []

    def sees(prompts: dict) -> torch.Tensor:
        asked.append(prompts)
        numbers = [choice.number[phrase] for phrase in prompts["phrases"]]
        return torch.from_numpy(truth[picture, numbers])

    for epoch in range(30):
        before = len(asked)
        for picture in range(30):
            rounds = len(asked)
            batch = choice.ask({"keys": [(epoch, picture)]}, sees)
            mine = asked[rounds:]
            phrases = [phrase for prompts in mine for phrase in prompts["phrases"]]
            assert len(phrases) == len(set(phrases)) and len(mine) <= ROUNDS
            shown = truth[picture, [choice.number[phrase] for phrase in batch["phrases"]]]
            shares.append(shown.mean())
            if epoch == 0 and len(mine) == ROUNDS:
                found = truth[picture, [choice.number[phrase] for phrase in phrases]].sum()
                assert shown.sum() >= min(found, 3) - 1  # one in four is for what was not asked yet
    assert len(asked) - before == 0  # enough is known
    assert np.mean(shares[:30]) > 2.5 * truth.mean()

    for epoch in range(30, 60):
        picture, before = 30, len(asked)
        choice.ask({"keys": [(epoch, picture)]}, sees)
    assert len(asked) == before  # all phrases were asked, and none is there
    few = PhraseChoice(1, ["cat", "dog"], 8, 0.5, seed=0)
    few.ask({"keys": [(0, 0)]}, sees)
    assert len(asked) == before  # both are asked anyway


def test_what_is_said_in_an_epoch_counts_from_the_next_on_and_survives_a_checkpoint():
    truth = np.eye(4, 10, dtype=bool)
    phrases = [f"thing {number}" for number in range(10)]
    whole = PhraseChoice(4, phrases, 3, 0.5, seed=2)
    keys = [(epoch, picture) for epoch in range(4) for picture in range(4)]
    drawn = [answers_of(whole, [key], truth)["phrases"] for key in keys]
    assert not np.any(PhraseChoice(4, phrases, 3, 0.5, seed=2).known)

    first = PhraseChoice(4, phrases, 3, 0.5, seed=2)
    for key in keys[:6]:  # within the second epoch
        answers_of(first, [key], truth)
    state = first.state_dict()
    second = PhraseChoice(4, phrases, 3, 0.5, seed=2)
    second.load_state_dict(state)
    assert [answers_of(second, [key], truth)["phrases"] for key in keys[6:]] == drawn[6:]
    forgetful = PhraseChoice(4, phrases, 3, 0.5, seed=2)
    assert [answers_of(forgetful, [key], truth)["phrases"] for key in keys[6:]] != drawn[6:]


def test_fewer_phrases_than_prompts():
    choice = PhraseChoice(1, ["cat", "dog"], 8, 0.5, seed=0)
    assert sorted(choice.number[phrase] for phrase in choice.ask({"keys": [(0, 0)]})["phrases"]) == [0, 1]


def test_phrases_are_for_a_teacher_alone():
    flags = ["--data", "x", "--phrases", "words.txt"]
    assert parse_arguments([*flags, "--teacher", "y"]).without_labels
    for more in ([], ["--teacher", "y", "--label_loss_weight", "1"]):
        with pytest.raises(SystemExit):
            parse_arguments([*flags, *more])
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", "--validation_split", "1"])
