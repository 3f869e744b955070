"""benchmarks/mapping_quality.py from end to end, and its figures on values worked out by hand."""

import json
from pathlib import Path

import mapping_quality
import mapping_students
import pytest
import torch
from conftest import micro_config, shake
from mapping_measures import SCORES, energy_curve, presence_auc, residual_streams
from mapping_students import IDENTITY, PARTS, STRATEGIES, smaller_parts, student_config
from mapping_table import best_learning_rate, steps_cell, steps_to_share, table
from mapping_training import flatness_penalty
from PIL import Image

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.mapping.calibration import calibrate_mapping

RECIPE = """
data: generated
generated_train: 6
generated_concepts: 4
prompts_per_image: 2
train_text_encoder: true
num_workers: 0
batch_size: 2
max_grad_norm: 1.0
mixed_precision: "no"
eval_batch_size: 4
"""


@pytest.fixture
def teacher(tmp_path) -> Path:
    torch.manual_seed(0)
    config = micro_config(
        vision_num_attention_heads=4, vision_num_hidden_layers=4, vision_global_attn_indexes=[1, 3], num_queries=6
    )
    shake(Sam3LiteModel(config)).save_pretrained(tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "teacher"


@pytest.fixture
def bench(tmp_path, teacher):
    """Runs a subcommand on three held-out pictures, with `teacher` unless it is the table."""

    def bench(command: str, *flags):
        own = [tmp_path / "recipe.yaml", "--teacher", teacher, "--held-out", 3, "--curve-images", 2, "--every", 1]
        if command == "table":
            own = []
        mapping_quality.main([*map(str, [command, *own, "--output", tmp_path / "out", *flags])])
        return tmp_path / "out"

    return bench


@pytest.fixture
def calibrations(monkeypatch) -> list[dict]:
    """Notes with what the calibrated mapping is called."""
    calls = []

    def noted(source, images=None, **options):
        calls.append({"images": images, **options})
        return calibrate_mapping(source, images, **options | {"num_images": 6})

    monkeypatch.setattr(mapping_students, "calibrate_mapping", noted)
    return calls


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_from_end_to_end(bench, capsys, calibrations):
    flags = ("--seeds", 1, "--max-steps", 1, "--learning-rates", "1e-3")
    results = bench("run", *flags) / "results" / "teacher"
    started = {f"{strategy}_seed1.json" for strategy in (IDENTITY, *STRATEGIES)}
    runs = {f"{strategy}_seed1_lr0.001.json" for strategy in STRATEGIES}
    assert {path.name for path in results.iterdir()} == {"teacher.json"} | started | runs

    identity = read(results / f"{IDENTITY}_seed1.json")
    assert identity["scores"] == pytest.approx(read(results / "teacher.json")["scores"])
    assert identity["fpn_cosines"] == pytest.approx([1, 1, 1])
    random, isometry = (read(results / f"{strategy}_seed1.json") for strategy in ("random", "isometry"))
    assert isometry["fpn_cosines"][2] > random["fpn_cosines"][2] + 0.1
    assert isometry["parameters"] == random["parameters"] < identity["parameters"]
    assert read(results / "isometry-plus_seed1.json")["parameters"] > isometry["parameters"]
    assert [step for step, _ in read(results / "skip_seed1_lr0.001.json")["curve"]] in ([0, 1], [0])
    with_images, without = calibrations[:2]
    assert len(calibrations) == 4  # and again with all layers of the decoder
    assert with_images["seed"] == 1 and with_images["num_images"] == 256 and len(with_images["images"]) == 6
    assert with_images["images"][0].dtype == torch.uint8 and with_images["prompts"][0] == "red circle"
    assert without["images"] is None and without["prompts"] == with_images["prompts"]

    bench("table")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(STRATEGIES) + 1 and "| teacher | 1.000 / 1.000 / 1.000 |" in rows[1]
    assert rows[1].count("(100%)") == sum(read(results / "teacher.json")["scores"][name] > 0 for name in SCORES)


@pytest.mark.slow
def test_what_is_there_is_not_done_again(bench, monkeypatch, teacher):
    flags = ("--strategies", "isometry", "--seeds", 0)
    results = bench("run", *flags, "--max-steps", 0) / "results" / "teacher"
    assert {path.name for path in results.iterdir()} == {"teacher.json", "isometry_seed0.json"}
    # As if the teacher were out of reach: then a run ends with its steps.
    record = read(results / "teacher.json") | {"curve_AP": 2.0}
    (results / "teacher.json").write_text(json.dumps(record))
    bench("run", *flags, "--max-steps", 2, "--learning-rates", "1e-3", "2e-3")
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    (results / "isometry_seed0_lr0.002.json").unlink()  # as after an interruption
    bench("run", *flags, "--max-steps", 2, "--learning-rates", "1e-3", "2e-3")
    changed = {path.name for path in results.iterdir() if before.get(path) != path.stat().st_mtime_ns}
    assert changed == {"isometry_seed0_lr0.002.json"}
    bench("run", *flags, "--max-steps", 3, "--learning-rates", "2e-3")
    assert len(read(results / "isometry_seed0_lr0.002.json")["curve"]) == 4
    bench("run", "--strategies", "isometry", "--seeds", 1, "--max-steps", 1, "--learning-rates", "best")
    assert len(list(results.glob("isometry_seed1_lr*"))) == 1
    with pytest.raises(ValueError, match="no runs of select"):
        bench("run", "--strategies", "select", "--seeds", 1, "--max-steps", 1, "--learning-rates", "best")

    with pytest.raises(ValueError, match="other trainer_flags: use another --output"):
        bench("run", *flags, "--prompts_per_image", 1)
    with pytest.raises(SystemExit):
        bench("run", *flags, "--ema_decay", 0.5)
    shake(Sam3LiteModel.from_pretrained(teacher), seed=1).save_pretrained(teacher)
    with pytest.raises(ValueError, match="other weights: use another --name"):
        bench("run", *flags)


@pytest.mark.slow
def test_in_the_composed_world_students_are_scored_on_three_splits(bench, teacher, tmp_path, capsys):
    recipe = RECIPE.replace("generated\ngenerated_train: 6\ngenerated_concepts: 4", "composed\ngenerated_train: 6")
    (tmp_path / "recipe.yaml").write_text(recipe)
    Sam3LiteModel.from_pretrained(teacher, image_size=96).save_pretrained(teacher)
    flags = ("--strategies", "isometry", "--seeds", 0, "--max-steps", 2, "--learning-rates", "1e-3")
    results = bench("run", *flags, "--schedule", "cosine") / "results" / "teacher"
    start, run = read(results / "isometry_seed0.json"), read(results / "isometry_seed0_lr0.001_cosine2.json")
    for record in (read(results / "teacher.json"), start, run):
        assert all(set(SCORES) <= record[split].keys() for split in ("scores", "unseen", "dense"))
    assert run["curve"][-1][0] == 2 and run["schedule"] == "cosine"
    bench("table")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| isometry")]
    assert [row.count("|") for row in rows] == [12, 7] and "cosine, 2 steps" in rows[1]


def test_a_standard_teacher_keeps_its_sizes(bench, teacher):
    lite = Sam3LiteModel.from_pretrained(teacher)
    lite.to_sam3().save_pretrained(teacher)
    folder = bench("run", "--strategies", IDENTITY, "isometry", "--seeds", 0, "--max-steps", 0)
    results = folder / "results" / "teacher"
    same, smaller = (read(results / f"{strategy}_seed0.json") for strategy in (IDENTITY, "isometry"))
    assert same["scores"] == pytest.approx(read(results / "teacher.json")["scores"])
    assert smaller["parameters"] < same["parameters"] == lite.num_parameters()


def test_a_flatter_teacher(bench, teacher, tmp_path):
    flags = ("--flat", tmp_path / "flat", "--steps", 12, "--weight", 1e4, "--learning-rates", 3e-3)
    pictures = sorted((bench("flatten", *flags) / "held_out" / "test").glob("*.png"))
    processor = Sam3LiteProcessor.from_config(Sam3LiteConfig.from_pretrained(teacher))
    pixels = processor(images=[Image.open(path) for path in pictures], return_tensors="pt")["pixel_values"]
    penalties = []
    for folder in (teacher, tmp_path / "flat"):
        model = Sam3LiteModel.from_pretrained(folder)
        with torch.no_grad(), residual_streams(model) as streams:
            model.get_vision_features(pixels)
        assert len(streams) == 4
        penalties.append(sum(map(flatness_penalty, streams)).item())
    assert penalties[1] < 0.8 * penalties[0]
    with pytest.raises(FileExistsError, match="choose another --flat"):
        bench("flatten", *flags)


def test_flatness_of_known_spectra():
    torch.manual_seed(0)
    white = torch.randn(200_000, 4).double()
    white = white - white.mean(1, keepdim=True)  # isotropic but for the constant vector
    assert flatness_penalty(white).item() == pytest.approx(0, abs=1e-3)
    lines = white.clone()
    lines[:, :] = white[:, :1] * torch.tensor([1.0, -1.0, 0.0, 0.0])  # one direction of three: eigenvalues 3, 0, 0
    expected = -sum(torch.tensor([3.001, 0.001, 0.001, 1.001]).div(1.001).log()) / 4
    assert flatness_penalty(lines).item() == pytest.approx(expected.item(), rel=1e-3)
    curve = energy_curve(torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])))
    assert curve["0.125"] == pytest.approx(0.4) and curve["0.25"] == pytest.approx(0.7)
    assert curve["0.75"] == pytest.approx(1.0)


def test_presence_auc():
    # pairs of present (0.9, 0.4) and absent (0.5, 0.4): right, right, wrong, equal
    assert presence_auc([0.9, 0.5, 0.4, 0.4], [True, False, True, False]) == pytest.approx(2.5 / 4)
    assert presence_auc([1.0, 2.0, 3.0], [False, False, True]) == 1.0
    with pytest.raises(ValueError, match="more held-out images"):
        presence_auc([1.0, 2.0], [True, True])


def test_steps_to_share():
    curve = [[0, 0.1], [25, 0.42], [50, 0.38], [75, 0.45]]
    assert steps_to_share(curve, 0.5, 0.8) == 25
    assert steps_to_share(curve, 0.5, 0.9) == 75
    assert steps_to_share(curve, 0.5, 0.95) is None
    assert steps_to_share(curve, 0.1, 0.8) == 0


def run_record(rate: float, seed: int, *curve: list) -> dict:
    return {"kind": "run", "strategy": "skip", "seed": seed, "learning_rate": rate, "curve": list(curve)}


def test_the_best_learning_rate_reaches_most_often_then_soonest_then_highest():
    slow = [run_record(1e-4, seed, [0, 0.0], [100, 0.9]) for seed in (0, 1)]
    fast = [run_record(1e-3, seed, [0, 0.0], [50, 0.9], [100, 0.2]) for seed in (0, 1)]
    wild = [run_record(1e-2, 0, [0, 0.0], [25, 0.95]), run_record(1e-2, 1, [0, 0.0], [100, 0.1])]
    assert best_learning_rate(slow + fast + wild, 1.0) == 1e-3
    assert best_learning_rate(slow + wild, 1.0) == 1e-4
    assert best_learning_rate([*slow, fast[0], wild[0]], 1.0) == 1e-2  # compared on seed 0 alone
    assert best_learning_rate(slow + wild, 2.0) == 1e-4  # none gets there: .9 and .9 against .95 and .1
    with pytest.raises(ValueError, match="no seed was run with each"):
        best_learning_rate([slow[0], fast[1]], 1.0)


def test_cells_of_the_table():
    runs = [run_record(1e-4, 0, [0, 0.0], [50, 0.8], [100, 0.9]), run_record(1e-4, 1, [0, 0.0], [50, 0.2], [100, 0.8])]
    assert steps_cell(runs, 1.0, 0.8) == "75 (50–100)"
    assert steps_cell(runs, 1.0, 0.9) == "100; 1 of 2 not within 100"
    assert steps_cell(runs, 1.0, 0.95) == "not within 100"
    scores = {"segm_AP": 0.5, "segm_cgF1": 0.0, "presence_AUC": 0.8}
    teacher = {"name": "big", "scores": scores, "curve_AP": 1.0, "captured_energy": {"0.75": 0.9}}
    start = {"kind": "start", "strategy": "skip", "fpn_cosines": [0.1, 0.2, 0.3]}
    starts = [start | {"seed": seed, "scores": scores | {"segm_AP": ap}} for seed, ap in ((0, 0.2), (1, 0.3))]
    text = table(teacher, starts + runs)
    assert "75.0%: 90.0%" in text
    row = next(line for line in text.splitlines() if line.startswith("| skip"))
    assert row.startswith(
        "| skip | 0.100 / 0.200 / 0.300 | 0.250 ± 0.071 (50%) | 0.000 ± 0.000 | 0.800 ± 0.000 (100%)"
    )
    assert row.endswith("| 0.0001 | 75 (50–100) | 100; 1 of 2 not within 100 | not within 100 |")


def test_ratios_of_the_student():
    config = student_config(Sam3LiteConfig.from_preset("standard"))
    lite = Sam3LiteConfig.from_preset("lite")
    assert config.vision_config.backbone_config.to_dict() == lite.vision_config.backbone_config.to_dict()
    assert config.detr_decoder_config.num_layers == lite.detr_decoder_config.num_layers


def test_one_part_is_smaller_alone():
    teacher = Sam3LiteConfig.from_preset("tiny-standard")

    def sizes(strategy):
        config = student_config(teacher, smaller_parts(strategy))
        vit = config.vision_config.backbone_config
        detr = config.detr_encoder_config.num_layers, config.detr_decoder_config.num_layers
        return (vit.hidden_size, vit.num_hidden_layers), *detr

    assert [sizes(strategy) for strategy in PARTS] == [((96, 6), 6, 6), ((128, 8), 4, 6), ((128, 8), 6, 4)]
    assert sizes("calibrated-plus") == ((96, 6), 4, 6) and sizes("isometry") == ((96, 6), 4, 4)
