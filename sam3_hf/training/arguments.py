"""Every setting of a run: nine groups of fields, read from one YAML file and from flags of the same names."""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from ..precision_sam3_lite import precision_name
from . import DEFAULT_COMMAND
from .adapter_arguments import AdapterArguments
from .augmentation_arguments import AugmentationArguments
from .fields import check_finite, check_range, option
from .progress_arguments import ProgressArguments

DRAWN = ("generated", "composed")  # what --data names instead of a path
METRICS = ("auto", "segm_AP", "segm_AP50", "segm_cgF1", "bbox_AP", "bbox_AP50", "bbox_cgF1", "loss")


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    init: str | None = option(
        None,
        "start from this model: a folder, a repository of the Hub, or a .pt file of Meta's. A lite one keeps its own "
        "sizes, whatever --preset says; a standard one (sam3, sam3_video, sam3_lite_text) is mapped to those of "
        "--preset. Without it and --teacher, weights are random",
    )
    text_encoder: str | None = option(
        None,
        "take words from this model, of any of these kinds (as vil-uob/sam3-litetext-s0), instead of --init: its text "
        "encoder is copied, nothing else of it read",
    )
    text_phrases: str | None = option(
        None,
        "text file, one phrase a line, to fit a text encoder to that --model_overrides makes smaller "
        "(text_hidden_size, text_num_hidden_layers); by default some thousand everyday phrases",
    )
    preset: str = option(
        "lite",
        "model size: standard, medium, depth16, lite-plus, lite, small-plus, small; for tries, tiny-standard, "
        "tiny-plus, tiny. A start from a standard checkpoint keeps most with -plus",
    )
    image_size: int | None = option(
        None, "side in pixels to which images are resized; the preset's or checkpoint's own if not given"
    )
    num_queries: int | None = option(
        None,
        "most objects that are found per picture and phrase; the preset's or checkpoint's own if not given. A "
        "checkpoint keeps its queries, and new ones start untrained",
    )
    model_overrides: str = option(
        "{}",
        "further fields of the preset's config as a JSON object, e.g. '{\"num_queries\": 100}'; in YAML, a mapping",
    )
    calibrate: bool = option(
        False,
        "fit the mapping of a standard checkpoint, --init or else --teacher, to the training images before the first "
        "step: a better start, for some minutes",
    )
    train_text_encoder: bool = option(
        False,
        "train the text encoder too. Otherwise it is frozen: each phrase is encoded once, before training, and the "
        "encoder stays off the GPU",
    )
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower")
    compile: bool = option(False, "compile the model with torch.compile: slow first steps, faster afterwards")

    def __post_init__(self):
        if self.num_queries is not None:
            check_range(self, "num_queries", 1)
        if self.text_encoder is not None and self.init is None:
            raise ValueError("text_encoder takes the place of that of a model: name one with --init")
        try:
            self.model_overrides = json.loads(self.model_overrides, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"model_overrides must be a JSON object, got {self.model_overrides!r}: {error}") from None
        if not isinstance(self.model_overrides, dict):
            raise ValueError(f"model_overrides must be a JSON object, got {self.model_overrides!r}")


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name = "data"

    data: str | None = option(
        None,
        "dataset: a folder in the Roboflow layout (train/_annotations.coco.json), of YOLO (or its data.yaml), Pascal "
        "VOC, LabelMe, CVAT's COCO or masks in PNG files; a COCO file; a repository of the Hub or save_to_disk folder "
        "with 'objects'; or pictures drawn into OUTPUT_DIR/data: 'generated' ones of a few "
        "concepts, 'composed' ones of 204 phrases that overlap",
    )
    validation_data: str | None = option(
        None, "COCO file or folder of the validation split, if --data is that of the training split alone"
    )
    image_folder: str | None = option(
        None, "where the file names of COCO files start; by default beside the file, or in images/ beside it"
    )
    validation_image_folder: str | None = option(None, "the same for --validation_data; --image_folder if not given")
    category_map: str | None = option(
        None, "YAML file that renames categories into the phrases to prompt with, e.g. 'RBC: red blood cell'"
    )
    negative_words: str | None = option(
        None, "text file, one phrase a line, of things that are in none of the images: further negative prompts"
    )
    negative_words_ratio: float = option(
        0.5, "share of the negative prompts, 0 to 1, that are drawn from --negative_words; the others are categories"
    )
    phrases: str | None = option(
        None,
        "text file, one phrase a line, of what a teacher is asked for in pictures whose labels, if any, are not used; "
        "by default the dataset's categories, or else over a thousand everyday nouns",
    )
    validation_split: float = option(
        0.1,
        "share of the pictures, above 0 and below 1, that is held out by --seed where there is no validation split",
    )
    prompts_per_image: int = option(8, "prompts drawn for each image in each step, at most")
    negative_ratio: float | None = option(
        None,
        "share of the prompts, 0 to 1, whose concept is not in the image; by default the share of the classes that a "
        "labelled training picture does not show, from 0.5 to 0.75, and 0.5 without labels",
    )
    box_prompt_probability: float = option(
        0.0, "chance, 0 to 1, that a prompt gets a jittered box of one instance, with or instead of its phrase"
    )
    check_images: bool = option(
        True,
        "decode every image once before training, so that a damaged one does not stop the run later; what was sound "
        "is not decoded again by the next run. 'false' checks headers only",
    )
    num_workers: int = option(4, "processes per training process that decode and augment; 0 decodes in the loop")
    generated_train: int = option(256, "training images to draw when --data is 'generated' or 'composed'")
    generated_valid: int = option(32, "validation images to draw when --data is 'generated' or 'composed'")
    generated_concepts: int | None = option(
        None,
        "concepts to draw when --data is 'generated', 2 to 12, by default 8; phrases to ask for when it is "
        "'composed', 1 to 204, by default all",
    )

    def __post_init__(self):
        check_finite(self)
        if self.data is None:
            raise ValueError("data is not set: name the dataset with --data PATH, or in the YAML file")
        check_range(self, "prompts_per_image", 1)
        if self.negative_ratio is not None:
            check_range(self, "negative_ratio", 0, 1)
        check_range(self, "negative_words_ratio", 0, 1)
        if not 0 < self.validation_split < 1:
            raise ValueError(f"validation_split must be above 0 and below 1, got {self.validation_split}")
        check_range(self, "box_prompt_probability", 0, 1)
        check_range(self, "num_workers", 0)
        for name in ("generated_train", "generated_valid"):
            check_range(self, name, 1)
        if self.generated_concepts is not None and self.data in DRAWN:
            check_range(self, "generated_concepts", *((1, 204) if self.data == "composed" else (2, 12)))


@dataclass
class OptimizationArguments:
    """How it is trained."""

    _argument_group_name = "optimization"

    epochs: int = option(30, "passes over the training split")
    max_steps: int | None = option(None, "stop after so many optimizer steps, whatever --epochs says")
    batch_size: str = option(
        "4",
        "images per process and forward pass, or 'auto' in a run of one process: the largest power of two from 64 "
        "down that fits into memory. The learning rate does not follow the batch size",
    )
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(2e-4, "highest learning rate, reached after the warm-up")
    vision_learning_rate: float | None = option(None, "the same for the vision encoder; --learning_rate if not given")
    text_learning_rate: float | None = option(None, "the same for the text encoder; --learning_rate if not given")
    warmup_ratio: float = option(0.05, "share of the steps, 0 to 1, in which the learning rate rises from 0")
    final_learning_rate_ratio: float = option(0.01, "share of the learning rate that the cosine ends at, 0 to 1")
    vit_layer_decay: float = option(
        0.9, "factor on the learning rate per ViT layer from the last to the first; position embeddings are exempt"
    )
    weight_decay: float = option(0.1, "decoupled weight decay of AdamW; biases and norms have none")
    max_grad_norm: float = option(0.1, "norm that gradients are clipped to; 0 does not clip")
    ema_decay: float = option(
        0.0, "decay per step of an average of the weights, e.g. 0.999; it is what is evaluated and exported. 0: off"
    )
    mixed_precision: Literal["fp16", "bf16", "no"] = option(
        "no",
        "precision of the forward and backward pass over float32 weights; where fp16 cannot run, float32 is used",
    )
    seed: int = option(0, "seed of weights, data order, augmentation and prompts")

    def __post_init__(self):
        check_finite(self)
        if self.batch_size != "auto":
            try:
                self.batch_size = int(self.batch_size)
            except ValueError:
                raise ValueError(f"batch_size must be a number or 'auto', got {self.batch_size!r}") from None
            check_range(self, "batch_size", 1)
        check_range(self, "epochs", 1)
        if self.max_steps is not None:
            check_range(self, "max_steps", 1)
        check_range(self, "gradient_accumulation_steps", 1)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_range(self, name, 0)
        check_range(self, "seed", 0, 2**32 - 1)
        for name in ("vision_learning_rate", "text_learning_rate"):
            if getattr(self, name) is not None:
                check_range(self, name, 0)
        for name in ("warmup_ratio", "final_learning_rate_ratio", "vit_layer_decay", "ema_decay"):
            check_range(self, name, 0, 1)
        if self.ema_decay == 1:
            raise ValueError("ema_decay must be below 1: at 1 the average would never leave the first weights")


@dataclass
class LossArguments:
    """Weights of the loss; those left out keep the checkpoint's, or the preset's, own."""

    _argument_group_name = "loss (a weight that is not given stays the checkpoint's or preset's own)"

    bbox_loss_weight: float | None = option(None, "weight of the L1 distance of boxes (cxcywh)")
    giou_loss_weight: float | None = option(None, "weight of the generalised IoU of boxes")
    class_loss_weight: float | None = option(None, "weight of the IoU-aware classification of queries")
    presence_loss_weight: float | None = option(None, "weight of the presence of the concept in the image")
    mask_focal_loss_weight: float | None = option(None, "weight of the focal loss of instance masks")
    mask_dice_loss_weight: float | None = option(None, "weight of the dice loss of instance masks")
    mask_num_points: int | None = option(None, "points sampled per mask for the mask losses")
    semantic_focal_loss_weight: float | None = option(None, "weight of the focal loss of the semantic map")
    semantic_dice_loss_weight: float | None = option(None, "weight of the dice loss of the semantic map")
    one_to_many_weight: float | None = option(None, "weight of the one-to-many auxiliary branch; 0 switches it off")

    def __post_init__(self):
        check_finite(self)
        for name in self.given():
            check_range(self, name, 1 if name == "mask_num_points" else 0)

    def given(self) -> dict:
        """The fields that were set: {name: value}."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass
class DistillationArguments:
    """A teacher, and what is learnt from it."""

    _argument_group_name = "teacher (all but --teacher itself need --teacher)"

    teacher: str | None = option(
        None,
        "learn from this model's answers: a folder, a repository of the Hub, a .pt file of Meta's, or a checkpoint of "
        "a run. Without --init, training starts from it, mapped to --preset",
    )
    label_loss_weight: float = option(
        0.0, "weight of the loss on labels beside the teacher's; 0 learns from the teacher alone"
    )
    distill_features_weight: float = option(
        0.3, "weight of the feature pyramid: squared error over the teacher's variance, and 1 - cosine"
    )
    distill_encoder_weight: float = option(1.0, "weight of the DETR encoder's output")
    distill_scores_weight: float = option(2.0, "weight of the scores of all queries, in each decoder layer")
    distill_presence_weight: float = option(1.0, "weight of the presence of the concept, in each decoder layer")
    distill_boxes_weight: float = option(
        5.0, "weight of the L1 distance of boxes, in each decoder layer, by the teacher's scores"
    )
    distill_giou_weight: float = option(2.0, "weight of the generalised IoU of boxes, likewise")
    distill_queries_weight: float = option(
        5.0,
        "weight of the queries behind each decoder layer, by the teacher's scores; only where the student's queries "
        "are the teacher's, number by number",
    )
    distill_masks_weight: float = option(5.0, "weight of the masks of queries that the teacher is confident of")
    distill_semantic_weight: float = option(1.0, "weight of the semantic map")
    distill_temperature: float = option(1.0, "by which the logits of scores are divided; above 1 softens them")
    distill_confidence: float = option(
        0.3,
        "the teacher's presence from which a concept counts as present, and score above which a query's mask is "
        "learnt, 0 to 1. An absent concept teaches presence and scores only",
    )
    feature_steps: float = option(0.25, "share of the steps, from the first on, that train the feature pyramid alone")
    retain_phrases: str | None = option(
        None,
        "text file, one phrase a line, of what shall not be forgotten while labels are learnt: for these phrases the "
        "model keeps the teacher's answers, for others it follows the labels; with label_loss_weight above 0",
    )
    retain_share: float = option(
        0.25, "share of the prompts, above 0 to 1, that ask for them, beside those for the dataset's categories"
    )
    teacher_device: str | None = option(None, "where the teacher runs, e.g. cuda:1; beside the model if not given")
    teacher_cache: str | None = option(
        None,
        "folder to keep the teacher's feature pyramids in, so that its vision encoder sees each picture once: 53 MiB "
        "a picture at 1008 px in half precision. Needs --augmentation none, beside which --horizontal_flip and "
        "--vertical_flip may stay; mirrored pictures are others",
    )

    def __post_init__(self):
        check_finite(self)
        if self.teacher is None:
            for item in dataclasses.fields(self):
                if getattr(self, item.name) != item.default:
                    raise ValueError(
                        f"{item.name} needs --teacher, the model to learn from: name it, or leave this out"
                    )
            return
        for name in ("label_loss_weight", *self.weights()):
            check_range(self, name, 0)
        for name in ("distill_confidence", "feature_steps", "retain_share"):
            check_range(self, name, 0, 1)
        if self.retain_phrases is not None and not self.label_loss_weight:
            raise ValueError("retain_phrases goes with labels: set label_loss_weight above 0, or leave it out")
        if self.retain_share == 0:
            raise ValueError("retain_share must be above 0: at 0 nothing is asked for")
        if self.distill_temperature <= 0:
            raise ValueError(f"distill_temperature must be above 0, got {self.distill_temperature}")
        if not any([self.label_loss_weight, *self.weights().values()]):
            raise ValueError("all distill_*_weight and label_loss_weight are 0: nothing would be learnt; raise one")
        if self.feature_steps and not self.distill_features_weight:
            raise ValueError(
                "feature_steps needs a distill_features_weight above 0: set feature_steps to 0, or raise it"
            )

    @property
    def vision_alone(self) -> bool:
        """Whether any step trains the vision encoder and nothing else."""
        others = [weight for name, weight in self.weights().items() if name != "distill_features_weight"]
        return self.feature_steps > 0 or not any([self.label_loss_weight, *others])

    @property
    def teaches_masks(self) -> bool:
        """Whether any step trains the masks, and with them the decoder, on what a teacher says."""
        return self.teacher is not None and self.feature_steps < 1 and self.distill_masks_weight > 0

    def weights(self) -> dict[str, float]:
        """The weights of what the teacher says: {field: value}."""
        names = [item.name for item in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if re.fullmatch(r"distill_\w+_weight", name)}


@dataclass
class OutputArguments:
    """What is written, how often, and how a run goes on."""

    _argument_group_name = "output"

    output_dir: str = option("outputs/train", "folder of the run: checkpoints, curves, pictures, log, final model")
    resume: str = option(
        "none",
        "'auto' goes on from OUTPUT_DIR/checkpoints/last, or starts if there is none; a path goes on from that "
        "checkpoint; 'none' starts",
    )
    overwrite_output_dir: bool = option(
        False, "delete the run that OUTPUT_DIR holds and start anew, unless --resume is given"
    )
    eval_batch_size: int = option(4, "validation images per process and forward pass")
    eval_every_epochs: int = option(1, "evaluate after every so many epochs, and after the last")
    save_every_epochs: int = option(5, "keep checkpoints/epoch_N every so many epochs; 0 keeps none")
    save_every_steps: int = option(
        0, "also write checkpoints/last every so many steps; 0 writes it after each epoch only"
    )
    metric_for_best: Literal[METRICS] = option(
        "auto",
        "validation score that picks checkpoints/best, and with it the exported model; 'auto' is segm_AP if the "
        "dataset has masks, otherwise bbox_AP",
    )
    log_every_steps: int = option(
        10, "write a line to metrics.jsonl, and tell the services of report_to, every so many steps"
    )
    freeze_vocabulary: bool = option(
        False,
        "export final/ with the text features of the dataset's categories in the place of the text encoder: much "
        "smaller, and it knows these phrases only",
    )
    prediction_images: int = option(8, "validation images to draw at each evaluation, truth beside prediction")
    push_to_hub: bool = option(
        False,
        "push the final model to the Hub, with its card, a picture of the validation split, curves and settings; the "
        "token is that of 'hf auth login' or HF_TOKEN",
    )
    hub_model_id: str | None = option(None, "repository to push to, 'owner/name'; created if there is none")
    hub_private: bool = option(False, "create it as a private one")
    hub_gated: str | None = option(
        None, "who wants the weights has to ask for them; requests are approved 'auto' or 'manual'"
    )
    hub_revision: str | None = option(None, "branch to push to, created if there is none; 'main' if not given")

    def __post_init__(self):
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, the repository to push to: 'owner/name'")
        if self.hub_gated not in (None, "auto", "manual"):
            raise ValueError(f"hub_gated must be auto or manual, got {self.hub_gated!r}")
        for name in ("eval_batch_size", "eval_every_epochs", "log_every_steps"):
            check_range(self, name, 1)
        for name in ("save_every_epochs", "save_every_steps", "prediction_images"):
            check_range(self, name, 0)


GROUPS = (
    ModelArguments,
    DataArguments,
    AugmentationArguments,
    OptimizationArguments,
    LossArguments,
    DistillationArguments,
    AdapterArguments,
    OutputArguments,
    ProgressArguments,
)


@dataclass
class Arguments:
    """The nine groups; `arguments.model.preset` and so on."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    optimization: OptimizationArguments
    loss: LossArguments
    distillation: DistillationArguments
    adapter: AdapterArguments
    output: OutputArguments
    progress: ProgressArguments

    def __post_init__(self):
        if self.model.calibrate and self.source is None:
            raise ValueError("calibrate fits the mapping from --init, or else --teacher: add one of them")
        if self.data.phrases is not None and not self.without_labels:
            raise ValueError(
                "phrases is for learning from a teacher alone: add --teacher with label_loss_weight 0, or leave it out"
            )
        if self.distillation.teacher_cache is not None:
            self.augmentation.check_pictures_come_again()
        if self.adapter.lora_rank is not None and self.model.train_text_encoder:
            raise ValueError(
                "train_text_encoder does not go with lora_rank, whose text encoder is frozen: leave one out"
            )
        if not self.adapter.merge_adapter:
            self._check_adapter_alone()
        if self.augmentation.mosaic and self.without_labels:
            raise ValueError(
                "mosaic needs labels, as a teacher is asked picture by picture: set mosaic to 0, or label_loss_weight "
                "above 0"
            )

    def _check_adapter_alone(self) -> None:
        """Raises ValueError where final/ could not hold an adapter without its model."""
        if self.model.init is None:
            raise ValueError("merge_adapter false needs --init, the lite model that the adapter belongs to")
        wrong = [
            name for name in ("text_encoder", "image_size", "num_queries") if getattr(self.model, name) is not None
        ]
        wrong += [name for name in ("freeze_vocabulary", "push_to_hub") if getattr(self.output, name)]
        if wrong:
            raise ValueError(
                f"{wrong[0]} needs a whole model in final/: leave it out, or merge_adapter false, which writes the "
                "adapter alone"
            )

    @property
    def without_labels(self) -> bool:
        """Whether a teacher alone says what is right."""
        return self.distillation.teacher is not None and self.distillation.label_loss_weight == 0

    @property
    def source(self) -> str | None:
        """Where the first weights come from: --init, or else --teacher; None if they are random."""
        return self.distillation.teacher if self.model.init is None else self.model.init

    def flat(self) -> dict:
        """All fields in one dict, as a YAML file would hold them."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}


def _refuse_constant(name: str):
    raise ValueError(f"model_overrides must hold finite numbers, got {name}")


def parse_arguments(argv: list[str] | None = None, command: str = DEFAULT_COMMAND) -> Arguments:
    """
    Reads `[CONFIG.yaml] [--flag value ...]`; flags win over the file.

    Args:
        argv: the command line without the program; `sys.argv[1:]` if None.
        command: what the user called, for the help.

    Raises:
        SystemExit: help was asked for, or an argument is wrong; the message names it, and the nearest valid name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        GROUPS,
        prog=command,
        usage=f"{command} [CONFIG.yaml] [--flag value ...]",
        description="Trains a lite SAM 3. Each flag may also stand in the YAML file, without the dashes.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        try:
            argv = _yaml_as_flags(Path(argv[0])) + argv[1:]
        except ValueError as error:
            parser.error(str(error))
    argv = _with_precision_names(argv)
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown("argument", unknown[0].split("=")[0]))
    try:
        return Arguments(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))
    except ValueError as error:
        parser.error(str(error))


def _field_names() -> list[str]:
    return [item.name for group in GROUPS for item in dataclasses.fields(group)]


def _yaml_as_flags(path: Path) -> list[str]:
    """The file as `--key=value`, so that both ways in are read, converted and checked by the same parser."""
    if not path.is_file():
        raise ValueError(f"there is no configuration file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one 'key: value' a line")
    flags = []
    for key, value in values.items():
        if key not in _field_names():
            raise ValueError(_unknown(f"key in {path}", str(key)))
        if value is False and key == "mixed_precision":
            value = "no"  # which YAML reads as false
        if isinstance(value, dict) and key == "model_overrides":
            value = json.dumps(value)
        elif isinstance(value, (dict, list)):
            raise ValueError(f"{path}: {key} must be one value, got {value!r}")
        if value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _with_precision_names(argv: list[str]) -> list[str]:
    """--mixed_precision by its one name, whichever of float16, half, bfloat16, fp32, ... it is given by."""
    flag, named = "--mixed_precision", []
    for word in argv:
        if named and named[-1] == flag:
            word = precision_name(word).replace("fp32", "no")
        elif word.startswith(f"{flag}="):
            word = f"{flag}={precision_name(word.removeprefix(f'{flag}=')).replace('fp32', 'no')}"
        named.append(word)
    return named


def _unknown(kind: str, name: str) -> str:
    dashes = "--" if name.startswith("--") else ""
    near = difflib.get_close_matches(name.strip("-").replace("-", "_"), _field_names(), n=1, cutoff=0.5)
    return f"unknown {kind}: {name}" + (f"; did you mean {dashes}{near[0]}?" if near else "; --help lists all")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per flag with the kind of its value, and no '(default: None)'."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=34, **kwargs)

    def _format_action_invocation(self, action):
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        if action.choices:
            return f"{action.option_strings[0]} {{{','.join(action.choices)}}}"
        kinds = {int: "INT", float: "NUMBER", str: "TEXT"}
        return f"{action.option_strings[0]} {kinds.get(action.type, '[true|false]')}"

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)
