"""
Trains a lite SAM 3 on a COCO dataset.

    accelerate launch training/train.py training/configs/lite_fp16.yaml --data path/to/dataset

Where the package is installed, `accelerate launch -m sam3_hf.training` and, for one process, `sam3-lite train` do the
same. All that a run writes is in its output folder: checkpoints/{last,best,epoch_N}, tensorboard/, logs/train.log,
metrics.jsonl, predictions/epoch_N/*.png and final/, which `Sam3LiteModel.from_pretrained` takes.
"""

import logging

from .accelerator import start_accelerator
from .arguments import DEFAULT_COMMAND, parse_arguments
from .output_dir import open_output_dir
from .parts import build_parts
from .reporting import Metrics, Speed, log_step, memory_gb, progress_bar
from .run import Run
from .stopping import StopSignal, end_with_launcher

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None, command: str = DEFAULT_COMMAND) -> int:
    """
    Trains.

    Args:
        argv: the command line without the program; `sys.argv[1:]` if None.
        command: what the user called, for the help.

    Returns:
        The exit status: 0, or 128 + the number of the signal that ended the run early.
    """
    arguments = parse_arguments(argv, command)
    stop = StopSignal()
    end_with_launcher()
    accelerator = start_accelerator(arguments)
    checkpoint = open_output_dir(accelerator, arguments)
    run = Run(build_parts(arguments, accelerator, checkpoint), checkpoint)
    metrics = Metrics(run.folder, run.step, run.evaluated) if accelerator.is_main_process else None
    train(run, metrics, stop)
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


def train(run: Run, metrics: Metrics | None, stop: StopSignal) -> None:
    """Takes the steps that are left, or those until a signal; reports, saves and evaluates on the way."""
    if run.evaluation_due():  # the run was stopped before it
        run.save()
        if not run.evaluate(metrics, stop):
            return
    accelerator, every = run.accelerator, run.arguments.output
    bar = progress_bar(run.step, run.total_steps, accelerator.is_main_process)
    batches, speed = run.batches(), Speed()
    for done in run.loop.steps(speed.waiting_for(batches), run.total_steps, lambda: stop.received is not None):
        stopped = done.stopped
        bar.update()
        speed.count(run.images_per_step)
        memory = memory_gb(accelerator.device)
        bar.set_postfix_str(
            f"loss {done.terms['loss']:.3f}, lr {done.rate:.1e}, {speed.images_per_second():.1f} img/s, "
            f"{memory:.1f} GB"
        )
        if metrics and run.step % every.log_every_steps == 0:
            values = {"epoch": run.epoch, **done.terms, "lr": done.rate, **speed.read()}
            values |= {"memory_gb": memory, "overflows": run.loop.overflows}
            metrics.write("train", run.step, values)
            log_step(run.step, run.total_steps, values, bar)
        if run.at_epoch_end():
            run.save()  # before the evaluation, which may take long: the epoch is safe
            if run.evaluation_due() and not stopped:
                stopped = not run.evaluate(metrics, stop)
            speed.read()  # what evaluating and saving took is not training time
        elif stopped or (every.save_every_steps and run.step % every.save_every_steps == 0):
            run.save()
        if stopped:
            break
    bar.close()
