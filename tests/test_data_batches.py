"""Samples, batches and their order."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from data_cases import HEIGHT, WIDTH, annotation, image, write_coco, write_roboflow
from PIL import Image
from transformers import Trainer, TrainingArguments

from sam3_hf.data import (
    Augmentation,
    BatchKeys,
    EvalDataset,
    PromptCollator,
    PromptSampling,
    TrainDataset,
    eval_batches,
    load_dataset_splits,
    make_loader,
    measure_throughput,
    steps_per_epoch,
)
from sam3_hf.data.sampling import Prompt
from sam3_hf.data.scenes import Tile, place
from sam3_hf.data.torch_dataset import make_label
from sam3_hf.data.transforms import GeometricTransform
from sam3_hf.evaluation import CGF1, CocoAP, prediction_row
from sam3_hf.rle import decode_mask

SIZE = 64


@pytest.fixture
def splits(tmp_path):
    return load_dataset_splits(write_roboflow(tmp_path, images_per_split=5))


class WordTokenizer:
    """One id per word, as long as asked."""

    model_max_length = 32

    def __call__(self, phrases, padding, truncation, max_length, split_special_tokens, return_tensors):
        ids = torch.zeros(len(phrases), max_length, dtype=torch.long)
        for row, phrase in enumerate(phrases):
            words = [1 + sum(word.encode()) % 90 for word in phrase.split()]
            ids[row, : len(words)] = torch.tensor(words)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# Samples


def test_train_sample(splits):
    sample = TrainDataset(splits["train"], SIZE)[0, 3]
    assert sample.pixel_values.shape == (3, SIZE, SIZE) and sample.pixel_values.dtype == torch.float32
    assert -1 <= sample.pixel_values.min() and sample.pixel_values.max() <= 1
    assert sample.image_id == 4 and "platelet" in sample.phrases
    for phrase, label in zip(sample.phrases, sample.labels, strict=True):
        count = {"RBC": 3, "WBC": 1, "platelet": 0}[phrase]
        assert label["boxes"].shape[0] <= count and label["boxes"].dtype == torch.float32
        assert label["masks"].shape == (len(label["boxes"]), SIZE, SIZE) and label["masks"].dtype == torch.bool
        assert ((label["boxes"] > 0) & (label["boxes"] < 1)).all()


def test_labels_follow_the_painted_object(tmp_path):
    """A red rectangle in each image: target boxes and masks lie on the red pixels, however the image is augmented."""
    images, annotations = [image(1), image(2)], []
    for number, (x, y, w, h) in enumerate([(30, 20, 40, 24), (60, 40, 50, 30)], start=1):
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(annotation(number, number, bbox=[x, y, w, h], segmentation=[corners]))
    write_coco(tmp_path, images, annotations)
    for number, entry in enumerate(annotations, start=1):
        x, y, w, h = entry["bbox"]
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[y : y + h, x : x + w, 0] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    dataset = TrainDataset(load_dataset_splits(tmp_path)["train"], 128, PromptSampling(box_prompt_probability=1))
    present = 0
    for epoch in range(20):
        for index in range(2):
            sample = dataset[epoch, index]
            red = (sample.pixel_values[0] > 0) & (sample.pixel_values[1] < 0)
            label = sample.labels[0]
            if sample.boxes[0] is None:
                assert red.sum() < 128 and label["boxes"].shape == (0, 4)
                continue
            present += 1
            rows, columns = torch.nonzero(red.any(1))[:, 0], torch.nonzero(red.any(0))[:, 0]
            expected = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            cx, cy, w, h = label["boxes"][0] * 128
            actual = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            torch.testing.assert_close(actual, expected.float(), atol=1.01, rtol=0)
            assert (label["masks"][0] ^ red).sum() <= 2 * (w + h)  # differs at the border only
            torch.testing.assert_close(sample.boxes[0], label["boxes"][0], atol=0.2, rtol=0)
    assert present > 25


def test_concept_that_is_cropped_away_becomes_a_negative(tmp_path):
    corner = annotation(1, bbox=[0, 0, 6, 6], segmentation=[[0, 0, 6, 0, 6, 6, 0, 6]])
    middle = annotation(2, category_id=7, bbox=[50, 30, 20, 20], segmentation=[[50, 30, 70, 30, 70, 50, 50, 50]])
    write_coco(tmp_path, [image(1)], [corner, middle])
    dataset = TrainDataset(load_dataset_splits(tmp_path)["train"], SIZE, augmentation=Augmentation(crop=1.0))
    seen = set()
    for epoch in range(60):
        sample = dataset[epoch, 0]
        for phrase, label in zip(sample.phrases, sample.labels, strict=True):
            seen.add((phrase, len(label["boxes"]), tuple(label["masks"].shape[1:])))
    assert {("RBC", 1, (SIZE, SIZE)), ("RBC", 0, (SIZE, SIZE)), ("platelet", 0, (SIZE, SIZE))} <= seen
    assert ("WBC", 1, (SIZE, SIZE)) in seen


def test_box_of_a_cut_object_is_that_of_its_remaining_pixels(tmp_path):
    """An L whose foot is cropped away: its box shrinks to the stem."""
    letter = [10, 0, 30, 0, 30, 60, 110, 60, 110, 80, 10, 80]
    write_coco(tmp_path, [image(1)], [annotation(1, bbox=[10, 0, 100, 80], segmentation=[letter])])
    dataset = TrainDataset(load_dataset_splits(tmp_path)["train"], 240, augmentation=Augmentation(crop=1.0))
    cut = 0
    for epoch in range(40):
        for label in dataset[epoch, 0].labels:
            for box, mask in zip(label["boxes"] * 240, label.get("masks", []), strict=True):
                rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
                assert box[2].item() == pytest.approx(len(columns), abs=1.5)
                assert box[3].item() == pytest.approx(len(rows), abs=1.5)
                cut += len(rows) < 200
    assert cut > 0


def test_object_of_which_the_crop_has_only_the_box_is_left_out():
    """Of an L, the crop shows the empty quarter; its box reaches into it."""
    letter = [[0, 0, 40, 0, 40, 40, 80, 40, 80, 80, 0, 80]]
    objects = [{"bbox": [0, 0, 80, 80], "segmentation": json.dumps(letter)}]
    transform = GeometricTransform(left=48, top=0, width=32, height=32, flip=False, side=64, x=0, y=0, canvas=64)
    scene = place([Tile({"objects": objects}, transform)])
    label, kept = make_label(Prompt("letter", 0, (0,)), scene, with_masks=True)
    assert scene.cut[0] and scene.visible[0] and kept == ()
    assert label["boxes"].shape == (0, 4) and label["masks"].shape == (0, 64, 64)


def test_object_too_thin_for_a_pixel_keeps_a_mask(tmp_path):
    thin = annotation(1, bbox=[10, 15, 0.2, 30], segmentation=[[10, 15, 10.2, 15, 10.2, 45, 10, 45]])
    write_coco(tmp_path, [image(1)], [thin])
    label = EvalDataset(load_dataset_splits(tmp_path)["train"], 32)[0].labels[0]
    assert label["masks"][0].any() and label["boxes"][0, 2].item() == pytest.approx(0.2 / WIDTH)


def test_masks_only_where_all_objects_of_the_prompt_have_them(tmp_path):
    write_coco(tmp_path, [image(1)], [annotation(1), annotation(2, segmentation=None), annotation(3, category_id=7)])
    dataset = EvalDataset(load_dataset_splits(tmp_path)["train"], SIZE)
    assert not dataset.has_masks
    labels = dataset[0].labels
    assert [label["boxes"].shape[0] for label in labels] == [2, 1, 0]
    assert ["masks" in label for label in labels] == [False, True, False]


def test_crowd_region_without_a_segmentation_takes_no_masks_away(tmp_path):
    crowd = annotation(2, iscrowd=1, segmentation=None, bbox=[0, 0, 10, HEIGHT])
    write_coco(tmp_path, [image(1)], [annotation(1), crowd])
    rows = load_dataset_splits(tmp_path)["train"]
    sample = EvalDataset(rows, SIZE)[0]
    assert [tuple(label["masks"].shape) for label in sample.labels] == [(1, SIZE, SIZE), *[(0, SIZE, SIZE)] * 2]
    masks = [decode_mask(mask) for mask in sample.references[0]["masks"]]
    assert sample.references[0]["iscrowd"] == [0, 1]
    assert masks[1][:, :10].all() and not masks[1][:, 10:].any()  # its box
    assert all("masks" in label for label in TrainDataset(rows, SIZE)[0, 0].labels)


def test_crowd_regions_are_no_targets_but_stay_in_the_references(tmp_path):
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, (WIDTH - 10) * HEIGHT]}
    crowds = [
        annotation(2, iscrowd=1, segmentation=crowd, bbox=[0, 0, 10, HEIGHT]),
        annotation(3, iscrowd=1, category_id=7, segmentation=crowd, bbox=[0, 0, 10, HEIGHT]),
    ]
    write_coco(tmp_path, [image(1)], [annotation(1), *crowds])
    train = load_dataset_splits(tmp_path)["train"]
    phrases = set()
    for epoch in range(20):
        sample = TrainDataset(train, SIZE, PromptSampling(prompts_per_image=9))[epoch, 0]
        phrases.update(sample.phrases)
        assert all(len(label["boxes"]) <= 1 for label in sample.labels)
    assert phrases == {"RBC", "platelet"}  # WBC is there, but not one by one
    sample = EvalDataset(train, SIZE)[0]
    assert [len(label["boxes"]) for label in sample.labels] == [1, 0, 0]
    assert [reference["iscrowd"] for reference in sample.references] == [[0, 1], [1], []]


def test_eval_sample(splits):
    dataset = EvalDataset(splits["validation"], SIZE, categories=[2, 0])
    sample = dataset[2]
    assert sample.phrases == ["platelet", "RBC"] and sample.categories == [2, 0]
    assert sample.original_size == (HEIGHT, WIDTH) and sample.image_id == 3
    torch.testing.assert_close(
        sample.labels[1]["boxes"],
        torch.tensor([[12 / 120, 17.5 / 80, 20 / 120, 25 / 80], [37 / 120, 17.5 / 80, 20 / 120, 25 / 80]]),
    )
    assert sample.references[0]["boxes"] == [] and sample.references[0]["category"] == 2
    reference = sample.references[1]
    assert reference["boxes"] == [[2, 5, 22, 30], [27, 5, 47, 30]] and reference["areas"] == [500, 500]
    assert reference["masks"][0]["size"] == [HEIGHT, WIDTH]
    with pytest.raises(ValueError, match="not positions"):
        EvalDataset(splits["validation"], SIZE, categories=[3])


def test_perfect_predictions_score_one(splits):
    """References of the dataset are what the metrics take."""
    metrics = [CocoAP(), CGF1()]
    dataset = EvalDataset(splits["validation"], SIZE)
    for batch in make_loader(dataset, eval_batches(len(dataset), 2), num_workers=0):
        references = batch["references"]
        predictions = [
            prediction_row(row["image_id"], row["category"], row["boxes"], [0.9] * len(row["boxes"]), row["masks"])
            for row in references
        ]
        for metric in metrics:
            metric.add_batch(predictions=predictions, references=references)
    ap, cgf1 = (metric.compute() for metric in metrics)
    assert ap["bbox_AP"] == pytest.approx(1) and ap["segm_AP"] == pytest.approx(1)
    assert cgf1["segm_cgF1"] == pytest.approx(1, abs=1e-3)


def test_negative_words(splits):
    sampling = PromptSampling(prompts_per_image=6, negative_words=("submarine", "teapot"))
    dataset = TrainDataset(splits["train"], SIZE, sampling)
    assert {"submarine", "teapot"} <= {phrase for index in range(5) for phrase in dataset[0, index].phrases}
    with pytest.raises(ValueError, match="WBC"):
        TrainDataset(splits["train"], SIZE, PromptSampling(negative_words=("WBC",)))


def test_images_that_no_prompt_fits_are_left_out_and_counted(tmp_path, caplog):
    categories = [{"id": 3, "name": "RBC"}]
    many = [annotation(number, 2) for number in range(10, 13)]
    write_coco(tmp_path, [image(1), image(2), image(3)], [annotation(1), *many], categories)
    rows = load_dataset_splits(tmp_path)["train"]
    dataset = TrainDataset(rows, SIZE, PromptSampling(max_objects=2))
    assert [dataset[0, index].image_id for index in range(len(dataset))] == [1, 3]
    assert "1 cases" in caplog.text and "1 images left out" in caplog.text
    assert len(TrainDataset(rows, SIZE, PromptSampling(max_objects=2, negative_words=("teapot",)))) == 3


def test_images_with_nothing_but_a_crowd_region_are_left_out(tmp_path, caplog):
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, (WIDTH - 10) * HEIGHT]}
    region = annotation(2, 2, iscrowd=1, segmentation=crowd, bbox=[0, 0, 10, HEIGHT])
    write_coco(tmp_path, [image(1), image(2)], [annotation(1), region], [{"id": 3, "name": "RBC"}])
    rows = load_dataset_splits(tmp_path)["train"]
    dataset = TrainDataset(rows, SIZE)
    assert len(dataset) == 1 and "1 images left out" in caplog.text
    asked = TrainDataset(rows, SIZE, PromptSampling(negative_words=("teapot",)))
    assert {tuple(asked[epoch, 1].phrases) for epoch in range(20)} == {("teapot",)}


def test_every_image_has_a_prompt_where_a_crop_leaves_only_a_crowd_region(tmp_path):
    """An L of which crops show nothing, its box without pixels of it, or a part; the rest of the image is a crowd."""
    letter = [0, 0, 10, 0, 10, 70, 60, 70, 60, 79, 0, 79]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [60 * HEIGHT, 60 * HEIGHT]}
    objects = [
        annotation(1, bbox=[0, 0, 60, 79], segmentation=[letter]),
        annotation(2, iscrowd=1, segmentation=crowd, bbox=[60, 0, 60, HEIGHT]),
    ]
    write_coco(tmp_path, [image(1)], objects, [{"id": 3, "name": "RBC"}])
    rows, whole_box = load_dataset_splits(tmp_path)["train"], torch.tensor([0.25, 79 / 160, 0.5, 79 / 80])
    dataset = TrainDataset(rows, SIZE, augmentation=Augmentation(crop=1.0, horizontal_flip=0, smallest_side=0.5))
    samples = [dataset[epoch, 0] for epoch in range(150)]
    assert all(sample.phrases == ["RBC"] and len(sample.labels[0]["boxes"]) == 1 for sample in samples)
    uncropped = [torch.allclose(sample.labels[0]["boxes"][0], whole_box, atol=1e-4) for sample in samples]
    assert 0 < sum(uncropped) < 75


# Determinism


def test_sample_depends_on_seed_epoch_and_index_only(splits):
    options = {"sampling": PromptSampling(box_prompt_probability=0.5)}
    dataset, again = TrainDataset(splits["train"], SIZE, **options), TrainDataset(splits["train"], SIZE, **options)
    expected = [vars(dataset[2, index]) for index in range(5)]
    torch.manual_seed(99)
    np.random.seed(99)
    for index in reversed(range(5)):
        assert same(vars(again[2, index]), expected[index])
    again.set_epoch(2)
    assert same(vars(again[4]), expected[4])
    assert not same(vars(again[3, 4]), expected[4])
    assert not same(vars(TrainDataset(splits["train"], SIZE, seed=1, **options)[2, 4]), expected[4])


def test_sampling_leaves_global_random_states_alone(splits):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    TrainDataset(splits["train"], SIZE)[0, 1]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_resumed_batches_equal_those_of_the_whole_run(splits):
    def run(num_workers, first_step):
        dataset = TrainDataset(splits["train"], SIZE, PromptSampling(box_prompt_probability=0.5))
        keys = BatchKeys(len(dataset), 2, seed=0, first_step=first_step, last_step=6)
        return list(make_loader(dataset, keys, num_workers=num_workers))

    whole, by_one, by_two = run(0, 1), run(1, 3), run(2, 3)  # two epochs of three batches; from the third on
    assert len(whole) == 6 and len(by_one) == len(by_two) == 4
    assert all(map(same, whole[2:], by_one)) and all(map(same, whole[2:], by_two))
    assert whole[0]["image_ids"] != whole[3]["image_ids"]


def test_resuming_decodes_nothing_that_was_seen(splits):
    class Counting(TrainDataset):
        keys = []

        def __getitem__(self, key):
            self.keys.append(key)
            return super().__getitem__(key)

    dataset = Counting(splits["train"], SIZE)
    loader = make_loader(dataset, BatchKeys(5, 2, seed=0, first_step=15, last_step=15), num_workers=0)
    assert len(loader) == 1 and len(list(loader)) == 1  # the last of three batches of the fifth epoch
    assert len(dataset.keys) == 2 and all(epoch == 4 for epoch, _ in dataset.keys)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("length, batch_size, world_size", [(10, 4, 1), (10, 2, 2), (3, 4, 2), (8, 4, 2)])
def test_every_image_is_seen_in_every_epoch(length, batch_size, world_size, accumulation):
    images_per_step = batch_size * world_size * accumulation
    steps = steps_per_epoch(length, images_per_step)
    options = {"last_step": 2 * steps, "accumulation": accumulation, "world_size": world_size}
    samplers = [BatchKeys(length, batch_size, 0, 1, rank=rank, **options) for rank in range(world_size)]
    passes, orders = steps * accumulation, []
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])} == {2 * passes}
    for epoch in range(2):
        batches = [list(sampler)[epoch * passes : (epoch + 1) * passes] for sampler in samplers]
        assert all(len(batch) == batch_size for own in batches for batch in own)
        keys = [key for own in batches for batch in own for key in batch]
        assert {index for _, index in keys} == set(range(length)) and {number for number, _ in keys} == {epoch}
        assert len(keys) < length + images_per_step
        orders.append([index for _, index in keys])
    assert length <= 3 or orders[0] != orders[1]


def test_processes_together_see_the_global_batches_of_one():
    options = {"seed": 5, "first_step": 1, "last_step": 8}  # two epochs
    alone = list(BatchKeys(16, 4, **options))
    parts = [list(BatchKeys(16, 2, rank=rank, world_size=2, **options)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == alone


def test_evaluation_shares_images_out_evenly(splits):
    dataset = EvalDataset(splits["validation"], SIZE)
    loaders = [make_loader(dataset, eval_batches(len(dataset), 2, rank, 2), num_workers=0) for rank in range(2)]
    ids = [[batch["image_ids"] for batch in loader] for loader in loaders]
    assert ids == [[[1, 3], [5]], [[2, 4], [1]]]  # one comes twice, for all processes to make the same passes
    assert eval_batches(4, 2, 0, 2) + eval_batches(4, 2, 1, 2) == [[0, 2], [1, 3]]
    for count, world_size in ((7, 3), (2, 4), (9, 1)):
        shares = [sum(eval_batches(count, 2, rank, world_size), []) for rank in range(world_size)]
        assert {len(share) for share in shares} == {-(-count // world_size)}
        assert set(sum(shares, [])) == set(range(count))
    assert eval_batches(5, 2) == [[0, 1], [2, 3], [4]]


# Batches


def test_train_batch(splits):
    dataset = TrainDataset(splits["train"], SIZE, PromptSampling(box_prompt_probability=1))
    samples = [dataset[0, index] for index in (0, 3)]
    batch = PromptCollator()(samples)
    assert set(batch) == {
        *("pixel_values", "phrases", "image_index", "labels", "image_ids", "input_boxes", "input_boxes_labels", "keys")
    }
    assert batch["keys"] == [(0, 0), (0, 3)]
    prompts = len(batch["phrases"])
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE) and batch["image_ids"] == [1, 4]
    assert batch["image_index"].tolist() == [0] * len(samples[0].phrases) + [1] * len(samples[1].phrases)
    assert batch["input_boxes"].shape == (prompts, 1, 4) and batch["input_boxes_labels"].dtype == torch.int64
    for label, state in zip(batch["labels"], batch["input_boxes_labels"][:, 0].tolist(), strict=True):
        assert state == (1 if len(label["boxes"]) else -10)
    for phrase, state in zip(batch["phrases"], batch["input_boxes_labels"][:, 0].tolist(), strict=True):
        assert phrase != "visual" or state == 1
    no_boxes = PromptCollator()([TrainDataset(splits["train"], SIZE)[0, 3]])
    assert "input_boxes" not in no_boxes and "input_boxes_labels" not in no_boxes


def test_eval_batch(splits):
    dataset = EvalDataset(splits["validation"], SIZE)
    batch = PromptCollator(WordTokenizer())([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 32)
    assert batch["original_sizes"] == [(HEIGHT, WIDTH)] * 2 and batch["categories"].tolist() == [0, 1, 2] * 2
    assert [(row["image_id"], row["category"]) for row in batch["references"]] == [
        (image_id, category) for image_id in (1, 2) for category in range(3)
    ]
    json.dumps(batch["references"])


def test_collator_for_models_needs_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        PromptCollator(model_inputs_only=True)


def test_transformers_trainer_trains_on_the_batches(splits, tmp_path, model):
    dataset = TrainDataset(splits["train"], SIZE, PromptSampling(prompts_per_image=2, box_prompt_probability=0.5))
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "report_to": "none"}
    arguments = TrainingArguments(tmp_path / "out", use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    collator = PromptCollator(WordTokenizer(), model_inputs_only=True)
    trainer = Trainer(model.train(), arguments, data_collator=collator, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()


def test_throughput_is_measured(splits, monkeypatch):
    dataset = TrainDataset(splits["train"], SIZE)
    loader = make_loader(dataset, BatchKeys(5, 1, seed=0, first_step=1, last_step=5), num_workers=0)
    readings = iter([10.0, 10.5])  # seconds, before and after the batches
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    assert measure_throughput(loader, 3) == 6
    monkeypatch.undo()
    with pytest.raises(ValueError, match="one batch"):
        measure_throughput(make_loader(dataset, BatchKeys(5, 8, 0, 1, 1), num_workers=0), 3)


def leave_a_trace(folder, number):
    (folder / f"worker {number}").touch()


def test_workers_are_set_up_as_asked(splits, tmp_path):
    loader = make_loader(
        TrainDataset(splits["train"], SIZE),
        BatchKeys(5, 1, seed=0, first_step=1, last_step=2),
        num_workers=2,
        worker_init_fn=partial(leave_a_trace, tmp_path),
    )
    assert len(list(loader)) == 2 and loader.prefetch_factor == 2
    assert sorted(path.name for path in tmp_path.glob("worker *")) == ["worker 0", "worker 1"]
