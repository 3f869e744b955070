"""`sam3-lite distill-text`: a text encoder that learns from a larger one."""

import json
import os
import random
import subprocess
import tempfile
import time

import pytest
import torch
from conftest import HUNG, micro_config, run, shake
from huggingface_hub import ModelCard
from test_text_encoders import lite_text_model
from test_text_mapping import PHRASES, cosine
from train_cases import environment
from warm import WarmProcess

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data.generated import write_dataset
from sam3_hf.training.text_distillation import (
    TextSettings,
    TextSide,
    distill_text,
    make_lesson,
    read_teacher,
    reordered,
)

FAST = ("--steps", 60, "--batch-size", 16)


def saved(model, folder):
    model.save_pretrained(folder)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config(text_num_hidden_layers=2))).eval()
    return saved(model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The same model with a quarter of the text width, in half precision."""
    model = Sam3LiteModel.from_pretrained(teacher, text_hidden_size=16, text_phrases=PHRASES, dtype="float16")
    return saved(model, tmp_path_factory.mktemp("student"))


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(PHRASES))
    return tmp_path / "words.txt"


def side(source) -> TextSide:
    model = Sam3LiteModel.from_pretrained(source, preset="same", dtype="float32")
    return TextSide(model.text_encoder, model.text_projection, Sam3LiteProcessor.from_config(model.config).tokenizer)


def test_the_command(teacher, student, words, tmp_path):
    result = run("distill-text", student, tmp_path / "out", "--teacher", teacher, "--phrases", words, *FAST)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out/provenance.json").read_text())["text_distilled"]
    assert figures["cosine_after"] > figures["cosine_before"] and figures["phrases_held_out"] == 8
    assert f"{figures['cosine_before']:.4f}, now {figures['cosine_after']:.4f}" in result.output
    assert "words reordered" in result.output
    before, after, large = (Sam3LiteModel.from_pretrained(path) for path in (student, tmp_path / "out", teacher))
    assert after.dtype == torch.float16
    changed = [
        name for name, tensor in before.state_dict().items() if not torch.equal(after.state_dict()[name], tensor)
    ]
    assert changed and all(name.startswith("text_") for name in changed)
    assert cosine(after.float(), large) > cosine(before.float(), large)
    card = ModelCard.load(tmp_path / "out/README.md").text
    assert f"Text distilled from `{teacher.name}` on 60 phrases" in card
    assert (tmp_path / "out/mapping_report.json").read_bytes() == (student / "mapping_report.json").read_bytes()


def test_what_the_detector_makes_of_it(teacher, student, words, tmp_path):
    write_dataset(tmp_path / "data", num_train=1, num_valid=2, image_size=64, num_concepts=2)
    command = ("distill-text", student, tmp_path / "out", "--teacher", teacher, "--phrases", words)
    result = run(*command, "--steps", 1, "--data", tmp_path / "data")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out/provenance.json").read_text())["text_distilled"]
    assert set(figures["scores_before"]) == set(figures["scores_after"]) >= {"segm_AP", "bbox_AP"}
    assert "segm_AP: " in result.output
    again = run(*command, "--overwrite", "--data", tmp_path / "data", "--split", "nowhere")
    assert again.exit_code == 1 and "no split nowhere" in again.output


@pytest.mark.parametrize("kind", ["s0", "s1"])
def test_text_encoders_of_the_other_kind_learn_too(teacher, kind):
    model = lite_text_model(kind)
    own = TextSide(model.text_encoder, model.text_projection, Sam3LiteProcessor.from_config(model.config).tokenizer)
    buffers = {name: buffer.clone() for name, buffer in model.text_encoder.named_buffers()}
    figures = distill_text(own, read_teacher(teacher), PHRASES, TextSettings(steps=60, batch_size=16))
    assert figures["cosine_after"] > figures["cosine_before"] + 0.1
    assert figures["reordered_after"] > figures["reordered_before"]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.text_encoder.named_buffers())
    assert not own.encoder.training


def test_the_seed_alone_decides(teacher, student):
    losses = []
    for seed in (0, 0, 1):
        seen: list[float] = []
        settings = TextSettings(steps=3, batch_size=8, seed=seed)
        distill_text(
            side(student), read_teacher(teacher), PHRASES, settings, lambda _, loss, seen=seen: seen.append(loss)
        )
        losses.append(seen)
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 3


def test_long_phrases_are_compared_as_far_as_both_read_the_same(teacher):
    model = lite_text_model("s1")  # reads 16 tokens, the teacher 32
    own = TextSide(model.text_encoder, model.text_projection, Sam3LiteProcessor.from_config(model.config).tokenizer)
    lesson = make_lesson(own, read_teacher(teacher), ["cat", " ".join(["dog"] * 40)])
    assert lesson.valid[1].tolist() == [True] * 15 + [False] and not lesson.valid[0].all()
    assert lesson.features.shape == (2, 16, 64)


def test_words_are_put_in_another_order():
    shuffle = random.Random(0)
    others = {reordered("small red cat", shuffle) for _ in range(40)}
    assert len(others) == 5 and "small red cat" not in others


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--learning-rate", "nan"), "learning_rate must be above 0 and finite"),
        (("--teacher", "{folder}/none"), "there is no folder"),
        (("--phrases", "{folder}/none.txt"), "none.txt: No such file"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(teacher, student, tmp_path, flags, message):
    flags = [str(flag).format(folder=tmp_path) for flag in flags]
    result = run("distill-text", student, tmp_path / "out", "--teacher", teacher, *flags)
    *_, said = result.output.splitlines()  # behind the bars of what was loaded
    assert result.exit_code == 1 and said.startswith("Error: ") and message in said
    assert list(tmp_path.iterdir()) == []


def test_models_without_words_are_refused(teacher, student, tmp_path):
    frozen = Sam3LiteModel.from_pretrained(teacher)
    saved(frozen.freeze_vocabulary(["cat"], Sam3LiteProcessor.from_config(frozen.config)), tmp_path / "frozen")
    result = run("distill-text", tmp_path / "frozen", tmp_path / "out", "--teacher", teacher)
    assert result.exit_code == 1 and "frozen has a fixed vocabulary and no text encoder" in result.output
    result = run("distill-text", student, tmp_path / "out", "--teacher", tmp_path / "frozen")
    assert result.exit_code == 1 and "name another teacher" in result.output
    result = run("distill-text", student, student, "--teacher", teacher)
    assert result.exit_code == 1 and "pass --overwrite" in result.output


def test_a_killed_run_leaves_nothing(teacher, student, words, tmp_path):
    program = ["-m", "sam3_hf.cli", "distill-text", student, tmp_path / "out", "--teacher", teacher]
    program += ["--phrases", words, "--steps", 10**6]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = WarmProcess(program, tmp_path, environment(), output, errors)
        try:
            end = time.monotonic() + HUNG
            while b"step/s" not in os.pread(errors.fileno(), 2**20, 0):
                assert time.monotonic() < end
                with pytest.raises(subprocess.TimeoutExpired):  # it goes on
                    process.wait(0.05)
        finally:
            process.end_all()
        process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]
