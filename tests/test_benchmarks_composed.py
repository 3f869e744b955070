"""composed_scores.py, distillation.py and adapters.py of benchmarks, on models that know nothing."""

import json
import subprocess
from argparse import Namespace

import adapters
import composed_scores
import distillation
import distillation_rows
import pytest
import torch
import yaml
from composed_scores import FIGURES, SPLITS
from conftest import micro_config, shake

from sam3_hf import Sam3LiteConfig, Sam3LiteModel
from sam3_hf.data.generated import write_dataset
from sam3_hf.data.words import SEEN_PHRASES, some_phrases
from sam3_hf.training.arguments import parse_arguments


def test_scores_of_every_split(tmp_path):
    torch.manual_seed(0)
    shake(Sam3LiteModel(micro_config(image_size=96))).save_pretrained(tmp_path / "model")
    composed_scores.main([str(tmp_path / "model"), "--images", "2", "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["images"], scores["absent_images"]) == (2, 1) and set(SPLITS) <= scores.keys()
    assert set(FIGURES) - {"IL_negative_accuracy"} <= scores["seen"].keys()
    assert set(scores["dense"]["by_words"]) == {"1 words", "2 words", "3 words"}
    assert 0 <= scores["absent"]["IL_negative_accuracy"] <= 1 and "segm_AP" not in scores["absent"]
    larger = "--images 1 --splits train --image-size 144 --seed 1 --output".split()
    composed_scores.main([str(tmp_path / "model"), *larger, str(tmp_path / "larger.json")])
    larger = json.loads((tmp_path / "larger.json").read_text())
    assert (larger["image_size"], larger["seed"]) == (144, 1) and "segm_AP" in larger["train"]


def test_the_table_of_distillation(tmp_path, caplog):
    def write(name: str, ap: float, **more) -> None:
        scores = {split: {"segm_AP": ap, "segm_cgF1": ap / 2} for split in distillation.WORLDS["composed"].splits}
        (tmp_path / name).write_text(json.dumps({**more, **scores}))

    write("teacher.json", 0.8)
    write("plus_seed0_steps10.json", 0.6, row="plus", seed=0, steps=10)
    write("plus_seed1_steps10.json", 0.7, row="plus", seed=1, steps=10)
    write("labels_seed0_steps20.json", 0.4, row="labels", seed=0, steps=20)
    lines = distillation.table(tmp_path).splitlines()
    assert lines[2].startswith("| teacher | – | – | 0.800 | 0.400 |")
    assert lines[3].startswith("| plus | 10 | 2 | 0.650 (81.2%) | 0.325 (81.2%) |")
    assert lines[4].startswith("| labels | 20 | 1 | 0.400 (50.0%) |") and len(lines) == 5


def test_rows_of_other_worlds_have_tables_of_their_own(tmp_path):
    def write(name: str, **more) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(more))

    write("teacher_concepts", trained={"segm_AP": 0.5}, others={"segm_AP": 0.4})
    for row, others in (("two-concepts", 0.1), ("two-concepts-retained", 0.38)):
        scores = {"trained": {"segm_AP": 0.6}, "others": {"segm_AP": others}}
        write(f"{row}_seed0_steps10", row=row, seed=0, steps=10, **scores)
    for row, score in (("bccd-teacher", 0.4), ("bccd", 0.3)):
        write(f"{row}_seed0_steps10", row=row, seed=0, steps=10, validation={"bbox_AP": score})
    concepts, photographs = distillation.table(tmp_path).split("\n\n")
    assert concepts.splitlines()[2:] == [
        "| teacher | – | – | 0.500 | 0.400 |",
        "| two-concepts | 10 | 1 | 0.600 (120.0%) | 0.100 (25.0%) |",
        "| two-concepts-retained | 10 | 1 | 0.600 (120.0%) | 0.380 (95.0%) |",
    ]
    assert photographs.splitlines()[2:] == [
        "| bccd-teacher | 10 | 1 | 0.400 (100.0%) |",
        "| bccd | 10 | 1 | 0.300 (75.0%) |",
    ]


def test_two_of_the_twelve_concepts_are_trained():
    others = distillation_rows.untrained()
    assert len(others) == 10 and not set(others) & set(some_phrases(distillation_rows.TRAINED))
    assert set(others) | set(some_phrases(2)) == set(some_phrases(12)) <= set(SEEN_PHRASES)


def test_results_are_of_one_teacher(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "teacher.json").write_text(json.dumps({"weights": ["another"]}))
    with pytest.raises(SystemExit, match="is of another teacher than .*: give its results another --output"):
        distillation.main(["run", "plus", "--output", str(tmp_path / "out")])


def test_photographs_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        distillation.main(["run", "bccd", "--output", str(tmp_path)])
    assert "bccd is for pictures of yours: name their folder with --data" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["two-concepts", "two-concepts-retained", "bccd-teacher"])
def test_what_goes_on_with_the_teacher_has_its_sizes(row):
    """Also where that is a standard model, which --init maps to the preset."""
    teacher = Sam3LiteConfig.from_pretrained(distillation.PACKAGED)
    settings = distillation.ROWS[row].settings
    config = teacher.at_preset(settings["preset"])
    assert config.detr_decoder_config.num_layers == teacher.detr_decoder_config.num_layers
    assert config.vision_config.backbone_config.hidden_size == teacher.vision_config.backbone_config.hidden_size


@pytest.mark.parametrize("row", distillation.ROWS)
def test_the_trainer_takes_the_settings_of_every_row(tmp_path, monkeypatch, row):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    flags = {"teacher": distillation.PACKAGED, "data": tmp_path, "train_images": 1, "steps": 3, "seed": 2}
    folder = tmp_path / "runs" / "run"
    distillation.train(distillation.ROWS[row], folder, distillation.PACKAGED, Namespace(**flags))
    arguments = parse_arguments([str(tmp_path / "runs" / "run.yaml")])
    assert arguments.source == str(distillation.PACKAGED) and arguments.optimization.max_steps == 3
    assert arguments.optimization.seed == distillation.SEED + 2


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in distillation.ROWS if row != "bccd-teacher"])  # which bccd makes
def test_a_row_is_trained_scored_and_not_done_again(tmp_path, row):
    flags = ["run", row, "--steps", "2", "--images", "1", "--train-images", "4", "--output", str(tmp_path / "out")]
    if row == "bccd":
        flags += ["--data", str(write_dataset(tmp_path / "data", 4, 1, image_size=96, num_concepts=2))]
    distillation.main(flags)
    (result,) = (tmp_path / "out").glob(f"{row}_seed0_steps2.json")
    record, before = json.loads(result.read_text()), result.stat().st_mtime_ns
    world = distillation.WORLDS[distillation.ROWS[row].world]
    assert record["row"] == row and all(world.figures[0] in record[split] for split in world.splits)
    settings = yaml.safe_load((tmp_path / "out" / "runs" / f"{row}_seed0_steps2.yaml").read_text())
    asked = {name: value for name, value in distillation.ROWS[row].settings.items() if value not in (None, "TEACHER")}
    assert asked.items() <= settings.items() and "TEACHER" not in settings.values()
    distillation.main(flags)
    assert result.stat().st_mtime_ns == before


def test_the_table_of_adapters(tmp_path):
    def write(name: str, ap: float, **more) -> None:
        scores = {split: {"segm_AP": ap, "segm_cgF1": ap / 2} for split in (adapters.NEW, adapters.OLD)}
        (tmp_path / name).write_text(json.dumps({**more, **scores}))

    write("before.json", 0.4)
    write("full_seed0_steps10.json", 0.6, row="full", seed=0, steps=10)
    write("rank-8_seed0_steps10.json", 0.5, row="rank-8", seed=0, steps=10)
    write("rank-8_seed1_steps10.json", 0.7, row="rank-8", seed=1, steps=10)
    lines = adapters.table(tmp_path).splitlines()
    assert lines[2] == "| before | 0 | – | 0.400 | 0.200 | 0.400 | 0.200 |"
    assert lines[3].startswith("| full | 10 | 1 | 0.600 |") and lines[4].startswith("| rank-8 | 10 | 2 | 0.600 |")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["full", "rank-8"])
def test_a_row_of_adapters_is_trained_and_scored(tmp_path, row):
    flags = ["run", row, "--steps", "2", "--images", "1", "--train-images", "4", "--output", str(tmp_path)]
    adapters.main(flags)
    record = json.loads((tmp_path / f"{row}_seed0_steps2.json").read_text())
    assert record["row"] == row and {"segm_AP"} <= record[adapters.NEW].keys() & record[adapters.OLD].keys()
