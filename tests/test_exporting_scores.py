"""What exports keep of a model that finds things, and of one at full size: slow, as they are traced first."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_exporting import assert_equal_in_float32

import sam3_hf
from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import write_composed
from sam3_hf.data.words import some_phrases
from sam3_hf.evaluation.loop import evaluate
from sam3_hf.evaluation.text import PhraseFeatures
from sam3_hf.exporting.calibration import Calibration
from sam3_hf.exporting.export import export_model
from sam3_hf.exporting.opening import open_export
from sam3_hf.mapping.calibration import calibrate_mapping

CHECKPOINT = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"
CONCEPTS = list(some_phrases(12))
SCORED, SEED = 100, 10_000  # pictures, those of the tables of quality: no training has the seed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Those to calibrate with, and `seen`, which is scored."""
    folder, size = tmp_path_factory.mktemp("pictures"), Sam3LiteConfig.from_pretrained(CHECKPOINT).image_size
    write_composed(folder, {"seen": SCORED}, size, SEED)
    return write_composed(folder, {"train": 128}, size, seed=77, num_phrases=len(CONCEPTS))


def scores(folder: Path, pictures: Path) -> dict:
    model, processor = open_export(folder)
    file = pictures / "seen" / "_annotations.coco.json"
    dataset = EvalDataset(load_dataset_splits({"test": file}, check_images=False)["test"], model.config.image_size)
    text = PhraseFeatures(model, processor, dataset.concepts, model.device)
    return evaluate(Accelerator(cpu=True), model, processor, text, dataset, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-standard", "tiny"])
def test_int8_keeps_the_scores(preset, pictures, tmp_path):
    source = CHECKPOINT
    if preset == "tiny":
        teacher = Sam3LiteModel.from_pretrained(CHECKPOINT, preset="same", dtype=torch.float32)
        train = pictures / "train"
        model = calibrate_mapping(teacher, train, preset=preset, prompts=CONCEPTS, search_depth=False)
        source = tmp_path / "source"
        model.save_pretrained(source)
        Sam3LiteProcessor.from_config(model.config).save_pretrained(source)
    export_model(source, tmp_path / "fp32")
    exact = scores(tmp_path / "fp32", pictures)
    for precision, loss in {"int8-weights": 0.003, "int8": 0.01}.items():
        calibration = Calibration(pictures / "train", CONCEPTS) if precision == "int8" else None
        export_model(tmp_path / "fp32", tmp_path / precision, precision=precision, calibration=calibration)
        found = scores(tmp_path / precision, pictures)
        assert found["segm_AP"] >= (1 - loss) * exact["segm_AP"], (precision, found["segm_AP"], exact["segm_AP"])


@pytest.mark.slow
def test_lite_at_336_px_is_that_of_pytorch(tmp_path):
    """Without the text encoder, which takes gigabytes and is tested in miniature."""
    torch.manual_seed(0)
    config = Sam3LiteConfig.from_preset("lite", image_size=336, text_num_hidden_layers=1)
    model = Sam3LiteModel(config).eval()
    model.save_pretrained(tmp_path / "lite")
    Sam3LiteProcessor.from_config(config).save_pretrained(tmp_path / "lite")
    export_model(tmp_path / "lite", tmp_path / "onnx")
    exported = open_export(tmp_path / "onnx")[0]
    for with_boxes in (False, True):
        assert_equal_in_float32(exported, model, with_boxes)
