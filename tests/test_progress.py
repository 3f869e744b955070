"""What a run tells while it goes on, and when it ends early."""

import copy
import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from conftest import micro_config
from data_cases import annotation, image, write_coco
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_cases import launcher, state_of, train

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, PromptCollator, TrainDataset, load_dataset_splits
from sam3_hf.data.generated import write_dataset
from sam3_hf.training import early_score
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.early_score import PICTURES, EarlyScore, FixedPrompts
from sam3_hf.training.early_stopping import EarlyStopping
from sam3_hf.training.loop import TrainingLoop
from sam3_hf.training.objectives import Labels
from sam3_hf.training.parts import Parts
from sam3_hf.training.phrases import TokenizedText
from sam3_hf.training.progress_arguments import SERVICES
from sam3_hf.training.reporting import Metrics
from sam3_hf.training.trackers import check_trackers

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


# Services


EVALUATION = {
    "segm_cgF1@0.5": 0.5,
    "segm_per_class": {"red circle": {"AP": 0.7, "AP50": 0.9, "cgF1": None, "objects": 3}},
}


def test_tensorboard_holds_pictures_and_scores_per_class_each_once(tmp_path):
    """Also where a killed run is done again from its last checkpoint."""
    Image.new("RGB", (3000, 600), "red").save(tmp_path / "0000.png")
    for done, steps in ((0, range(1, 6)), (3, range(4, 8))):
        metrics = Metrics(tmp_path, step=done, evaluated=done)
        for step in steps:
            metrics.write("train", step, {"loss": float(step)})
            metrics.write("eval", step, EVALUATION)
            metrics.trackers.show("predictions", step, [tmp_path / "0000.png"])
        metrics.close()
    told = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    told.Reload()
    names = [
        "eval/segm_cgF1_0.5",
        "eval_segm_per_class/AP/red_circle",
        "eval_segm_per_class/AP50/red_circle",
        "train/loss",
    ]
    assert sorted(told.Tags()["scalars"]) == names
    for name in names:
        assert [event.step for event in told.Scalars(name)] == list(range(1, 8))
    pictures = told.Images("predictions/0000")
    assert [event.step for event in pictures] == list(range(1, 8))
    assert (pictures[0].width, pictures[0].height) == (1280, 256)


class Service:
    """A module in the place of wandb or mlflow, which remembers what its runs were told."""

    def __init__(self):
        self.runs, self.config, self.broken = {}, SimpleNamespace(update=lambda *_, **__: None), False
        self.Image = lambda pixels: pixels.shape

    def start_run(self, run_id=None, **_):
        self.current = self.runs.setdefault(run_id or f"run {len(self.runs)}", [])
        name = next(name for name, told in self.runs.items() if told is self.current)
        run = SimpleNamespace(id=name, info=SimpleNamespace(run_id=name), define_metric=lambda *_, **__: None)
        run.log, run.finish = self.log, self.end_run
        return run

    def init(self, id=None, **_):
        return self.start_run(id)

    def log(self, values, step=None):
        assert all(re.fullmatch(r"[-\w./ :]+", name) for name in values)  # as mlflow demands
        if self.broken:
            raise ConnectionError("the service\nis away")
        self.current.append((values.get("step", step), sorted(set(values) - {"step"})))

    def log_metrics(self, values, step):
        self.log(values, step)

    def log_artifact(self, local_path, artifact_path):
        self.log({artifact_path: local_path})

    def search_experiments(self, **_):
        return []

    def create_experiment(self, **_):
        return "1"

    def log_params(self, _):
        pass

    def end_run(self):
        pass

    utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=100, MAX_PARAMS_TAGS_PER_BATCH=10))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_services_go_on_with_their_run_and_are_told_nothing_twice(name, tmp_path, monkeypatch, caplog):
    PartialState(cpu=True)  # as in a run
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    Image.new("RGB", (20, 10)).save(tmp_path / "0000.png")
    # killed after step 4 and its evaluation, again after step 3, and at last whole
    for done, steps in ((0, (1, 2, 3, 4)), (2, (3,)), (2, (3, 4, 5, 6))):
        metrics = Metrics(tmp_path, step=done, evaluated=done, report_to=[name], settings={"epochs": 3})
        for step in steps:
            metrics.write("train", step, {"loss": 1.0})
            if step % 2 == 0:
                metrics.write("eval", step, EVALUATION)
                metrics.trackers.show("predictions", step, [tmp_path / "0000.png"])
    (told,) = service.runs.values()
    assert [step for step, names in told if names == ["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, names in told if "eval/segm_cgF1_0.5" in names] == [2, 4, 6]
    assert sum(names[0].startswith("predictions/") for _, names in told) == 3
    metrics = Metrics(tmp_path, step=0, evaluated=0, report_to=[name])  # anew
    metrics.write("train", 1, {"loss": 1.0})
    assert len(service.runs) == 2 and service.current == [(1, ["train/loss"])]
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(ValueError, match="trackers.json is damaged: delete it"):
        Metrics(tmp_path, step=2, evaluated=2, report_to=[name])
    service.broken = True
    for step in (2, 3):
        metrics.write("train", step, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"report_to: {name} fails and is told nothing more; metrics.jsonl has it all: the service; is away"
    ]


def test_services_are_known_or_named_as_missing(tmp_path, monkeypatch, capsys):
    assert sorted(SERVICES) == sorted(LOGGER_TYPE_TO_CLASS)
    named = parse_arguments(["--data", "x", "--report_to", "tensorboard, wandb,tensorboard"]).progress.services
    assert named == ("tensorboard", "wandb")
    assert parse_arguments(["--data", "x", "--report_to", "none"]).progress.services == ()
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", "--report_to", "tensorboard,wandbb"])
    assert "report_to: 'wandbb' is none of aim, clearml" in capsys.readouterr().err
    (tmp_path / "wandb").mkdir()  # as a run of it leaves one behind
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_trackers(())
    with pytest.raises(ImportError, match="^report_to: wandb is not installed: pip install wandb, or leave it out$"):
        check_trackers(named[1:])


# Early stopping

SCORED = """
import sam3_hf.training.run as run
from pathlib import Path

def evaluate(*_, **__):
    asked = Path("asked.txt")
    count = len(asked.read_text()) if asked.exists() else 0
    asked.write_text("." * (count + 1))
    value = [0.1, 0.3, 0.305, 0.2, 0.31, 0.1, 0.2, 0.3][count]
    return {"segm_AP": value, "segm_per_class": {}, "IL_MCC": None}

run.evaluate = evaluate
"""


def test_a_run_ends_where_scores_do_not_get_better_and_is_evaluated_once(tmp_path):
    """Each step is an epoch. The run that goes on counts on, and one that has ended is not evaluated again."""
    data = write_dataset(tmp_path / "data", num_train=2, num_valid=1, image_size=64, num_concepts=2)
    program = launcher(tmp_path, SCORED)
    settings = {"batch_size": 2, "epochs": 20, "save_every_epochs": 0, "num_workers": 0, "report_to": "none"}
    settings["early_stopping_min_delta"] = 0.02
    for flags, evaluations, stale in (
        (["--early_stopping_patience", "2"], 4, 2),
        (["--early_stopping_patience", "5", "--resume", "auto"], 7, 5),
        (["--early_stopping_patience", "5", "--resume", "auto"], 7, 5),
    ):
        finished = train(tmp_path, data, *flags, program=program, **settings)
        assert finished.returncode == 0, finished.stderr
        assert f"segm_AP has not become better than 0.3000 by more than 0.02 in {stale} evaluations" in finished.stderr
        assert len((tmp_path / "asked.txt").read_text()) == evaluations
        state = state_of(tmp_path / "run" / "checkpoints" / "last")
        assert (state["step"], state["evaluated"]) == (evaluations, evaluations)
        assert state["best"]["step"] == (3 if evaluations == 4 else 5)  # the least improvement is one for `best`
        assert (tmp_path / "run" / "final" / "config.json").is_file()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_scores_that_mean_nothing_neither_end_a_run_nor_choose_its_weights(tmp_path):
    """Without an object to find AP is -1 each time: the first weights are not the best for that."""
    data = write_dataset(tmp_path / "data", num_train=2, num_valid=1, image_size=64, num_concepts=2)
    annotations = data / "valid" / "_annotations.coco.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    settings = {"batch_size": 2, "epochs": 3, "num_workers": 0, "ema_decay": 0, "early_stopping_patience": 1}
    finished = train(tmp_path, data, together=True, **settings)
    assert finished.returncode == 0 and "AP is not defined: the pictures show no object" in finished.stdout
    assert "no bbox_AP says which weights are best: those of the last step are exported" in finished.stdout
    checkpoints = tmp_path / "run" / "checkpoints"
    assert state_of(checkpoints / "last")["step"] == 3 and state_of(checkpoints / "last")["best"] is None
    assert not (checkpoints / "best").exists()
    final, last = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "final", checkpoints / "last")
    )
    assert last.keys() <= final.keys() and all(torch.equal(final[name], last[name].half()) for name in last)


def test_early_stopping_counts_in_the_direction_of_its_metric():
    settings = parse_arguments(["--data", "x", "--early_stopping_patience", "2"]).progress
    for metric, values in (("loss", [3.0, 2.0, 2.0, 2.5]), ("bbox_AP", [0.1, 0.2, 0.2, 0.1])):
        stopping, due = EarlyStopping(settings, metric), []
        for value in values:
            stopping.note(value)
            due.append(stopping.is_due)
        assert due == [False, False, False, True]
        other = EarlyStopping(settings, "segm_cgF1")
        other.load_state_dict(stopping.state_dict())
        assert other.stale == 0
    never = EarlyStopping(parse_arguments(["--data", "x"]).progress, "loss")
    for _ in range(9):
        never.note(1.0)
    assert never.stale == 8 and not never.is_due
