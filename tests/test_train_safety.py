"""What the trainer does when something breaks: it ends, says why in a line, and loses nothing."""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file
from train_cases import TORCHRUN, error_of, launcher, state_of, train

from sam3_hf import errors, files
from sam3_hf.data.generated import write_dataset
from sam3_hf.data.workers import batches_of
from sam3_hf.errors import one_line
from sam3_hf.training import checkpoints, lock, recovery
from sam3_hf.training.arguments import parse_arguments
from sam3_hf.training.main import main
from sam3_hf.training.output_dir import delete_run, run_to_overwrite


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=12, num_valid=3, image_size=64, num_concepts=3)


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    """6 steps in 2 epochs, with epoch_1, epoch_2, best and last."""
    folder = tmp_path_factory.mktemp("finished")
    finished = train(folder, data, save_every_epochs=1)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of it, in which no two names are the same file."""
    return shutil.copytree(finished_run / "run", tmp_path / "run")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs the trainer in this process, in `tmp_path`; the line that it fails with."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> str:
        assert main(["--output_dir", "run", "--preset", "tiny", "--num_workers", "0", *flags]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        return lines[-1].removesuffix(" (traceback: run/logs/train.log)")

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


# 1. Hangs

RAISES = """
def fail(*arguments, **options):
    raise LookupError("broken on purpose")
"""


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("import sam3_hf.training.run as module; module.plot_curves = fail", "final/config.json"),
        pytest.param(
            "import sam3_hf.evaluation.loop as module; module.prediction_rows = fail",
            "checkpoints/last/optimizer.pt",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from sam3_hf.training.loop import TrainingLoop; TrainingLoop.take_step = fail",
            "logs/train.log",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["curves", "evaluation", "step"],
)
def test_an_error_after_the_workers_started_ends_the_run(data, tmp_path, where, left):
    finished = train(tmp_path, data, program=launcher(tmp_path, RAISES + where), epochs=1)
    assert error_of(finished) == "Error: LookupError: broken on purpose (traceback: run/logs/train.log)"
    assert "in fail" in (tmp_path / "run" / "logs" / "train.log").read_text()
    assert (tmp_path / "run" / left).is_file()


@pytest.mark.slow
def test_ctrl_c_twice_ends_the_run_at_once(data, tmp_path):
    patch = """
import signal, time
import sam3_hf.training.stopping as stopping
from sam3_hf.training.loop import TrainingLoop
clock = iter((0.0, 10.0))
stopping.time = type("time", (), {"monotonic": lambda: next(clock)})
def press_twice(self, batches, stop):
    for _ in range(2):
        os.killpg(0, signal.SIGINT)
TrainingLoop.take_step = press_twice
"""
    finished = train(tmp_path, data, program=launcher(tmp_path, patch))
    assert finished.returncode == 130
    assert finished.stderr.splitlines()[-1].startswith("Interrupted: ") and "Traceback" not in finished.stderr


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(data, tmp_path):
    patch = """
from sam3_hf.training.loop import TrainingLoop
take_step = TrainingLoop.take_step
def fail_in_the_second(self, batches, stop):
    if self.step == 2 and self.accelerator.process_index == 1:
        raise LookupError("broken on purpose")
    return take_step(self, batches, stop)
TrainingLoop.take_step = fail_in_the_second
"""
    finished = train(tmp_path, data, program=[*TORCHRUN, *launcher(tmp_path, patch)], batch_size=2)
    assert finished.returncode != 0
    cause = "Error: LookupError: broken on purpose"
    assert cause + " (traceback: run/logs/train.log)" in finished.stderr.splitlines()
    assert cause in finished.stderr[finished.stderr.index("Root Cause") :]  # what torchrun says at the end


def test_workers_that_are_deaf_and_busy_end_with_their_loader():
    workers = []
    with pytest.raises(LookupError), batches_of(busy_loader()) as batches:
        next(batches)
        workers += batches._workers
        raise LookupError
    assert len(workers) == 1 and not workers[0].is_alive()


class Busy(torch.utils.data.Dataset):
    def __getitem__(self, index):
        if index > 0:
            while True:
                os.read(self.never, 1)
        return index

    def __len__(self):
        return 2


def busy_loader():
    from sam3_hf.training.stopping import leave_signals_to_the_parent

    dataset = Busy()
    dataset.never, _ = os.pipe()
    return torch.utils.data.DataLoader(dataset, num_workers=1, worker_init_fn=leave_signals_to_the_parent)


# 2. One run in a folder

HOLD = """
import sys, os
from pathlib import Path
from sam3_hf.training.lock import sole_run
with sole_run(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:  # a data worker, which outlives it
        sys.stdin.read()
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_second_run_stops_at_once_and_names_the_first(fails, data, tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), "fork"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(first.stdout.readline())
    (tmp_path / "run" / "logs").mkdir()
    line = fails("--data", str(data))
    assert line.startswith(f"Error: run is in use by another run (process {pid} on {os.uname().nodename} since 20")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [".lock", "logs"]
    first.kill()
    first.wait()
    with lock.sole_run(tmp_path / "run"):  # though the process that it forked still lives
        held = json.loads((tmp_path / "run" / ".lock").read_text())
    assert held["pid"] == os.getpid()
    first.stdin.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    with lock.sole_run(tmp_path):
        assert "has no locks (No locks available): take care" in caplog.text


# 3. Checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


DAMAGE = {
    "flipped weights": ("model.safetensors", flip),
    "cut weights": ("model.safetensors", cut),
    "flipped moments": ("optimizer.pt", flip),
    "flipped text encoder": (checkpoints.FROZEN, flip),
    "cut state": (checkpoints.STATE, cut),
    "flipped state": (
        checkpoints.STATE,
        lambda path: path.write_text(path.read_text().replace('"step": 6', '"step": 7')),
    ),
    "no weights": ("model.safetensors", Path.unlink),
    "no state": (checkpoints.STATE, Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(run, kind, caplog):
    name, damage = DAMAGE[kind]
    assert recovery.checkpoint_to_resume(run / "checkpoints", "auto") == run / "checkpoints" / "last"
    for folder in ("last", "best", "epoch_2"):
        if state_of(run / "checkpoints" / folder)["step"] == 6:
            damage(run / "checkpoints" / folder / name)
    assert recovery.checkpoint_to_resume(run / "checkpoints", "auto") in (
        run / "checkpoints" / "best",
        run / "checkpoints" / "epoch_1",
    )
    assert f"{run}/checkpoints/last is damaged and not used: {name} " in caplog.text
    assert "step 3; 3 steps after it are lost and done again" in caplog.text
    if kind != "no state":
        with pytest.raises(ValueError, match=f"last is damaged .{name} .*choose another checkpoint"):
            recovery.checkpoint_to_resume(run / "checkpoints", str(run / "checkpoints" / "last"))


def test_where_all_are_damaged_nothing_is_started(run):
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir():
            flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged .*last: model.safetensors does not match"):
        recovery.checkpoint_to_resume(run / "checkpoints", "auto")


def test_checkpoints_without_checksums_are_taken_unless_they_are_cut_off(run):
    last = run / "checkpoints" / "last"
    state = state_of(last)
    (last / checkpoints.STATE).write_text(
        json.dumps({key: state[key] for key in state if key not in ("files", "checksum")})
    )
    assert checkpoints.damage(last) is None
    cut(last / "optimizer.pt")
    assert checkpoints.damage(last) == "optimizer.pt is damaged"
    cut(last / "model.safetensors")
    assert checkpoints.damage(last).startswith("model.safetensors is damaged: ")


@pytest.mark.slow
def test_without_its_last_checkpoint_a_run_goes_on_from_the_newest(finished_run, run, data, tmp_path):
    for name in ("last", "best", "epoch_2"):
        shutil.rmtree(run / "checkpoints" / name)
    finished = train(tmp_path, data, "--resume", "auto", save_every_epochs=1)
    assert finished.returncode == 0, finished.stderr
    assert "going on from run/checkpoints/epoch_1, the newest whole checkpoint: step 3; 3 steps" in finished.stderr
    expected = load_file(finished_run / "run" / "checkpoints" / "last" / "model.safetensors")
    found = load_file(run / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_final_model_alone_is_not_overwritten_by_resume_auto(fails, run, data):
    shutil.rmtree(run / "checkpoints")
    line = fails("--data", str(data), "--resume", "auto")
    assert "holds the final model of a run and no checkpoint to go on from" in line


@pytest.mark.parametrize(
    "flags", [["--data", "nowhere"], ["--init", "nowhere/at/all"], ["--metric_for_best", "segm_AP", "--data", "boxes"]]
)
def test_overwriting_deletes_nothing_before_data_and_model_were_looked_at(
    fails, run, data, tmp_path, monkeypatch, flags
):
    for module in ("huggingface_hub.constants", "datasets.config"):  # which try again for a while
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    shutil.copytree(data, tmp_path / "boxes")
    for path in (tmp_path / "boxes").rglob("*.json"):
        coco = json.loads(path.read_text())
        for annotation in coco["annotations"]:
            annotation["segmentation"] = []
        path.write_text(json.dumps(coco))
    kept = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "train.log")]
    before = {path: path.read_bytes() for path in kept}
    fails("--data", str(data), "--overwrite_output_dir", *flags)
    assert before == {path: path.read_bytes() for path in kept}


def test_overwriting_deletes_nothing_before_services_have_started(fails, run, data, monkeypatch):
    def start(*_):
        raise ConnectionError("no login")

    monkeypatch.setattr("sam3_hf.training.trackers._start", start)
    kept = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "train.log")]
    before = {path: path.read_bytes() for path in kept}
    line = fails("--data", str(data), "--overwrite_output_dir", "--image_size", "56", "--batch_size", "2")
    assert "report_to: tensorboard does not start: no login" in line
    assert before == {path: path.read_bytes() for path in kept}


def test_what_services_write_at_their_start_survives_the_run_before(tmp_path):
    older = ("final/config.json", "tensorboard/1", "wandb/run-1/a", "trackers.json", "logs/train.log")
    newer = ("tensorboard/2", "wandb/run-2/a", "trackers.json")
    for name in older:
        files.write_file(tmp_path / name, name)
    (tmp_path / "wandb" / "latest-run").symlink_to("run-1")
    found = run_to_overwrite(parse_arguments(["--data", "x", "--output_dir", str(tmp_path)]))
    for name in newer:
        files.write_file(tmp_path / name, name)
    delete_run(found)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*newer, "logs/train.log"}
    assert not run_to_overwrite(parse_arguments(["--data", "x", "--output_dir", str(tmp_path)]))


def test_a_damaged_best_checkpoint_is_not_exported(run, data, tmp_path):
    state = state_of(run / "checkpoints" / "last")
    checkpoints.replace_state(run / "checkpoints" / "last", {**state, "best": {**state["best"], "step": 3}})
    shutil.rmtree(run / "checkpoints" / "best")
    best = shutil.copytree(run / "checkpoints" / "epoch_1", run / "checkpoints" / "best")
    flip(best / "model.safetensors")
    finished = train(tmp_path, data, "--resume", "auto", save_every_epochs=1)
    assert finished.returncode == 0, finished.stderr
    assert "best is damaged (model.safetensors does not match its checksum)" in finished.stderr
    expected = load_file(run / "checkpoints" / "last" / "model.safetensors")
    found = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in expected.items())


# 4. Numbers


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize(
    "name",
    ["learning_rate", "max_grad_norm", "weight_decay", "negative_ratio", "warmup_ratio", "bbox_loss_weight"],
)
def test_settings_that_are_not_finite_are_refused(name, value, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", f"--{name}={value}"])
    assert f"error: {name} must be a finite number, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bbox_loss_weight=-1", "bbox_loss_weight must be at least 0"),
        ("--mask_num_points=0", "mask_num_points must be at least 1"),
        ("--seed=4294967296", "seed must be from 0 to 4294967295"),
        ('--model_overrides={"dropout": NaN}', "model_overrides must hold finite numbers, got NaN"),
    ],
)
def test_absurd_settings_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "x", flag])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("where", ["weight", "moment", "average"])
def test_a_checkpoint_that_is_not_finite_is_not_written_over_one_that_is(model, tmp_path, where):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ema = checkpoints.MovingAverage(model, 0.9)
    save = lambda: checkpoints.save_checkpoint(accelerator, tmp_path / "last", model, optimizer, ema, {"step": 1})  # noqa: E731
    save()
    before = {path.name: path.read_bytes() for path in (tmp_path / "last").iterdir()}
    name, parameter = next((name, p) for name, p in model.named_parameters() if "detr_decoder" in name)
    tensors = {"weight": parameter.data, "moment": optimizer.state[parameter]["exp_avg"], "average": ema.average[name]}
    tensors[where].view(-1)[0] = float("nan")
    with pytest.raises(RuntimeError, match=f"last is not written, as not all numbers in it are finite .{name}."):
        save()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "last").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


# 5. Libraries, rights, space


@pytest.mark.parametrize("library", ["matplotlib", "tensorboard", "xxhash"])
def test_a_library_that_is_missing_is_found_at_the_start(fails, data, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"{library}.pyplot", raising=False)
    line = fails("--data", str(data))
    assert line == f'Error: {library} is not installed; training needs pip install "sam3-hf[train]".'
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_accelerate_there_is_a_line_as_well(data, tmp_path):
    finished = train(tmp_path, data, program=launcher(tmp_path, "sys.modules['accelerate'] = None"), fresh=True)
    assert error_of(finished) == 'Error: accelerate is not installed; training needs pip install "sam3-hf[train]".'


def test_space_for_a_checkpoint_is_asked_for_at_the_start(fails, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    line = fails("--data", str(data))
    assert "a checkpoint takes 0." in line and "and 0.00 GB are free on this disk: make space" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disk_that_fills_up_within_a_save_leaves_the_checkpoint_before(data, tmp_path):
    """A limit on the size of files stands for it: it fails in the middle of the weights as a full disk does."""
    patch = """
import resource
from sam3_hf.training.loop import TrainingLoop
save = TrainingLoop.save
def save_without_space(self, target, state):
    if self.step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save(self, target, state)
TrainingLoop.save = save_without_space
"""
    line = error_of(train(tmp_path, data, program=launcher(tmp_path, patch), save_every_steps=1))
    assert line.startswith("Error: run/checkpoints/last could not be written, the one before stays as it was: ")
    kept = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [checkpoints.FROZEN, "last"]
    assert state_of(kept / "last")["step"] == 1 and checkpoints.damage(kept / "last") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_found_at_the_start(data, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    assert "no right to read or write here" in error_of(train(tmp_path, data))


# 18. One line


@pytest.mark.slow
def test_below_accelerate_launch_the_line_stands_alone(tmp_path):
    program = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "sam3_hf.training"]
    finished = train(tmp_path, "nowhere", program=program)
    lines = finished.stderr.splitlines()
    (index,) = [index for index, line in enumerate(lines) if line.startswith("Error: ")]
    assert lines[index - 1] == lines[index + 1] == ""
    assert lines[index + 2].startswith("Traceback")  # of the launcher, which says that the trainer failed
    assert finished.stderr.count("Traceback") == 1


def test_what_init_names_is_not_there(fails, data, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("no/such/folder", "./nothing", "/no/model.pt"):
        assert f"there is no folder or file {name}, and repositories of the Hub are named owner/name" in fails(
            "--data", str(data), "--init", name
        )
    empty = str(tmp_path / "empty")
    assert f"--init {empty} has neither a config.json nor a .pt file" in fails("--data", str(data), "--init", empty)


def test_the_folder_of_a_run_is_no_model(fails, run, data):
    line = fails("--data", str(data), "--init", str(run), "--overwrite_output_dir")
    assert f"{run} is the folder of a training run, not of a model" in line and f"{run}/final" in line


def test_a_checkpoint_is_no_start_of_another_run(fails, run, data):
    last = run / "checkpoints" / "last"
    line = fails("--data", str(data), "--init", str(last), "--overwrite_output_dir")
    assert line.startswith(f"Error: {last} is a checkpoint to resume from, not a model: take the folder final/")


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (GatedRepoError, 403, "no access to facebook/sam3: ask for it at https://huggingface.co/facebook/sam3, then"),
        (RepositoryNotFoundError, 401, "no repository facebook/sam3 on the Hub that you may see"),
        (HfHubHTTPError, 403, "no access to facebook/sam3 (status 403)"),
        (HfHubHTTPError, 500, "the Hub answers with status 500 for facebook/sam3"),
    ],
)
def test_a_hub_that_refuses_is_told_from_one_that_is_not_there(monkeypatch, kind, status, message):
    def answer(*_, **__):
        raise kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(errors.HfApi, "auth_check", answer)
    assert message in str(errors.missing_source("facebook/sam3"))


@pytest.mark.slow  # Hugging Face tries again for a while
def test_no_network_is_said(fails, data, monkeypatch):
    def unreachable(*_, **__):
        raise LookupError("Connection refused")  # HTTP libraries have errors of their own

    monkeypatch.setattr(errors.HfApi, "auth_check", unreachable)
    line = fails("--data", str(data), "--init", "facebook/sam3-not-here")
    assert "no network: facebook/sam3-not-here is not on this machine, and the Hub cannot be reached" in line


def test_several_lines_become_one():
    error = ValueError("2 problems:\n  first: 1\n  second\n\nin detail:\n  x")
    assert one_line(error) == "2 problems: first: 1; second; in detail: x"
    assert one_line(OSError(28, "No space left on device", "a/b")) == "a/b: the disk is full: make space"
    assert one_line(KeyError("key")) == "KeyError: 'key'"
