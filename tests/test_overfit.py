"""The whole way from files to scores: a small model must be able to learn four images by heart."""

import math

import torch

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data import Augmentation, EvalDataset, PromptCollator, PromptSampling, TrainDataset, load_dataset_splits
from sam3_hf.data.generated import write_dataset
from sam3_hf.evaluation import CocoAP, prediction_row

STEPS = 160
LEARNING_RATE = 1e-3


def segm_scores(model, processor, rows) -> dict:
    dataset = EvalDataset(rows, model.config.image_size)
    batch = PromptCollator(processor.tokenizer)([dataset[index] for index in range(len(dataset))])
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "image_index")}
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    images = batch["image_index"].tolist()
    results = processor.post_process_instance_segmentation(
        outputs, threshold=0.05, target_sizes=[batch["original_sizes"][image] for image in images]
    )
    predictions = [
        prediction_row(batch["image_ids"][image], category, result["boxes"], result["scores"], result["masks"])
        for image, category, result in zip(images, batch["categories"].tolist(), results, strict=True)
    ]
    return CocoAP().compute(predictions=predictions, references=batch["references"])


def test_overfits_four_images(tmp_path):
    torch.manual_seed(0)
    rows = load_dataset_splits(write_dataset(tmp_path, 4, 1, image_size=64, num_concepts=2))["train"]
    config = Sam3LiteConfig.from_preset(
        "tiny",
        image_size=64,
        num_queries=12,
        vision_num_hidden_layers=2,
        vision_global_attn_indexes=[1],
        detr_encoder_layers=1,
        detr_decoder_layers=2,
    )
    model = Sam3LiteModel(config).train()
    processor = Sam3LiteProcessor.from_config(config)
    still = Augmentation(horizontal_flip=0, crop=0, smallest_side=1, color_jitter=0)
    dataset = TrainDataset(rows, config.image_size, PromptSampling(prompts_per_image=2), still)
    collator = PromptCollator(processor.tokenizer, model_inputs_only=True)
    batch = collator([dataset[index] for index in range(len(dataset))])

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    warmup_and_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    for _ in range(STEPS):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup_and_cosine.step()
    scores = segm_scores(model, processor, rows)
    assert scores["segm_AP50"] >= 0.9
    assert scores["bbox_AP50"] >= 0.9
