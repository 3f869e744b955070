"""
Trains a lite SAM 3 on a COCO dataset.

    accelerate launch training/train.py training/configs/lite_fp16.yaml --data path/to/dataset

All that a run writes is in its output folder: checkpoints/{last,best,epoch_N}, tensorboard/, logs/train.log,
metrics.jsonl, predictions/epoch_N/*.png and final/, which `Sam3LiteModel.from_pretrained` takes.
"""

import logging
import math

import torch
from accelerate.utils import gather_object, set_seed

from ..evaluation.loop import model_inputs
from ..processing_sam3_lite import Sam3LiteProcessor
from .arguments import parse_arguments
from .optim import Schedule, build_optimizer
from .reporting import Metrics, Speed, log_step, memory_gb, progress_bar
from .run import Run
from .starting import (
    build_model,
    build_text,
    load_data,
    open_output_dir,
    prepare,
    start_accelerator,
    step_seed,
    write_mapping_report,
)
from .stopping import StopSignal, end_with_launcher

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50  # in a row; by then the loss scale has fallen from 2^6 to 2^-44
NOTHING_SAVED = "Nothing was saved, the last checkpoint is as it was."


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status: 0, or 128 + the number of the signal that ended the run early."""
    arguments = parse_arguments(argv)
    stop = StopSignal()
    end_with_launcher()
    accelerator = start_accelerator(arguments)
    checkpoint = open_output_dir(accelerator, arguments)
    model = build_model(arguments, checkpoint)
    if accelerator.is_main_process and checkpoint is None:
        write_mapping_report(model, arguments)
    processor = Sam3LiteProcessor.from_config(model.config)
    train_data, valid_data = load_data(accelerator, arguments, model.config.image_size)
    text = build_text(accelerator, arguments, model, processor, train_data)
    optimizer = build_optimizer(model, arguments.optimization, fused=accelerator.device.type == "cuda")
    schedule = Schedule(optimizer, arguments.optimization)
    model, optimizer = prepare(accelerator, model, optimizer)

    run = Run(arguments, accelerator, model, optimizer, processor, text, train_data, valid_data, checkpoint)
    metrics = Metrics(run.folder, run.step, run.evaluated) if accelerator.is_main_process else None
    stopped = False
    if run.evaluation_due():  # the run was stopped before it
        run.save()
        stopped = not run.evaluate(metrics, stop)
    bar = progress_bar(run.step, run.total_steps, accelerator.is_main_process)
    batches, speed, every = run.batches(), Speed(), arguments.output
    while run.step < run.total_steps and not stopped:
        run.step += 1
        rate = schedule.apply(optimizer, run.step, run.total_steps)
        with speed.waiting():
            step_batches = [next(batches) for _ in range(arguments.optimization.gradient_accumulation_steps)]
        terms, stopped = train_step(run, step_batches, stop.received is not None)
        bar.update()
        speed.count(run.images_per_step)
        memory = memory_gb(accelerator.device)
        bar.set_postfix_str(
            f"loss {terms['loss']:.3f}, lr {rate:.1e}, {speed.images_per_second():.1f} img/s, {memory:.1f} GB"
        )

        if metrics and run.step % every.log_every_steps == 0:
            values = {"epoch": run.epoch, **terms, "lr": rate, **speed.read()}
            values |= {"memory_gb": memory, "overflows": run.overflows}
            metrics.write("train", run.step, values)
            log_step(run.step, run.total_steps, values, bar)
        if run.at_epoch_end():
            run.save()  # before the evaluation, which may take long: the epoch is safe
            if run.evaluation_due() and not stopped:
                stopped = not run.evaluate(metrics, stop)
            speed.read()  # what evaluating and saving took is not training time
        elif stopped or (every.save_every_steps and run.step % every.save_every_steps == 0):
            run.save()
    bar.close()
    if metrics:
        metrics.close()
    finished = run.step == run.total_steps and not run.evaluation_due()
    if finished:
        run.finish()
    else:
        logger.warning(
            "stopped after step %d of %d; to go on, run the same command with --resume auto", run.step, run.total_steps
        )
    accelerator.wait_for_everyone()  # who leaves while another still talks can take it down
    accelerator.end_training()
    return 0 if finished else 128 + (stop.received or 0)


def train_step(run: Run, batches: list[dict], stop: bool) -> tuple[dict[str, float], bool]:
    """
    One optimizer step over the batches of this process, one forward pass each.

    Args:
        stop: this process was asked to stop.

    Returns:
        "loss" averaged over batches and processes, "grad_norm", and the terms of this process's loss; whether any
        process was asked to stop.

    Raises:
        RuntimeError: a prediction, the loss or a gradient is not finite, or was not in FP16 for many steps; names
            the images.
    """
    accelerator, settings = run.accelerator, run.arguments.optimization
    # The randomness of a step depends on its number alone: a resumed run repeats it without stored generator states.
    set_seed(step_seed(settings.seed, run.step, accelerator.process_index))
    run.model.train()
    losses, terms = [], []
    for batch in batches:
        with accelerator.accumulate(run.model):
            outputs = forward(run, batch)
            accelerator.backward(outputs.loss)
            losses.append(outputs.loss.detach())
            terms.append(outputs.loss_dict)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm or math.inf)
                loss, stopped = average_over_processes(accelerator, losses, stop)
                check_finite(run, loss, norm, losses, batches)
            run.optimizer.step()
            run.optimizer.zero_grad()
    if accelerator.scaler is not None and not math.isfinite(norm):
        count_overflow(run, loss, norm, batches)
    else:
        run.overflows_in_a_row = 0
        if run.ema is not None:
            run.ema.update(run.step)
    names = sorted(set().union(*terms))
    means = torch.stack([torch.stack([term[name] for term in terms if name in term]).mean() for name in names])
    return {"loss": loss, **dict(zip(names, means.tolist(), strict=True)), "grad_norm": float(norm)}, stopped


def forward(run: Run, batch: dict):
    """
    The model's outputs for a batch.

    Raises:
        RuntimeError: the model or its loss refused the batch, as where predictions are not finite; names the images.
    """
    inputs = model_inputs(batch, run.text, run.accelerator.device)
    try:
        with run.accelerator.autocast():  # which Accelerate adds to the model itself, but not under FSDP
            return run.model(**inputs)
    except ValueError as error:  # this process alone may have it, so the others' images are not asked for
        raise RuntimeError(
            f"step {run.step} failed: {error}; ids of the images: {batch['image_ids']}. {NOTHING_SAVED}"
        ) from error


def average_over_processes(accelerator, losses: list[torch.Tensor], stop: bool) -> tuple[float, bool]:
    """The mean loss over batches and processes, and whether any process was asked to stop, in one exchange."""
    local = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(float(stop))])
    loss, stopped = accelerator.reduce(local, "mean").tolist()
    return loss, stopped > 0


def check_finite(run: Run, loss: float, norm: torch.Tensor, losses: list[torch.Tensor], batches: list[dict]) -> None:
    """
    Raises:
        RuntimeError: the loss is not finite, or a gradient outside of FP16 (there, the loss scaler skips the step).
    """
    if math.isfinite(loss) and (run.accelerator.scaler is not None or math.isfinite(norm)):
        return
    guilty = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)] or batches
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    raise not_finite(f"the {what} of step {run.step} is not finite", loss, norm, guilty)


def count_overflow(run: Run, loss: float, norm: torch.Tensor, batches: list[dict]) -> None:
    """
    Notes that the loss scaler skipped a step.

    Raises:
        RuntimeError: it has skipped so many in a row that a lower loss scale will not help.
    """
    run.overflows += 1
    run.overflows_in_a_row += 1
    logger.warning("step %d skipped: gradients overflowed in FP16, the loss scale is reduced", run.step)
    if run.overflows_in_a_row >= MAX_OVERFLOWS:
        what = f"gradients overflowed in each of the last {MAX_OVERFLOWS} steps, the last of which is {run.step}"
        raise not_finite(what, loss, norm, batches)


def not_finite(what: str, loss: float, norm: torch.Tensor, batches: list[dict]) -> RuntimeError:
    """The error for a step whose loss or gradient is not finite in any process; called by all processes."""
    images = gather_object([image for batch in batches for image in batch["image_ids"]])
    return RuntimeError(
        f"{what} (loss {loss}, gradient norm {float(norm)}); ids of the images: {images}. {NOTHING_SAVED} Look at "
        "these images' annotations, or lower --learning_rate, or use --mixed_precision bf16"
    )
