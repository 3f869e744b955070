"""The standard checkpoint that the package carries: it works, and so does what is made from it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import Sam3Model

import sam3_hf
from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.data import EvalDataset, load_dataset_splits
from sam3_hf.data.composed import compose, phrases_of_object, write_composed
from sam3_hf.data.words import HELD_OUT, some_phrases
from sam3_hf.evaluation.loop import evaluate
from sam3_hf.evaluation.text import PhraseFeatures
from sam3_hf.mapping.calibration import calibrate_mapping

CHECKPOINT = Path(sam3_hf.__file__).parent / "assets" / "tiny-standard"
SIZE = Sam3LiteConfig.from_pretrained(CHECKPOINT).image_size
PHRASES = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Drawn with another seed than those of the checkpoint's training."""
    folder = tmp_path_factory.mktemp("pictures")
    return write_composed(folder, {"train": 24, "valid": 8}, image_size=SIZE, seed=77, num_phrases=PHRASES)


def scores(model, pictures) -> dict:
    processor = Sam3LiteProcessor.from_config(model.config)
    dataset = EvalDataset(load_dataset_splits(pictures)["validation"], model.config.image_size)
    text = PhraseFeatures(model, processor, dataset.concepts, model.device)
    return evaluate(Accelerator(cpu=True), model, processor, text, dataset, batch_size=8)


@pytest.fixture(scope="module")
def teacher() -> Sam3LiteModel:
    return Sam3LiteModel.from_pretrained(CHECKPOINT, preset="same", dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher_scores(teacher, pictures) -> dict:
    return scores(teacher, pictures)


def test_it_is_small_and_in_half_precision():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8e6
    assert Sam3LiteModel.from_pretrained(CHECKPOINT, preset="same").dtype == torch.float16


def test_it_finds_what_is_there_and_nothing_else(teacher_scores):
    assert teacher_scores["segm_AP50"] >= 0.7 and teacher_scores["bbox_AP50"] >= 0.75
    assert teacher_scores["IL_MCC"] >= 0.6 and teacher_scores["IL_negative_accuracy"] >= 0.85


@torch.no_grad()
def test_stock_transformers_load_it():
    teacher = Sam3LiteModel.from_pretrained(CHECKPOINT, preset="same", dtype=torch.float32, summary_token=False).eval()
    stock = Sam3Model.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = Sam3LiteProcessor.from_pretrained(CHECKPOINT)(text="red circle", original_sizes=[(SIZE, SIZE)])
    inputs = {"pixel_values": pixels, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected, result = stock(**inputs), teacher(**inputs)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits"):
        torch.testing.assert_close(result[name], expected[name], atol=1e-4, rtol=1e-4)


def test_words_that_training_never_combined_are_told_apart():
    pairs = [" ".join(pair) for pair in HELD_OUT]
    pipe = Sam3LitePipeline.from_pretrained(CHECKPOINT)
    surest = []
    for index in range(len(pairs)):
        pixels, objects = compose("unseen", index, SIZE, seed=77)
        found = pipe(Image.fromarray(pixels), pairs, threshold=0.05)
        best = found.labels[int(found.scores.argmax())] if len(found) else None
        surest.append(best in [phrase for painted in objects for phrase in phrases_of_object(painted)])
    assert len(pairs) == 12 and sum(surest) >= 8, surest


def test_a_lite_model_made_from_it_works_before_any_training(teacher, teacher_scores, pictures):
    mapped = Sam3LiteModel.from_pretrained(CHECKPOINT, preset="tiny", dtype=torch.float32)
    assert mapped.mapping_report.strategy == "isometry" and mapped.num_parameters() < 0.65 * teacher.num_parameters()
    concepts = list(some_phrases(PHRASES))
    calibrated = calibrate_mapping(teacher, pictures / "train", preset="tiny", prompts=concepts, search_depth=False)
    shares = [scores(model, pictures)["segm_AP"] / teacher_scores["segm_AP"] for model in (mapped, calibrated)]
    assert shares[0] > 0.1 and shares[1] > 0.75, shares
    assert min(calibrated.mapping_report.calibration["pyramid_cosines"]) > 0.9


def test_the_pipeline_takes_another_resolution(pictures):
    pipe = Sam3LitePipeline.from_pretrained(CHECKPOINT, image_size=192)
    results = pipe(sorted((pictures / "valid").glob("*.png"))[:4], ["circle", "square", "red circle"])
    assert pipe.model.config.image_size == 192 and sum(map(len, results)) > 0
