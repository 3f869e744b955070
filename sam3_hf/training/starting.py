"""What happens before the first step: the accelerator, the output folder, the model and its text side."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradScalerKwargs, parse_flag_from_env, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from transformers.utils import cached_file

from sam3_hf import Sam3LiteConfig, Sam3LiteModel

from ..checkpoints.checkpoint import open_checkpoint
from ..data import (
    Augmentation,
    DatasetError,
    EvalDataset,
    PromptCollator,
    PromptSampling,
    TrainDataset,
    load_dataset_splits,
)
from ..data.generated import write_dataset
from ..data.sampling import VISUAL_PHRASE
from ..evaluation.loop import model_inputs
from ..mapping.mapping import REPORT_FILE
from ..sharing.model_card import RANDOM_WEIGHTS, Origin, origin_of
from .arguments import Arguments, ModelArguments
from .checkpoints import FROZEN, STATE, read_state, recover, write_frozen
from .phrases import TEXT_PARTS, FrozenText, TokenizedText
from .reporting import set_up_logging

logger = logging.getLogger(__name__)

# What a run leaves in its folder, but for the log; --overwrite_output_dir deletes these and nothing else.
WRITTEN = ("checkpoints", "final", "metrics.jsonl", "predictions", "tensorboard", "curves.png", REPORT_FILE)
# Settings without which a checkpoint's weights or its place in the data mean something else.
FIXED = (
    "preset",
    "image_size",
    "model_overrides",
    "train_text_encoder",
    "seed",
    "weight_decay",
    "vit_layer_decay",
)
# The loss, a sum over decoder layers, is in the hundreds, and 2^16 times it overflows: from there, the demo in
# emulated FP16 skips its first steps until the scale is 2^10 or less (benchmarks/fp16_recipe.py --init-scale 65536).
# At the other end nothing is lost before 2^-4: gradients at 2^0, 2^6 and 2^9 are the same but for rounding.
FIRST_LOSS_SCALE = 2.0**6


def start_accelerator(arguments: Arguments) -> Accelerator:
    """An accelerator in the wanted precision; float32 where FP16 cannot run, which is said once."""
    # Without being told so, several processes on a machine without GPU would not find each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    set_up_logging(Path(arguments.output.output_dir), state.is_main_process)
    precision = arguments.optimization.mixed_precision
    if precision == "fp16" and state.device.type == "cpu":
        logger.warning("FP16 training needs a GPU; going on in float32 on the CPU")
        precision = "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=arguments.optimization.gradient_accumulation_steps,
        kwargs_handlers=[GradScalerKwargs(init_scale=FIRST_LOSS_SCALE)],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if arguments.optimization.ema_decay:
            raise ValueError("ema_decay does not work with FSDP, where no process holds whole weights: set it to 0")
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported: set fsdp_version to 2")
        # Autocast chooses the precision of each operation, as without FSDP. Accelerate's own policy would gather all
        # weights and add up all gradients in half precision.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def prepare(accelerator: Accelerator, model: Sam3LiteModel, optimizer: torch.optim.Optimizer) -> tuple:
    """Model and optimizer as `accelerator.prepare` returns them; `get_vision_features` works under FSDP as well."""
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        register_fsdp_forward_method(model, "get_vision_features")  # gathers the weights, as for forward
    return model, optimizer


def open_output_dir(accelerator: Accelerator, arguments: Arguments) -> Path | None:
    """
    Prepares the output folder; returns the checkpoint to resume from, or None for a fresh start.

    Raises:
        FileExistsError: the folder holds a run, and it was not said what to do with it.
        FileNotFoundError: the checkpoint to resume from does not exist.
    """
    output_dir, resume = Path(arguments.output.output_dir), arguments.output.resume
    last = output_dir / "checkpoints" / "last"
    if accelerator.is_main_process:
        recover(output_dir, "final")
        recover(last.parent)
    accelerator.wait_for_everyone()
    holds_run = (last / STATE).is_file() or (output_dir / "final" / "config.json").is_file()
    if resume == "none" and holds_run and not arguments.output.overwrite_output_dir:
        raise FileExistsError(
            f"{output_dir} already holds a run: add --resume auto to go on with it, --overwrite_output_dir to delete "
            "it, or choose another --output_dir"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and holds_run and resume == "none":
        for name in WRITTEN:
            _delete(output_dir / name)
    accelerator.wait_for_everyone()
    if resume == "none":
        return None
    if resume == "auto":
        return last if last.is_dir() else None
    read_state(Path(resume))
    return Path(resume)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def check_compatible(saved: dict, current: dict) -> None:
    """
    Compares the settings of a checkpoint with those of the run that goes on from it, and logs harmless differences.

    Args:
        saved, current: "arguments" (flat), "images_per_step" and "dataset" of trainer_state.json.

    Raises:
        ValueError: they differ in what the checkpoint depends on; the message names all such settings.
    """
    before, now = saved["arguments"], current["arguments"]
    wrong = [f"{name}: {before.get(name)} there, {now[name]} here" for name in FIXED if before.get(name) != now[name]]
    if bool(before["ema_decay"]) != bool(now["ema_decay"]):
        wrong.append(f"ema_decay: {before['ema_decay']} there, {now['ema_decay']} here")
    if saved["dataset"] != current["dataset"]:
        wrong.append(f"data: {_differences(saved['dataset'], current['dataset'])}")
    if saved["images_per_step"] != current["images_per_step"]:
        wrong.append(
            f"images per step (batch_size x gradient_accumulation_steps x processes): {saved['images_per_step']} "
            f"there, {current['images_per_step']} here"
        )
    if wrong:
        raise ValueError(
            "cannot resume, the checkpoint was made with other settings:\n  "
            + "\n  ".join(wrong)
            + "\ngive the same ones, or start anew in another --output_dir (--init takes weights from a final/ folder)"
        )
    for name, value in now.items():
        if value != before.get(name) and name not in (*FIXED, "resume", "output_dir"):
            logger.warning("%s was %s up to the checkpoint and is %s from here on", name, before.get(name), value)


def _differences(before: dict, now: dict) -> str:
    return "; ".join(f"{key} {before[key]} there, {now[key]} here" for key in before if before[key] != now[key])


def build_model(arguments: Arguments, checkpoint: Path | None) -> Sam3LiteModel:
    """
    The model in float32 with random, given or (as far as they are frozen) resumed weights.

    Args:
        checkpoint: the run goes on from there; its configuration is used, its trained weights are loaded later.
    """
    set_seed(arguments.optimization.seed)
    model_arguments = arguments.model
    if checkpoint is not None:
        model = Sam3LiteModel(Sam3LiteConfig.from_pretrained(checkpoint))
        if not read_state(checkpoint)["arguments"]["train_text_encoder"]:
            load_frozen_text(model, checkpoint / FROZEN)
    elif model_arguments.init is not None:
        model = load_initial(model_arguments)
    else:
        model = Sam3LiteModel(initial_config(model_arguments))
        if not model_arguments.train_text_encoder:
            logger.warning(
                "weights are random, and so is the frozen text encoder: it tells phrases apart without knowing what "
                "they mean. Start from a checkpoint with --init, or add --train_text_encoder"
            )
    for name, value in arguments.loss.given().items():
        setattr(model.config.loss_config, name, value)
    if model_arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if model_arguments.compile:
        model.compile()
    return model


def load_frozen_text(model: Sam3LiteModel, path: Path) -> None:
    """
    Loads the text encoder that a run had put aside, or its fixed vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than the weights of this text encoder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which holds the frozen text encoder of the checkpoint")
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    frozen = (*TEXT_PARTS, "vocabulary")  # all else is in model.safetensors
    missing = [name for name in missing if name.split(".")[0] in frozen]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not hold the text encoder of the checkpoint: {_some('missing', missing)}"
            f"{_some('unexpected', unexpected)}start anew in another --output_dir"
        )


def load_initial(arguments: ModelArguments) -> Sam3LiteModel:
    """
    The model of --init in float32.

    Raises:
        ValueError: the source does not hold all weights of the model.
    """
    model, info = Sam3LiteModel.from_pretrained(
        arguments.init, config=initial_config(arguments), dtype=torch.float32, output_loading_info=True
    )
    kinds = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    if any(kinds.values()):
        found = "".join(_some(kind, names) for kind, names in kinds.items())
        raise ValueError(f"--init {arguments.init} is no whole model: {found}of a run, use the folder final/")
    return model


def start_of_weights(arguments: ModelArguments) -> Origin:
    """Where the weights of a fresh run come from."""
    return RANDOM_WEIGHTS if arguments.init is None else origin_of(arguments.init)


def write_mapping_report(model: Sam3LiteModel, arguments: Arguments) -> None:
    """Keeps in the output folder how the initial weights were mapped, or those of the checkpoint they come from."""
    target, init = Path(arguments.output.output_dir) / REPORT_FILE, arguments.model.init
    target.unlink(missing_ok=True)
    if model.mapping_report is not None:
        model.mapping_report.save(target.parent)
    elif init is not None and not os.path.isfile(init):
        report = cached_file(init, REPORT_FILE, _raise_exceptions_for_missing_entries=False)
        if report is not None:
            shutil.copyfile(report, target)


def _some(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} tensors, such as {', '.join(names[:3])}; " if names else ""


def initial_config(arguments: ModelArguments) -> Sam3LiteConfig:
    """The configuration of a fresh run: that of a lite checkpoint, otherwise of --preset with its overrides."""
    if arguments.init is None:
        config = Sam3LiteConfig.from_preset(arguments.preset, **arguments.model_overrides)
    else:
        checkpoint = open_checkpoint(arguments.init)
        if checkpoint is None:
            raise FileNotFoundError(f"--init {arguments.init} has neither a config.json nor a .pt file of Meta's")
        config = checkpoint.config
        if not checkpoint.is_lite:
            config = config.at_preset(arguments.preset, **arguments.model_overrides)
        elif arguments.model_overrides:
            raise ValueError("model_overrides changes a preset; with --init the sizes are those of the checkpoint")
    return config if arguments.image_size is None else config.changed(image_size=arguments.image_size)


def load_data(accelerator: Accelerator, arguments: Arguments, image_size: int) -> tuple[TrainDataset, EvalDataset]:
    """
    The checked training and validation splits.

    Args:
        image_size: side of the model's input in pixels.

    Raises:
        DatasetError: the dataset has faults, or no validation split.
    """
    options = arguments.data
    source, folders = options.data, options.image_folder
    if source == "generated":
        source = Path(arguments.output.output_dir) / "data"
        if accelerator.is_main_process:
            write_dataset(
                source,
                num_train=options.generated_train,
                num_valid=options.generated_valid,
                image_size=image_size,
                num_concepts=options.generated_concepts,
                seed=arguments.optimization.seed,
            )
        accelerator.wait_for_everyone()
    if options.validation_data is not None:
        source = {"train": source, "validation": options.validation_data}
        folders = {"train": folders, "validation": options.validation_image_folder or folders}
    splits = load_dataset_splits(source, folders, options.category_map)
    for split in ("train", "validation"):
        if split not in splits:
            raise DatasetError(
                f"{options.data} has no {split} split, only {', '.join(splits)}: a Roboflow folder has train/ and "
                "valid/, for COCO files give --validation_data"
            )
    sampling = PromptSampling(
        prompts_per_image=options.prompts_per_image,
        negative_ratio=options.negative_ratio,
        box_prompt_probability=options.box_prompt_probability,
        negative_words=read_words(options.negative_words),
    )
    augmentation = Augmentation(
        horizontal_flip=options.horizontal_flip,
        crop=options.crop,
        smallest_side=options.smallest_side,
        color_jitter=options.color_jitter,
    )
    train = TrainDataset(splits["train"], image_size, sampling, augmentation, arguments.optimization.seed)
    return train, EvalDataset(splits["validation"], image_size)


def read_words(path: str | None) -> tuple[str, ...]:
    """The phrases of a text file, one a line; empty lines do not count.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if path is None:
        return ()
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def build_text(accelerator: Accelerator, arguments: Arguments, model, processor, train_data: TrainDataset):
    """
    The text side: trained within the model, or frozen and taken out of it, or the fixed vocabulary of the model.

    Raises:
        ValueError: the model has a fixed vocabulary, and its text encoder should train, or a phrase is not in it.
    """
    phrases = [*train_data.concepts, *train_data.sampling.negative_words, VISUAL_PHRASE]
    if model.vocabulary is not None:
        if arguments.model.train_text_encoder:
            raise ValueError("train_text_encoder: the model has a fixed vocabulary and no text encoder to train")
        model.vocabulary.check(phrases, processor)
        text, frozen = TokenizedText(processor), model.vocabulary.state_dict(prefix="vocabulary.")
        logger.info("the model has a fixed vocabulary: %s", model.vocabulary.listed())
    elif arguments.model.train_text_encoder:
        return TokenizedText(processor)
    else:
        text = FrozenText(model, processor, phrases, accelerator.device)
        frozen = text.weights()
        logger.info("the text encoder is frozen: %d phrases encoded, encoder put aside", len(text.row))
    if accelerator.is_main_process:
        write_frozen(Path(arguments.output.output_dir) / "checkpoints", frozen)
    accelerator.wait_for_everyone()
    return text


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one process, 0 to 2^32 - 1."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def choose_batch_size(accelerator: Accelerator, model, dataset: TrainDataset, text) -> int:
    """
    Images per forward pass that fit into GPU memory with a tenth to spare: a power of two, at most 64 and at most the
    dataset. Tried on real images.

    Raises:
        ValueError: there is no GPU, or more than one process.
        RuntimeError: not even one image fits.
    """
    device = accelerator.device
    if device.type != "cuda":
        raise ValueError("batch_size 'auto' needs a CUDA GPU, whose memory it fills: give a number")
    if accelerator.num_processes > 1:  # one that runs out of memory would leave the others waiting for its gradients
        raise ValueError(
            "batch_size 'auto' works in a run of one process only: find the number in one (--num_processes 1, the log "
            "says it), then give it here"
        )
    collate = PromptCollator()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def attempt(size: int) -> None:
        torch.cuda.reset_peak_memory_stats(device)
        moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # as AdamW will hold
        batch = collate([dataset[0, index] for index in range(size)])
        model.train()
        with accelerator.autocast():
            outputs = model(**model_inputs(batch, text, device))
        accelerator.backward(outputs.loss)
        model.zero_grad()
        del moments, outputs
        if torch.cuda.max_memory_reserved(device) > 0.9 * torch.cuda.get_device_properties(device).total_memory:
            raise torch.OutOfMemoryError("less than a tenth of the memory is left: nearly out of memory.")

    size = find_batch_size(attempt, start=min(64, 1 << (len(dataset).bit_length() - 1)))
    torch.cuda.reset_peak_memory_stats(device)
    clear_device_cache(garbage_collection=True)
    return size


def find_batch_size(attempt: Callable[[int], None], start: int = 64) -> int:
    """
    The first of `start`, `start`/2, ... 1 for which `attempt` does not run out of memory.

    Raises:
        RuntimeError: not even one image fits.
    """
    size = start
    while size >= 1:
        clear_device_cache(garbage_collection=True)
        try:
            attempt(size)
            return size
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            logger.info("a batch of %d does not fit into memory", size)
        size //= 2
    raise RuntimeError(
        "not even one image fits into memory: use a smaller --preset or --image_size, fewer --prompts_per_image, or "
        "--gradient_checkpointing"
    )
