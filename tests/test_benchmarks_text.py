"""benchmarks/text_towers.py, at small sizes; no test asks how long anything took."""

import json

import pytest
import text_towers
import torch
from conftest import micro_config, shake

from sam3_hf import Sam3LiteModel
from sam3_hf.data.words import UNSEEN_PHRASES


def test_what_a_smaller_text_encoder_keeps(tmp_path):
    torch.manual_seed(0)
    shake(Sam3LiteModel(micro_config(image_size=96, text_num_hidden_layers=2))).save_pretrained(tmp_path / "model")
    options = ["--images", "1", "--steps", "2", "--text-num-hidden-layers", "1"]
    text_towers.main(["kept", str(tmp_path / "model"), *options, "--output", str(tmp_path / "kept.json")])
    record = json.loads((tmp_path / "kept.json").read_text())
    rows = {row["text"]: row for row in record["rows"]}
    assert list(rows) == ["teacher", "mapped", "mapped and fitted", "and distilled, 2 steps"]
    assert [row["share"] < 0.25 for row in rows.values()] == [False, True, True, True]
    assert rows["mapped"]["cosine"] < rows["mapped and fitted"]["cosine"] < rows["teacher"]["cosine"] == 1
    assert {"seen segm_AP", "seen segm_AP kept", "unseen segm_cgF1"} <= rows["teacher"].keys()


def test_words_that_are_learnt_are_not_those_that_are_composed():
    phrases = text_towers.known_phrases()
    assert "circle" in phrases and "red squares" in phrases and "orange juice" in phrases
    assert not set(UNSEEN_PHRASES) & set(phrases)
    assert not {f"{phrase}s" for phrase in UNSEEN_PHRASES} & set(phrases)


def test_what_text_encoders_cost(tmp_path):
    options = ["--preset", "tiny", "--repeats", "1", "--output", str(tmp_path / "cost.json")]
    text_towers.main(["cost", *options])
    rows = {row["text"]: row for row in json.loads((tmp_path / "cost.json").read_text())["rows"]}
    assert list(rows) == ["standard", "l", "s1", "s0"] and rows["standard"]["load_ratio"] == 1
    assert rows["l"]["fp16_mb"] == pytest.approx(2e-6 * rows["l"]["parameters"], rel=0.1)
    with pytest.raises(SystemExit):
        text_towers.main(["cost", *options])
