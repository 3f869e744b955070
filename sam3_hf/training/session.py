"""One process of a run, from its settings to its exit status."""

import logging
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

from tqdm import tqdm

from ..launcher import end_with_launcher
from .accelerator import process_state, start_accelerator
from .arguments import Arguments
from .lock import sole_run
from .output_dir import check_space, delete_run, open_output_dir, run_to_overwrite
from .parts import build_parts, write_parts
from .reporting import Metrics, Speed, log_step, memory_gb, progress_bar
from .run import Run
from .stopping import StopSignal
from .trackers import check_trackers

logger = logging.getLogger(__name__)


def run_session(arguments: Arguments) -> int:
    """
    Trains while this is the only run in its output folder.

    Returns:
        The exit status: 0, or 128 + the number of the signal that ended the run early.

    Raises:
        FolderInUse: another run has the output folder.
        ImportError: the library of a service that the run shall report to is not installed.
    """
    check_trackers(arguments.progress.services)
    stop = StopSignal()
    end_with_launcher()
    folder = Path(arguments.output.output_dir)
    with sole_run(folder) if process_state().is_main_process else nullcontext():
        run, metrics = _start(arguments)
        accelerator = run.accelerator
        train(run, metrics, stop)
        if metrics:
            metrics.close()
        finished = run.is_finished()
        if finished:
            if run.step < run.total_steps:
                logger.info("early stopping: %s", run.early_stopping)
            run.finish()
        else:
            logger.warning(
                "stopped after step %d of %d; to go on, run the same command with --resume auto",
                run.step,
                run.total_steps,
            )
        accelerator.wait_for_everyone()  # who leaves while another still talks can take it down
        accelerator.end_training()
    return 0 if finished else 128 + (stop.received or 0)


def _start(arguments: Arguments) -> tuple[Run, Metrics | None]:
    """
    The run before its next step, and in the main process what it reports to. An older one in its folder is deleted
    when all that can fail before has not, services among it.
    """
    accelerator = start_accelerator(arguments)
    checkpoint = open_output_dir(accelerator, arguments)
    parts = build_parts(arguments, accelerator, checkpoint)
    run, metrics = Run(parts, checkpoint), None
    if accelerator.is_main_process:
        check_space(parts, checkpoint)
        older = run_to_overwrite(arguments)
        metrics = Metrics(run.folder, run.step, run.evaluated, arguments.progress.services, arguments.flat())
        delete_run(older)
    accelerator.wait_for_everyone()
    write_parts(parts, checkpoint)
    accelerator.wait_for_everyone()
    return run, metrics


def train(run: Run, metrics: Metrics | None, stop: StopSignal) -> None:
    """Takes the steps that are left, or those until a signal; reports, saves and evaluates on the way."""
    if run.step == 0:
        if not run.measure_before(metrics, stop):
            return
        run.score_early(metrics)
    if run.evaluation_due():  # the run was stopped before it
        run.save()
        if not run.evaluate(metrics, stop):
            return
    if run.is_finished():
        return
    with (
        progress_bar(run.step, run.total_steps, run.accelerator.is_main_process) as bar,
        closing(run.batches()) as batches,
    ):
        take_steps(run, batches, metrics, bar, stop)


def take_steps(run: Run, batches: Iterator, metrics: Metrics | None, bar: tqdm, stop: StopSignal) -> None:
    """The loop of `train` over the batches of the steps that are left."""
    accelerator, every, speed = run.accelerator, run.arguments.output, Speed()
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
            log_step(run.step, run.total_steps, run.images_per_step, values, bar)
        if run.score_early(metrics):
            speed.read()  # that is not training time
        if run.at_epoch_end():
            run.save()  # before the evaluation, which may take long: the epoch is safe
            if run.evaluation_due() and not stopped:
                stopped = not run.evaluate(metrics, stop)
            speed.read()  # nor is what evaluating and saving took
        elif stopped or (every.save_every_steps and run.step % every.save_every_steps == 0):
            run.save()
        if stopped or run.is_finished():
            break
