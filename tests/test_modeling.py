import copy
import os
import textwrap

import pytest
import torch
import warm
from conftest import PREDICTIONS, largest_difference, make_labels, micro_config, shake
from transformers import AutoModel, Trainer, TrainingArguments

from sam3_hf import Sam3LiteModel


def rows(inputs: dict, index) -> dict:
    return {name: value[index] for name, value in inputs.items()}


def text_inputs(inputs: dict) -> dict:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["text", "padded text", "boxes", "text and boxes"])
def test_equals_stock_in_float32(model, stock_model, box_inputs, prompt):
    """Without the summary token, which stock gives to phrases only in the company of boxes."""
    model.config.summary_token = False
    if prompt == "boxes":  # the same word for every prompt, as the processor writes it
        box_inputs["input_ids"] = box_inputs["input_ids"][:1].repeat(3, 1)
    if "boxes" not in prompt:
        del box_inputs["input_boxes"], box_inputs["input_boxes_labels"]
    if prompt == "text":
        del box_inputs["attention_mask"]
    expected = stock_model(**box_inputs)
    if "boxes" in prompt:
        box_inputs, expected = rows(box_inputs, [0, 1]), rows(expected, [0, 1])
    assert expected["pred_masks"].abs().max() > 0.1
    assert largest_difference(model(**box_inputs), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_within_the_noise_of_stock(model, stock_model, box_inputs, dtype):
    model.config.summary_token = False
    if dtype == torch.bfloat16:  # the stock box encoder cannot run under bfloat16 autocast
        del box_inputs["input_boxes"], box_inputs["input_boxes_labels"]
    else:
        box_inputs = rows(box_inputs, [0, 1])  # which have boxes
    exact = stock_model(**box_inputs)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = model(**box_inputs), stock_model(**box_inputs)
    for name in PREDICTIONS:
        noise = (theirs[name].float() - exact[name]).abs().mean().item()
        assert noise > 0
        rounding = torch.finfo(dtype).eps * exact[name].abs().mean().item()
        assert (ours[name].float() - exact[name]).abs().mean().item() <= 1.2 * noise + rounding, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_under_autocast_and_in_pure_half(model, box_inputs, dtype):
    exact = model(**box_inputs)
    with torch.autocast("cpu", dtype=dtype):
        autocast = model(**box_inputs)
    pure = copy.deepcopy(model).to(dtype)(**{**box_inputs, "pixel_values": box_inputs["pixel_values"].to(dtype)})
    assert pure.pred_masks.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    for name in PREDICTIONS:
        scale = exact[name].abs().max()
        assert (autocast[name].float() - exact[name]).abs().max() < tolerance * scale, name
        assert (pure[name].float() - exact[name]).abs().max() < tolerance * scale, name


@torch.no_grad()
def test_several_prompts_per_image_equal_one_at_a_time(model, box_inputs):
    image_index = torch.tensor([2, 0, 2])
    together = model(**box_inputs, image_index=image_index)
    separate = dict(box_inputs, pixel_values=box_inputs["pixel_values"][image_index])
    assert largest_difference(together, model(**separate)) <= 1e-5


@torch.no_grad()
def test_vision_runs_once_per_image(model, inputs, monkeypatch):
    batches = []
    forward = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda pixels: batches.append(len(pixels)) or forward(pixels))
    model(**rows(inputs, slice(0, 1)) | text_inputs(inputs))
    assert batches == [1]


@torch.no_grad()
def test_one_prompt_for_all_images_and_cached_features(model, inputs):
    broadcast = model(pixel_values=inputs["pixel_values"], **rows(text_inputs(inputs), slice(0, 1)))
    repeated = model(pixel_values=inputs["pixel_values"], **rows(text_inputs(inputs), [0, 0, 0]))
    assert largest_difference(broadcast, repeated) <= 1e-6
    cached = model(
        vision_embeds=model.get_vision_features(inputs["pixel_values"]),
        text_embeds=model.get_text_features(**text_inputs(inputs)).pooler_output,
        attention_mask=inputs["attention_mask"],
    )
    assert largest_difference(cached, model(**inputs)) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("with_boxes", [True, False])
def test_cached_features_in_float32_go_with_any_precision(model, box_inputs, with_boxes):
    if not with_boxes:
        del box_inputs["input_boxes"], box_inputs["input_boxes_labels"]
    exact = model(**box_inputs)
    tokens = {name: box_inputs.pop(name) for name in ("input_ids", "attention_mask")}
    features = model.get_text_features(**tokens).pooler_output
    box_inputs.update(text_embeds=features, attention_mask=tokens["attention_mask"])
    half = copy.deepcopy(model).to(torch.bfloat16)
    del half.text_projection, half.text_encoder  # as training does once the phrases are encoded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**box_inputs)
    for outputs in (half(**box_inputs), autocast):
        for name in PREDICTIONS:
            difference = (outputs[name].float() - exact[name]).abs().max()
            assert difference < 0.15 * exact[name].abs().max(), name
    box_inputs["text_embeds"] = features.to(torch.bfloat16)
    assert largest_difference(model(**box_inputs), exact) < 0.15


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_prompt_chunks_give_equal_results(model, box_inputs, chunk, monkeypatch):
    index = torch.arange(81) % 3
    many = {name: value[index] for name, value in box_inputs.items() if name != "pixel_values"}
    whole = model(pixel_values=box_inputs["pixel_values"], image_index=index, **many)
    sizes = []
    detect = model.detect
    monkeypatch.setattr(model, "detect", lambda *args: sizes.append(len(args[1])) or detect(*args))
    chunked = model(pixel_values=box_inputs["pixel_values"], image_index=index, prompt_chunk_size=chunk, **many)
    assert max(sizes) == min(chunk, 81) and sum(sizes) == 81
    assert largest_difference(chunked, whole) <= 5e-5  # other batch sizes, other summation orders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "pixel_values"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.long)}, "differ in number"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64)}, "image_index"),
        ({"pixel_values": torch.zeros(3, 3, 72, 64)}, r"\(72, 64\).*\(64, 64\)"),
        ({"input_boxes": torch.zeros(3, 4)}, "num_boxes"),
        ({"labels": make_labels(), "prompt_chunk_size": 2}, "prompt_chunk_size"),
        ({"labels": make_labels()[:2]}, "labels"),
    ],
)
def test_wrong_inputs_are_named(model, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **change})


def test_loss_terms_sum_to_the_loss_and_cover_every_layer(model, inputs):
    outputs = model.train()(**inputs, labels=make_labels())
    assert outputs.loss.item() == pytest.approx(sum(outputs.loss_dict.values()).item(), rel=1e-5)
    for term in ("loss_bbox", "loss_giou", "loss_class", "loss_presence"):
        assert outputs.loss_dict[term] > 0
        assert outputs.loss_dict[term + "_aux"] > 0
    for term in ("loss_mask_focal", "loss_mask_dice", "loss_semantic_focal", "loss_class_o2m"):
        assert outputs.loss_dict[term] > 0
    assert outputs.pred_masks is None


def test_training_computes_masks_of_matched_queries_only(model, inputs, monkeypatch):
    computed = []
    matched_masks = model.mask_decoder.matched_masks

    def counting(*args):
        masks = matched_masks(*args)
        computed.append(len(masks))
        return masks

    monkeypatch.setattr(model.mask_decoder, "matched_masks", counting)
    monkeypatch.setattr(model.mask_decoder, "masks", lambda *args: pytest.fail("computed all masks"))
    model.train()(**inputs, labels=make_labels())
    assert computed == [3]


def test_masks_of_a_label_may_be_none(model, inputs):
    absent, none = make_labels(with_masks=False), [{**label, "masks": None} for label in make_labels()]
    torch.manual_seed(0)
    expected = model.train()(**inputs, labels=absent).loss
    torch.manual_seed(0)
    assert model(**inputs, labels=none).loss == expected


@torch.no_grad()
def test_matched_masks_equal_those_of_all_queries(model, inputs):
    torch.manual_seed(0)
    queries, pixels = torch.randn(3, 12, 64), torch.randn(3, 64, 8, 8)
    prompt, query = torch.tensor([0, 0, 2]), torch.tensor([4, 1, 11])
    every = model.mask_decoder.masks(queries, pixels)
    some = model.mask_decoder.matched_masks(queries, pixels, prompt, query)
    assert torch.allclose(some, every[prompt, query], atol=1e-5)


@torch.no_grad()
def test_evaluation_with_labels_gives_loss_and_all_masks(model, inputs):
    outputs = model(**inputs, labels=make_labels())
    assert outputs.loss > 0
    assert largest_difference(outputs, model(**inputs)) == 0


@pytest.mark.parametrize("step", ["text", "boxes", "no masks", "no objects"])
def test_every_parameter_gets_a_gradient(model, box_inputs, step):
    labels = make_labels(with_masks=step != "no masks")
    if step != "boxes":
        del box_inputs["input_boxes"], box_inputs["input_boxes_labels"]
    if step == "no objects":
        labels = [make_labels()[1] for _ in range(3)]
    loss = model.train()(**box_inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_nothing_unused_in_a_full_step(model, box_inputs):
    """Every parameter but the few that cannot matter here gets a gradient that is not zero."""
    model.train()(**box_inputs, labels=make_labels()).loss.backward()
    zero = {name for name, p in model.named_parameters() if not p.grad.any()}
    # A shift of all keys, or of every attention bias of a head, leaves softmax as it is.
    harmless = {name for name in zero if name.endswith(("k_proj.bias", "layer2.bias")) or "embeddings" in name}
    assert zero - harmless == set()


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(config, box_inputs):
    def losses_and_gradients(checkpointing: bool):
        torch.manual_seed(0)
        model = shake(Sam3LiteModel(config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = model(**box_inputs, labels=make_labels()).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = losses_and_gradients(False)
    other_loss, other_gradients = losses_and_gradients(True)
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("part", ["vision_encoder", "text_encoder", "detr_encoder", "detr_decoder"])
def test_gradient_checkpointing_saves_memory_in_every_part(config, box_inputs, part):
    """Bytes kept for the backward pass, counted where autograd packs them."""

    def saved_bytes(checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = Sam3LiteModel(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            for name, child in model.named_children():
                if name != part:
                    for module in child.modules():
                        if hasattr(module, "gradient_checkpointing"):
                            module.gradient_checkpointing = False
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**box_inputs, labels=make_labels()).loss
        loss.backward()
        return sum(kept.values())

    assert saved_bytes(True) < saved_bytes(False)


def test_flex_attention_is_refused(config):
    with pytest.raises(ValueError, match="does not support"):
        Sam3LiteModel._from_config(copy.deepcopy(config), attn_implementation="flex_attention")


@torch.no_grad()
@pytest.mark.parametrize(
    ("boxes", "backend"),
    [(True, "eager"), *(pytest.param(boxes, "aot_eager", marks=pytest.mark.slow) for boxes in (False, True))],
)
def test_compiles_without_graph_breaks(config, model, box_inputs, boxes, backend):
    torch._dynamo.reset()
    if not boxes:
        del box_inputs["input_boxes"], box_inputs["input_boxes_labels"]
    expected = model(**box_inputs)
    model.compile(fullgraph=True, backend=backend)
    assert largest_difference(model(**box_inputs), expected) <= 1e-5


@torch.no_grad()
def test_copies_of_a_compiled_model_run_their_own_weights(model, inputs, tmp_path):
    torch._dynamo.reset()
    model.compile(backend="eager")
    expected = model(**inputs)
    changed = shake(copy.deepcopy(model), seed=7)
    plain = Sam3LiteModel(model.config).eval()
    plain.load_state_dict(changed.state_dict())
    assert largest_difference(changed(**inputs), plain(**inputs)) == 0
    assert largest_difference(changed(**inputs), expected) > 0.01
    assert largest_difference(model(**inputs), expected) == 0  # and the original its own, still compiled
    torch.save(model, tmp_path / "model.pt")
    unpickled = torch.load(tmp_path / "model.pt", weights_only=False)
    assert largest_difference(unpickled(**inputs), expected) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert largest_difference(Sam3LiteModel.from_pretrained(tmp_path / "saved")(**inputs), expected) <= 1e-5


@pytest.mark.slow
def test_compiled_training_step(model, inputs):
    torch._dynamo.reset()

    def step() -> tuple[float, dict]:
        torch.manual_seed(0)
        loss = model.train()(**inputs, labels=make_labels()).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.item(), gradients

    expected_loss, expected = step()
    model.compile(fullgraph=True, backend="aot_eager")
    loss, found = step()
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max().item()
        assert difference <= 1e-3 * gradient.abs().max().item() + 1e-5, name


DDP_STEP = """
    import sys, torch, torch.distributed as dist
    sys.path.insert(0, {tests!r})
    from conftest import make_labels, micro_config, shake
    from torch.nn.parallel import DistributedDataParallel
    from sam3_hf import Sam3LiteModel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(shake(Sam3LiteModel(micro_config())).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.arange(6).reshape(3, 2) + 5
    # Text only on both, boxes on one, no masks on one, no objects on one.
    for step in range(4):
        inputs = dict(pixel_values=torch.randn(3, 3, 64, 64), input_ids=tokens)
        if step == 1 and rank == 0:
            inputs["input_boxes"] = torch.full((3, 1, 4), 0.4)
        labels = make_labels(with_masks=not (step == 2 and rank == 0))
        if step == 3 and rank == 0:
            labels = [labels[1]] * 3
        loss = model(**inputs, labels=labels).loss
        loss.backward()  # DDP raises here, in the next forward, or hangs if a parameter was left out
        assert torch.isfinite(loss)
        optimizer.step()
        optimizer.zero_grad()
    checksum = sum(p.double().sum() for p in model.parameters())
    sums = [torch.zeros_like(checksum) for _ in range(2)]
    dist.all_gather(sums, checksum)
    assert sums[0] == sums[1]
    dist.barrier()  # who leaves while another still talks can take it down
    dist.destroy_process_group()
"""


def test_ddp_needs_no_search_for_unused_parameters(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(textwrap.dedent(DDP_STEP).format(tests=os.path.dirname(__file__)))
    result = warm.run_two([script], tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": make_labels()[index % 3]}


def collate(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "input_ids": torch.full((len(examples), 4), 7),
        "labels": [example["labels"] for example in examples],
    }


def test_plain_trainer(tmp_path, config):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=8,
        learning_rate=1e-3,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        prediction_loss_only=True,
        label_names=["labels"],  # `Trainer` would take `input_boxes_labels` for a label too
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=Sam3LiteModel(config),
        args=arguments,
        train_dataset=Examples(),
        eval_dataset=Examples(),
        data_collator=collate,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


NEW_PROCESS = """
import sys, torch, sam3_hf
from transformers import AutoModel, AutoProcessor

folder = sys.argv[1]
saved = torch.load(folder + "/expected.pt")
model = AutoModel.from_pretrained(folder)
with torch.no_grad():
    outputs = model(**saved["inputs"])
for name, tensor in saved["outputs"].items():
    assert torch.allclose(outputs[name], tensor, rtol=0, atol=1e-6), name
assert AutoProcessor.from_pretrained(folder).tokenizer("cat")
print(type(model).__module__)
"""


def load_in_a_new_process(folder) -> None:
    """Compares with its expected.pt; without the package, test_without_package.py does it."""
    result = warm.run(["-c", NEW_PROCESS, folder], folder, dict(os.environ))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "sam3_hf.modeling_sam3_lite\n"


def test_a_saved_folder_loads_in_a_new_process(model, inputs, tmp_path):
    from sam3_hf import Sam3LiteProcessor

    model.save_pretrained(tmp_path)
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(**inputs)
    expected = {name: outputs[name] for name in PREDICTIONS}
    torch.save({"inputs": inputs, "outputs": expected}, tmp_path / "expected.pt")
    load_in_a_new_process(tmp_path)


def test_saved_names_are_those_of_the_model(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_auto_classes_and_half_checkpoints(model, tmp_path):
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, Sam3LiteModel)
    assert loaded.dtype == torch.float16
    assert Sam3LiteModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_untrained_queries_differ_and_cover_the_image():
    torch.manual_seed(0)
    model = Sam3LiteModel(micro_config(num_queries=50)).eval()
    with torch.no_grad():
        outputs = model(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=torch.ones(1, 2, dtype=torch.long))
    centers = (outputs.pred_boxes[0, :, :2] + outputs.pred_boxes[0, :, 2:]) / 2
    assert centers.std(dim=0).min() > 0.1


def test_a_configuration_of_a_half_precision_file_makes_a_model_of_one_precision():
    config = micro_config()
    config.dtype = config.text_config.dtype = torch.float16  # as Transformers leaves them where it loads such a file
    assert {parameter.dtype for parameter in Sam3LiteModel(config).parameters()} == {torch.float32}
