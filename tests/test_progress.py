"""What a run tells while it goes on, and when it ends early."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import micro_config
from data_cases import annotation, image, write_coco

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, PromptCollator, TrainDataset, load_dataset_splits
from sam3_hf.training import early_score
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.early_score import PICTURES, EarlyScore, FixedPrompts
from sam3_hf.training.loop import TrainingLoop
from sam3_hf.training.objectives import Labels
from sam3_hf.training.parts import Parts
from sam3_hf.training.phrases import TokenizedText

RLE = {"size": [80, 120], "counts": [0, 9600]}


@pytest.fixture
def splits(tmp_path):
    """Ten pictures: even ones show RBCs, every third a WBC; the platelets of the last are a crowd."""
    images, annotations = [image(number) for number in range(1, 11)], []
    annotations += [annotation(number, number) for number in range(2, 11, 2)]
    annotations += [annotation(100 + number, number, 7) for number in range(3, 11, 3)]
    annotations += [annotation(200, 10, 9, iscrowd=1, segmentation=RLE, bbox=[0, 0, 120, 80])]
    for split in ("train", "valid"):
        write_coco(tmp_path / "data" / split, images, annotations)
    return load_dataset_splits(tmp_path / "data")


# An early score


def test_fixed_prompts_are_what_pictures_show_and_one_thing_that_they_do_not(splits):
    data = EvalDataset(splits["validation"], 64)
    prompts = FixedPrompts(data)
    samples = {sample.image_id: sample for sample in map(prompts.__getitem__, range(len(prompts)))}
    assert len(samples) == PICTURES and {1, 10} <= samples.keys()  # from one end to the other
    for number, sample in samples.items():
        counts = {phrase: len(label["boxes"]) for phrase, label in zip(sample.phrases, sample.labels, strict=True)}
        assert [name for name, count in counts.items() if count] == ["RBC"] * (number % 2 == 0) + ["WBC"] * (
            number % 3 == 0
        )
        assert list(counts.values()).count(0) == 1
        assert number != 10 or "platelet" not in counts  # of a crowd nobody can say that it is not there
    assert all(torch.equal(prompts[row].pixel_values, data[index].pixel_values) for row, index in [(0, 0), (7, 9)])


def parts_of(splits, *flags: str) -> Parts:
    accelerator, arguments = Accelerator(cpu=True), parse_arguments(["--data", "x", "--warmup_ratio", "0", *flags])
    torch.manual_seed(0)
    model = Sam3LiteModel(micro_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    processor = Sam3LiteProcessor.from_config(model.config)
    return Parts(
        arguments=arguments,
        accelerator=accelerator,
        model=accelerator.prepare(model),
        optimizer=accelerator.prepare(optimizer),
        objective=Labels(),
        processor=processor,
        text=TokenizedText(processor),
        train_data=TrainDataset(splits["train"], 64),
        valid_data=EvalDataset(splits["validation"], 64),
    )


def test_an_early_score_follows_the_weights_and_changes_nothing(splits, caplog, monkeypatch):
    monkeypatch.setattr(early_score, "PICTURES", 2)
    parts = parts_of(splits)
    loop, batch = TrainingLoop(parts), PromptCollator()([parts.train_data[0]])
    unscored = [done.terms["loss"] for done in loop.steps([(batch,)] * 2, 2)]

    parts = parts_of(splits)
    loop, early, scored = TrainingLoop(parts), EarlyScore(parts), []
    with caplog.at_level(logging.INFO, "sam3_hf"):
        for step in (1, 2):
            before = copy.deepcopy(parts.model.state_dict())
            early.write(step - 1, 0.5, None)
            assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())
            (done,) = loop.steps([(batch,)], 2)
            scored.append(done.terms["loss"])
    assert scored == unscored
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"step 0: loss {early.start:.4f} on 3 fixed validation prompts"
    assert second.endswith(f" on 3 fixed validation prompts, {early.start:.4f} before the first step")
    assert float(second.split()[3]) != pytest.approx(early.start, abs=0.1)
    assert early.loss() == early.loss()


def test_an_early_score_is_made_where_evaluations_are_far_apart(splits):
    early = EarlyScore(parts_of(splits))
    assert [step for step in range(160) if early.is_due(step, 1000)] == [0, 50, 100, 150]
    assert not early.is_due(0, 50)
    early = EarlyScore(parts_of(splits, "--early_score_steps", "0"))
    assert not any(early.is_due(step, 1000) for step in range(160))
