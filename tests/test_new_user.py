"""What somebody reaches for who comes from another library: small things that answer at once."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import micro_config, run, shake
from tqdm import tqdm
from typer.testing import CliRunner

from sam3_hf import Prompt, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.evaluation.loop import with_progress
from sam3_hf.precision_sam3_lite import as_dtype, precision_name
from sam3_hf.prediction.detections import SHOWN, Detections
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.compatibility import check_compatible
from sam3_hf.training.reporting import log_step
from sam3_hf.version import __version__


def test_the_version_is_told():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"sam3-hf {__version__}\n"


def detections(count: int, masks: bool = True) -> Detections:
    rle = [{"size": [4000, 6000], "counts": "x" * 500}] * count if masks else None
    boxes, scores = torch.tensor([[10.2, 20, 30, 40]] * count).reshape(-1, 4), torch.linspace(0.9, 0.3, count)
    return Detections(boxes, scores, ["cat"] * count, rle, (4000, 6000), ["cat", "dog"])


def test_what_was_found_fits_on_a_screen():
    lines = str(detections(289)).splitlines()
    assert lines[0] == "Detections(289 cat, 0 dog; image of 6000x4000 pixels)"
    assert lines[1] == "  0.90  cat  [10, 20, 30, 40]"
    assert len(lines) == SHOWN + 2 and lines[-1] == f"  and {289 - SHOWN} more"
    assert repr(detections(0, masks=False)) == "Detections(0 cat, 0 dog; image of 6000x4000 pixels, no masks)"
    assert len(repr([detections(2)] * 3).splitlines()) == 7


def test_a_box_outside_of_the_picture_is_an_error():
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config())).eval()
    pipe = Sam3LitePipeline(model, Sam3LiteProcessor.from_config(model.config))
    picture = torch.zeros(3, 40, 60, dtype=torch.uint8)
    for box in ([60, 0, 80, 20], [0, 40, 10, 50], [-9, 0, 0, 9]):
        with pytest.raises(
            ValueError, match="of the prompt 'cat' is outside of the picture of 60x40 pixels: give left"
        ):
            pipe(picture, Prompt("cat", boxes=[[1, 1, 9, 9]], negative_boxes=[box]))
    pipe(picture, Prompt("cat", boxes=[[50, 30, 70, 50]]))  # a part of it is in the picture


def state(*flags: str) -> dict:
    arguments = parse_arguments(["--data", "x", *flags]).flat()
    return {"arguments": arguments, "images_per_step": 4, "dataset": {"concepts": ["cat"]}}


def test_other_settings_for_a_finished_run_train_nothing_and_are_named_in_one_line(caplog):
    changed = state("--learning_rate", "1", "--max_grad_norm", "1", "--freeze_vocabulary", "true")
    check_compatible(state(), changed, finished=True)
    assert [record.getMessage() for record in caplog.records] == [
        "the run is finished, and nothing is trained with other settings: learning_rate (it had "
        "0.0002, now 1.0), max_grad_norm (it had 0.1, now 1.0); raise --epochs or --max_steps to train on with them, "
        "or start anew in another --output_dir"
    ]
    caplog.clear()
    check_compatible(state(), state("--freeze_vocabulary", "true", "--resume", "auto"), finished=True)
    assert not caplog.records


def test_an_evaluation_says_how_far_it_is(caplog):
    with caplog.at_level(logging.INFO, "sam3_hf"):
        assert list(with_progress(iter(range(8)), 8, SimpleNamespace(is_main_process=True))) == list(range(8))
    texts = [record.getMessage().rpartition(",")[0] for record in caplog.records]
    assert texts == [f"evaluating: {done} of 8 batches" for done in (2, 4, 6)]
    caplog.clear()
    with caplog.at_level(logging.INFO, "sam3_hf"):
        list(with_progress(iter(range(8)), 8, SimpleNamespace(is_main_process=False)))
    assert not caplog.records


def test_a_line_of_the_log_says_how_long_the_run_still_takes(caplog):
    values = {"epoch": 0.5, "loss": 1.0, "lr": 1e-3, "images_per_second": 2.0, "data_wait": 0.0}
    values |= {"memory_gb": 1.0, "overflows": 0}
    with caplog.at_level(logging.INFO, "sam3_hf"):
        log_step(10, 100, 8, values, tqdm(disable=True))  # 90 steps of 8 images, 2 a second
    assert "06:00 of training left" in caplog.text


@pytest.mark.parametrize(
    ("names", "dtype"),
    [(["fp16", "float16", "half", torch.float16], torch.float16), (["bf16", "bfloat16"], torch.bfloat16)],
)
def test_precisions_have_many_names_and_one_is_shown(names, dtype, tmp_path):
    model = Sam3LiteModel(micro_config())
    model.save_pretrained(tmp_path)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path)
    for name in names:
        assert precision_name(name) == names[0] and as_dtype(name) == dtype
        for preset in (None, "same"):
            assert Sam3LiteModel.from_pretrained(tmp_path, dtype=name, preset=preset).dtype == dtype
        flags = (["--mixed_precision", str(name)], [f"--mixed_precision={name}"])
        for flag in flags:
            assert parse_arguments(["--data", "x", *flag]).optimization.mixed_precision == names[0]
    (tmp_path / "run.yaml").write_text(f"data: x\nmixed_precision: {names[1]}\n")
    assert parse_arguments([str(tmp_path / "run.yaml")]).optimization.mixed_precision == names[0]
    result = run("convert", tmp_path, tmp_path / "converted", "--dtype", names[1])
    assert f"parameters in {names[0]}," in result.output
    assert parse_arguments(["--data", "x", "--mixed_precision", "float32"]).optimization.mixed_precision == "no"
    with pytest.raises(ValueError, match=r"`dtype` must be .*fp16, bf16, fp32.*got 'fp17'"):
        Sam3LiteModel.from_pretrained(tmp_path, dtype="fp17")
    result = run("export", tmp_path, tmp_path / "out", "--precision", "bfloat16")
    assert result.exit_code == 1 and result.output.startswith("Error: --precision bf16 is none of fp32, fp16, int8")
