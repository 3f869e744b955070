"""composed_scores.py, distillation.py and adapters.py of benchmarks, on models that know nothing."""

import json

import adapters
import composed_scores
import distillation
import pytest
import torch
from composed_scores import FIGURES, SPLITS
from conftest import micro_config, shake

from sam3_hf import Sam3LiteModel


def test_scores_of_every_split(tmp_path):
    torch.manual_seed(0)
    shake(Sam3LiteModel(micro_config(image_size=96))).save_pretrained(tmp_path / "model")
    composed_scores.main([str(tmp_path / "model"), "--images", "2", "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 2 and set(SPLITS) <= scores.keys()
    assert set(FIGURES) - {"IL_negative_accuracy"} <= scores["seen"].keys()
    assert set(scores["dense"]["by_words"]) == {"1 words", "2 words", "3 words"}
    assert 0 <= scores["absent"]["IL_negative_accuracy"] <= 1 and "segm_AP" not in scores["absent"]


def test_the_table_of_distillation(tmp_path, caplog):
    def write(name: str, ap: float, **more) -> None:
        scores = {split: {"segm_AP": ap, "segm_cgF1": ap / 2} for split in distillation.SPLITS}
        (tmp_path / name).write_text(json.dumps({**more, **scores}))

    write("teacher.json", 0.8)
    write("plus_seed0_steps10.json", 0.6, row="plus", seed=0, steps=10)
    write("plus_seed1_steps10.json", 0.7, row="plus", seed=1, steps=10)
    write("labels_seed0_steps20.json", 0.4, row="labels", seed=0, steps=20)
    lines = distillation.table(tmp_path).splitlines()
    assert lines[2].startswith("| teacher | – | – | 0.800 | 0.400 |")
    assert lines[3].startswith("| plus | 10 | 2 | 0.650 (81.2%) | 0.325 (81.2%) |")
    assert lines[4].startswith("| labels | 20 | 1 | 0.400 (50.0%) |") and len(lines) == 5


@pytest.mark.slow
@pytest.mark.parametrize("row", ["plus", "labels-and-teacher", "half"])
def test_a_row_is_trained_scored_and_not_done_again(tmp_path, row):
    flags = ["run", row, "--steps", "2", "--images", "1", "--train-images", "4", "--output", str(tmp_path)]
    distillation.main(flags)
    (result,) = tmp_path.glob(f"{row}_seed0_steps2.json")
    record, before = json.loads(result.read_text()), result.stat().st_mtime_ns
    assert record["row"] == row and "segm_AP" in record["unseen"]
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
