"""A student and its teacher, at the smallest sizes."""

import copy
import json

import pytest
import torch
from conftest import make_labels, micro_config, shake
from PIL import Image
from torch.distributed.fsdp import fully_shard

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.data.collate import PromptCollator
from sam3_hf.data.torch_dataset import Sample
from sam3_hf.errors import usable_device
from sam3_hf.evaluation.loop import model_inputs
from sam3_hf.training.arguments import DistillationArguments, parse_arguments
from sam3_hf.training.compatibility import check_compatible
from sam3_hf.training.distillation import LEVEL_WEIGHTS, Distillation
from sam3_hf.training.distillation_terms import query_errors
from sam3_hf.training.model import build_model, calibrated_model, decoder_layers
from sam3_hf.training.objectives import Labels
from sam3_hf.training.phrase_choice import PhraseChoice
from sam3_hf.training.phrases import TokenizedText
from sam3_hf.training.retention import Retention
from sam3_hf.training.teacher import Teacher, check_comparable, load_teacher

PHRASES = ["red circle", "blue square", "green star"]
CPU = torch.device("cpu")
TERMS = ("features", "encoder", "scores", "presence", "boxes", "giou", "queries", "masks", "semantic")


def micro_model(seed: int = 0, **sizes) -> Sam3LiteModel:
    torch.manual_seed(seed)
    return shake(Sam3LiteModel(micro_config(**sizes)), seed)


def teacher_of(model: Sam3LiteModel, present: float = 3.0, confidence: float = 0.3) -> Teacher:
    """A copy of a model that sees every concept, or none where `present` is negative, and trusts its queries."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.detr_decoder.presence_head.layer3.bias.fill_(present)
    return Teacher(model, Sam3LiteProcessor.from_config(model.config), PHRASES, confidence)


def batch_of(seed: int = 0) -> dict:
    """Two images, three prompts, with labels."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    labels = make_labels()
    samples = [
        Sample(pixels[0], PHRASES[:2], labels[:2], [None, None], 1),
        Sample(pixels[1], PHRASES[2:], labels[2:], [torch.tensor([0.5, 0.5, 0.4, 0.4])], 2),
    ]
    return PromptCollator()(samples)


def loss_of(objective: Distillation, model: Sam3LiteModel, batch: dict) -> tuple[torch.Tensor, dict]:
    """In training mode; with gradients in the model."""
    inputs = model_inputs(batch, TokenizedText(Sam3LiteProcessor.from_config(model.config)), CPU)
    model.train().zero_grad()
    torch.manual_seed(0)
    loss, terms = objective(model, batch, inputs)
    if loss.requires_grad:
        loss.backward()
    return loss, terms


def objective_for(model: Sam3LiteModel, teacher: Teacher, **settings) -> Distillation:
    return Distillation(teacher, model, DistillationArguments(teacher="x", **{"feature_steps": 0.0, **settings}))


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = micro_model()
    teacher = teacher_of(model)
    model.load_state_dict(teacher.model.state_dict(), strict=False)  # all but the text encoder, which is the same
    objective = objective_for(model, teacher)
    assert objective.by_number and objective.layers == [0, 1]
    loss, terms = loss_of(objective, model, batch_of())
    assert set(terms) == {f"distill_{name}" for name in TERMS}
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert all(value.item() == pytest.approx(0, abs=1e-4) for value in terms.values())
    # Rounding moves boxes to one side of where their distance has a kink.
    smooth = objective_for(model, teacher, distill_boxes_weight=0.0, distill_giou_weight=0.0)
    loss_of(smooth, model, batch_of())
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    other, _ = loss_of(objective, shake(copy.deepcopy(model), 1), batch_of())
    assert gradients.abs().max() < 1e-3 and other.item() > 1


def student_of(kind: str) -> Sam3LiteModel:
    """With the queries of `micro_model()`, or others, which are matched to them."""
    return shake(micro_model(), 1) if kind == "by number" else micro_model(1)


@pytest.mark.parametrize("kind", ["by number", "matched"])
def test_terms_sum_to_the_loss_and_every_parameter_has_a_gradient(kind):
    model, teacher = student_of(kind), teacher_of(micro_model())
    loss, terms = loss_of(objective_for(model, teacher), model, batch_of())
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(value.item() > 0 and not value.requires_grad for value in terms.values())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    loss, doubled = loss_of(objective_for(model, teacher, distill_boxes_weight=10.0), model, batch_of())
    assert doubled["distill_boxes"].item() == pytest.approx(2 * terms["distill_boxes"].item(), rel=1e-5)


def test_pictures_without_prompts_are_looked_at_once_and_asked_for_more_than_is_learnt():
    teacher, model, batch = teacher_of(micro_model(), present=-30.0), micro_model(1), batch_of()
    pictures = {"pixel_values": batch["pixel_values"], "keys": [(0, 0), (0, 1)], "labels": []}
    looked = []
    teacher.model.vision_encoder.register_forward_hook(lambda *_: looked.append(1))
    choice = PhraseChoice(2, PHRASES, 2, 0.5, seed=0)
    settings = DistillationArguments(teacher="x", feature_steps=0.5)
    objective = Distillation(teacher, model, settings, choice=choice)
    objective.start_step(1, 10)
    objective.complete(pictures)
    assert not choice.answers and not looked  # the pyramid alone is learnt
    objective.start_step(9, 10)
    whole = objective.complete(pictures)
    assert sorted(choice.answers) == [(picture, number, False) for picture in range(2) for number in range(3)]
    assert len(whole["phrases"]) == 4
    loss, _ = loss_of(objective, model, whole)
    assert loss.item() > 0 and len(looked) == 1


def test_the_feature_term_is_that_of_the_pyramids():
    model, teacher, batch = micro_model(1), teacher_of(micro_model()), batch_of()
    _, terms = loss_of(objective_for(model, teacher, distill_features_weight=1.0), model, batch)
    with torch.no_grad():
        pyramids = [m.get_vision_features(batch["pixel_values"]).fpn_hidden_states for m in (model, teacher.model)]
    expected = 0.0
    for weight, own, goal in zip(LEVEL_WEIGHTS, *pyramids, strict=True):
        for image in range(2):
            error = (own[image] - goal[image]).square().mean() / goal[image].var(correction=0)
            cosine = torch.nn.functional.cosine_similarity(own[image], goal[image], dim=0).mean()
            expected += weight * (error + 1 - cosine) / 2
    assert terms["distill_features"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["by number", "matched"])
def test_absent_concepts_teach_presence_and_scores_only(kind):
    model, teacher = student_of(kind), teacher_of(micro_model(), present=-3.0)
    _, terms = loss_of(objective_for(model, teacher), model, batch_of())
    compared = [name for name in TERMS if name != "queries" or kind == "by number"]
    assert set(terms) == {f"distill_{name}" for name in compared}
    for name in compared:
        silent = name in ("encoder", "boxes", "giou", "queries", "masks", "semantic")
        assert (terms[f"distill_{name}"].item() == 0) == silent, name
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # as DDP needs


def test_the_queries_of_a_layer_follow_those_of_its_teachers_layer():
    """Of the teacher's layers the first and the last."""
    teacher = teacher_of(micro_model(detr_decoder_layers=3))
    model = micro_model()
    model.load_state_dict(teacher.model.state_dict(), strict=False)  # all but the text encoder
    objective, batch = objective_for(shake(model, 1), teacher), batch_of()
    assert objective.by_number and objective.layers == [0, 2]
    _, terms = loss_of(objective, model, batch)
    inputs = model_inputs(batch, TokenizedText(Sam3LiteProcessor.from_config(model.config)), CPU)
    asked = {name: values for name, values in inputs.items() if name != "labels"}
    _, answers = teacher(batch, CPU, detector=True, masks=False)
    own = model(**asked, criterion=lambda student: student.found.hidden)
    errors = query_errors(own, answers.found.hidden[[0, 2]], answers.trust)
    expected = DistillationArguments.distill_queries_weight * errors.sum() / answers.trust.sum().clamp(min=1)
    assert terms["distill_queries"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_features_first():
    model, teacher = micro_model(1), teacher_of(micro_model())
    objective = objective_for(model, teacher, feature_steps=0.5, label_loss_weight=1.0)
    objective.start_step(2, 4)
    _, terms = loss_of(objective, model, batch_of())
    assert set(terms) == {"distill_features"}
    idle = {id(parameter) for parameter in objective.idle(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle) == (not name.startswith("vision_encoder.")), name
    objective.start_step(3, 4)
    _, terms = loss_of(objective, model, batch_of())
    assert "distill_boxes" in terms and "loss_bbox" in terms and objective.idle(model) == []


def test_without_mask_terms_the_mask_head_stands_still():
    model, teacher = micro_model(1), teacher_of(micro_model())
    objective = objective_for(model, teacher, distill_masks_weight=0.0, distill_semantic_weight=0.0)
    _, terms = loss_of(objective, model, batch_of())
    assert not {"distill_masks", "distill_semantic"} & set(terms)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("mask_decoder.")}
    assert {id(parameter) for parameter in objective.idle(model)} == {id(model.get_parameter(n)) for n in without}
    assert objective.keeps_masks(True, False) and not objective.keeps_masks(False, True)
    assert objective_for(model, teacher).keeps_masks(False, False)
    objective.settings.label_loss_weight = 1.0
    assert objective.keeps_masks(False, True) and not objective.keeps_masks(True, False)


def test_labels_are_looked_at_only_with_a_weight():
    model, teacher, batch = micro_model(1), teacher_of(micro_model()), batch_of()
    del batch["labels"]
    alone, _ = loss_of(objective_for(model, teacher), model, batch)
    batch["labels"] = "not looked at"
    assert loss_of(objective_for(model, teacher), model, batch)[0] == alone
    batch = batch_of()
    loss, terms = loss_of(objective_for(model, teacher, label_loss_weight=0.5), model, batch)
    own = {name: value for name, value in terms.items() if name.startswith("loss_")}
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-5)
    inputs = model_inputs(batch, TokenizedText(Sam3LiteProcessor.from_config(model.config)), CPU)
    expected = model(**inputs).loss_dict
    sampled = {"loss_mask_focal", "loss_mask_dice"}  # at random points
    for name in expected.keys() - sampled:
        assert own[name].item() == pytest.approx(expected[name].item() / 2, rel=1e-4), name


@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_under_autocast_terms_are_float32(label_weight):
    """Nearly those of float32, with the teacher in half precision as well."""
    model, teacher, batch = shake(micro_model(), 1), teacher_of(micro_model()), batch_of()
    settings = {"label_loss_weight": label_weight, "distill_masks_weight": 0.0}  # masks meet at random points
    _, exact = loss_of(objective_for(model, teacher, **settings), model, batch)
    teacher.model.to(torch.bfloat16)
    objective = objective_for(model, teacher, **settings)
    assert objective.by_number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = loss_of(objective, model, batch)
    assert loss.dtype == torch.float32 and loss.isfinite()
    for name in ("distill_features", "distill_encoder", "distill_boxes", "distill_queries", "distill_semantic"):
        assert terms[name].dtype == torch.float32
        assert terms[name].item() == pytest.approx(exact[name].item(), rel=0.1), name


def test_a_teacher_keeps_its_precision_under_autocast():
    teacher, batch = teacher_of(micro_model()), batch_of()
    exact, answers = teacher(batch, CPU, detector=True, masks=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels, other = teacher(batch, CPU, detector=True, masks=True)
    torch.testing.assert_close(levels, exact, rtol=0, atol=0)
    torch.testing.assert_close(other.found.logits, answers.found.logits, rtol=0, atol=0)


def test_over_sharded_weights():
    """As under FSDP, in steps of features alone and in others: the loss and the gradients of whole weights."""
    model, teacher, batch = shake(micro_model(), 1), teacher_of(micro_model()), batch_of()
    objective = objective_for(model, teacher, feature_steps=0.5)
    expected = []
    for step in (1, 2):
        objective.start_step(step, 2)
        loss, _ = loss_of(objective, model, batch)
        expected.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.detr_decoder.layers:
            fully_shard(layer)
        fully_shard(model)
        for step, (loss, gradients) in zip((1, 2), expected, strict=True):
            objective.start_step(step, 2)
            found, _ = loss_of(objective, model, batch)
            assert found.item() == pytest.approx(loss, rel=1e-5)
            own = {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}
            assert own.keys() == gradients.keys()
            assert all(torch.allclose(own[name], gradients[name], atol=1e-4, rtol=1e-3) for name in own)
    finally:
        torch.distributed.destroy_process_group()


def test_a_teacher_that_overflows_is_named():
    model, teacher = micro_model(1), teacher_of(micro_model())
    teacher.model.half()
    with torch.no_grad():
        teacher.model.vision_encoder.neck.fpn_layers[0].proj2.weight.fill_(6e4)
    with pytest.raises(ValueError, match="what the teacher says is not finite in float16: use --mixed_precision bf16"):
        loss_of(objective_for(model, teacher), model, batch_of())


def test_other_numbers_of_queries_and_layers():
    """The student has fewer of both, and once more queries; its masks are those of matched queries."""
    teacher = teacher_of(micro_model(detr_decoder_layers=3), confidence=0.2)
    for queries in (8, 15):
        model = micro_model(1, num_queries=queries)
        objective = objective_for(model, teacher)
        assert not objective.by_number and objective.layers == [0, 2]
        loss, terms = loss_of(objective, model, batch_of())
        assert loss.isfinite() and terms["distill_masks"].item() > 0


def test_queries_of_another_origin_are_matched():
    """As many, but not those of the teacher."""
    model, teacher = micro_model(1), teacher_of(micro_model())
    torch.nn.init.normal_(model.detr_decoder.query_embed.weight)
    torch.nn.init.normal_(model.detr_decoder.reference_points.weight)
    objective = objective_for(model, teacher)
    assert not objective.by_number
    loss, terms = loss_of(objective, model, batch_of())
    assert loss.isfinite() and set(terms) == {f"distill_{name}" for name in TERMS if name != "queries"}


def test_permuted_queries_find_their_partners():
    """The same model with its queries in another order differs from its teacher in nothing but that."""
    model, teacher = micro_model(), teacher_of(micro_model())
    model.load_state_dict(teacher.model.state_dict(), strict=False)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for weight in (model.detr_decoder.query_embed.weight, model.detr_decoder.reference_points.weight):
        weight.data = weight.data[order]
    objective = objective_for(model, teacher)
    assert not objective.by_number
    loss, _ = loss_of(objective, model, batch_of())
    assert loss.item() == pytest.approx(0, abs=1e-3)


def test_state_of_the_objective():
    teacher = teacher_of(micro_model(detr_decoder_layers=3))
    model = micro_model(1)
    objective = Distillation(teacher, model, DistillationArguments(teacher="x"), chosen_layers=[1, 2])
    other = objective_for(model, teacher)
    assert other.layers == [0, 2]
    other.load_state_dict(objective.state_dict())
    assert (other.layers, other.by_number) == ([1, 2], objective.by_number)
    with pytest.raises(ValueError, match="has 2 decoder layers, that of the checkpoint at least 3"):
        objective_for(model, teacher_of(micro_model())).load_state_dict(objective.state_dict())


def test_a_few_steps_bring_the_student_closer():
    model, teacher, batch = micro_model(), teacher_of(micro_model()), batch_of()
    objective = objective_for(shake(model, 1), teacher)
    assert objective.by_number
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def distance() -> list[float]:
        text = TokenizedText(Sam3LiteProcessor.from_config(model.config))
        inputs = model_inputs({k: v for k, v in batch.items() if k != "labels"}, text, CPU)
        taught = {**inputs, **teacher.text(batch["phrases"])}
        del taught["input_ids"]
        with torch.no_grad():
            own, goal = model.eval()(**inputs), teacher.model(**taught)
        names = ("pred_boxes", "presence_logits", "pred_logits", "pred_masks")
        return [(own[name] - goal[name]).abs().mean().item() for name in names]

    before, losses = distance(), []
    for _ in range(30):
        losses.append(loss_of(objective, model, batch)[0].item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(after < 0.8 * start for start, after in zip(before, distance(), strict=True))


# Where the teacher comes from, and what starts from it


@pytest.fixture
def source(tmp_path):
    """A folder with a lite model and its processor."""
    model = micro_model(detr_decoder_layers=3)
    model.save_pretrained(tmp_path / "teacher")
    Sam3LiteProcessor.from_config(model.config).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def arguments_for(source: str, *flags: str, source_flag: str = "--teacher"):
    sizes = micro_config().to_dict()
    overrides = json.dumps({name: value for name, value in sizes.items() if name.endswith("_config")})
    return parse_arguments(
        ["--data", "x", source_flag, source, "--preset", "tiny", "--model_overrides", overrides, *flags]
    )


def test_a_student_without_init_is_mapped_from_its_teacher(source):
    """Also from a lite one, which --init would take at its own sizes."""
    arguments = arguments_for(source)
    model = build_model(arguments, None)
    assert len(model.detr_decoder.layers) == 2
    assert decoder_layers(model, arguments) == [0, 2] == model.mapping_report.layers["detr_decoder.layers"]
    teacher = load_teacher(source, model.config, PHRASES, 0.3, "cpu", "fp16")
    assert teacher.model.dtype == torch.float32  # on a CPU
    assert objective_for(model, teacher).by_number
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_teacher_looks_at_pictures_of_the_students_size(source):
    model = build_model(arguments_for(source, "--image_size", "128"), None)
    teacher = load_teacher(source, model.config, PHRASES, 0.3, "cpu", "no")
    assert model.config.image_size == teacher.model.config.image_size == 128


@pytest.mark.parametrize("kind", ["standard", "checkpoint"])
def test_teachers_of_all_kinds(tmp_path, kind):
    model = micro_model()
    if kind == "standard":
        model.to_sam3().save_pretrained(tmp_path)
    else:
        (tmp_path / "trainer_state.json").write_text("{}")
        model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), model.config, PHRASES, 0.3, "cpu", "no")
    own = teacher.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items() if name in own)


def test_what_cannot_teach_is_refused_in_one_line(source, tmp_path):
    model = micro_model()
    with pytest.raises(FileNotFoundError, match="there is no folder or file ./nowhere"):
        load_teacher("./nowhere", model.config, PHRASES, 0.3, "cpu", "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="^--teacher .*empty has neither a config.json nor a .pt file"):
        load_teacher(str(tmp_path / "empty"), model.config, PHRASES, 0.3, "cpu", "no")
    other = micro_config()
    other.detr_encoder_config.hidden_size = 32
    with pytest.raises(ValueError, match="^--teacher x: its features are 32 wide for patches of .* leave out --init"):
        check_comparable("x", other, model.config)
    with pytest.raises(ValueError, match="^teacher_device cuda:99 cannot be used here"):
        usable_device("cuda:99", "teacher_device")
    with pytest.raises(ValueError, match="^teacher_device warp cannot be used here"):
        usable_device("warp", "teacher_device")


class NoisyData:
    """A split of four pictures without labels."""

    concepts = PHRASES

    def __init__(self, folder):
        self.rows = self
        self.folder = folder

    def __len__(self):
        return 4

    def __getitem__(self, index):
        path = f"{self.folder}/{index}.png"
        noise = torch.randint(0, 255, (50, 60, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.byte().numpy()).save(path)
        return {"image": {"path": path, "bytes": None}, "width": 60, "height": 50}


def test_calibrated_on_the_training_images(source, tmp_path):
    arguments = arguments_for(source, "--calibrate", "true")
    model = calibrated_model(arguments, NoisyData(tmp_path), CPU)
    assert model.mapping_report.layers["detr_decoder.layers"] == [0, 1]
    layers = decoder_layers(model, arguments)
    teacher = load_teacher(source, model.config, PHRASES, 0.3, "cpu", "no")
    objective = Distillation(teacher, model, DistillationArguments(teacher=source), layers)
    assert objective.layers == [0, 2] and objective.by_number
    assert model.mapping_report.strategy == "calibrated"
    assert model.mapping_report.calibration["images"] == "given"
    assert model.dtype == torch.float32 and len(model.detr_decoder.layers) == 2


@pytest.mark.parametrize("flags", [("--feature_steps", "1"), ("--distill_masks_weight", "0"), ("--lora_rank", "2")])
def test_where_masks_do_not_learn_the_last_decoder_layer_stays(source, tmp_path, flags):
    arguments = arguments_for(source, "--calibrate", "true", *flags)
    model = calibrated_model(arguments, NoisyData(tmp_path), CPU)
    assert model.mapping_report.layers["detr_decoder.layers"] == [0, 2]
    assert decoder_layers(model, arguments) == [1, 2]  # the first does what the dropped one did


def test_a_start_is_calibrated_without_a_teacher_too(source, tmp_path):
    standard, flags = tmp_path / "standard", ("--calibrate", "true")
    teacher = Sam3LiteModel.from_pretrained(source)
    teacher.to_sam3().save_pretrained(standard)
    data = NoisyData(tmp_path)
    model = calibrated_model(arguments_for(str(standard), *flags, source_flag="--init"), data, CPU)
    assert model.mapping_report.strategy == "calibrated" and len(model.detr_decoder.layers) == 2
    assert model.mapping_report.layers["detr_decoder.layers"] == [0, 2]  # with a teacher, the first ones
    with pytest.raises(ValueError, match="--init .* is a lite one, which is taken as it is"):
        calibrated_model(arguments_for(source, *flags, source_flag="--init"), data, CPU)
    adapter = ("--lora_rank", "2", "--merge_adapter", "false")
    with pytest.raises(ValueError, match="mapped to other weights, which no adapter alone could name"):
        calibrated_model(arguments_for(str(standard), *flags, *adapter, source_flag="--init"), data, CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill_masks_weight", "1"], "distill_masks_weight needs --teacher"),
        (["--label_loss_weight", "1"], "label_loss_weight needs --teacher"),
        (["--calibrate", "true"], "from --init, or else --teacher: add one of them"),
        (["--teacher", "x", "--distill_boxes_weight", "-1"], "distill_boxes_weight must be at least 0"),
        (["--teacher", "x", "--distill_confidence", "2"], "distill_confidence must be from 0 to 1"),
        (["--teacher", "x", "--feature_steps", "1.5"], "feature_steps must be from 0 to 1"),
        (["--teacher", "x", "--distill_temperature", "0"], "distill_temperature must be above 0"),
        (["--teacher", "x", "--distill_features_weight", "0"], "set feature_steps to 0"),
        (["--teacher", "x", *(f for n in TERMS for f in (f"--distill_{n}_weight", "0"))], "nothing would be learnt"),
        (["--teacher", "x", "--distill_scores_weight", "nan"], "distill_scores_weight must be a finite number"),
        (["--teacher_cache", "x"], "teacher_cache needs --teacher"),
        (
            ["--teacher", "x", "--teacher_cache", "y", "--crop", "0"],
            "teacher_cache needs pictures that come again as they were: set crop 0, smallest_side 1, color_jitter 0 "
            "(now crop 0, smallest_side 0.476, color_jitter 0.2), or leave it out",
        ),
        (
            ["--teacher", "x", "--teacher_cache", "y", "--augmentation", "none", "--mosaic", "0.5", "--rotation", "9"],
            "rotation 0, mosaic 0 (now crop 0, smallest_side 1, color_jitter 0, rotation 9, mosaic 0.5)",
        ),
        (
            ["--teacher", "x", "--augmentation", "strong"],
            "mosaic needs labels, as a teacher is asked picture by picture",
        ),
    ],
)
def test_wrong_settings_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", *flags])
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 2


def test_a_run_does_not_go_on_without_its_teacher():
    def state(*flags: str) -> dict:
        arguments = parse_arguments(["--data", "x", *flags]).flat()
        return {"arguments": arguments, "images_per_step": 4, "dataset": {}}

    check_compatible(state("--teacher", "x"), state("--teacher", "moved/x"))
    with pytest.raises(ValueError, match="teacher: x there, None here"):
        check_compatible(state("--teacher", "x"), state())


def test_retained_phrases_follow_the_teacher_and_the_others_their_labels():
    model = micro_model()
    teacher = teacher_of(shake(micro_model(), 1))
    batch = {**batch_of(), "keys": [(0, 3), (0, 5)]}
    settings = DistillationArguments(teacher="x", feature_steps=0.0, label_loss_weight=1.0)
    objective = Distillation(teacher, model, settings, retention=Retention(PHRASES, 2, seed=0))
    asked = objective.complete(batch)
    assert asked["phrases"][:3] == batch["phrases"] and asked["image_index"].tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert asked["input_boxes"].shape[0] == 7 and (asked["input_boxes_labels"][3:] == -10).all()
    assert objective.complete(batch)["phrases"] == asked["phrases"]  # the keys decide
    _, terms = loss_of(objective, model, asked)

    _, labels = loss_of(Labels(), model, batch)
    for name, value in labels.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-4, msg=name)
    retained = {name: asked[name][3:] for name in ("phrases", "image_index")} | {"pixel_values": asked["pixel_values"]}
    _, taught = loss_of(objective_for(model, teacher), model, {**retained, "labels": None})
    for name in set(TERMS) - {"masks"}:  # at points drawn by chance
        torch.testing.assert_close(terms[f"distill_{name}"], taught[f"distill_{name}"], rtol=1e-4, atol=1e-5, msg=name)
