"""`label` and `predict` in several processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import HUNG
from PIL import Image
from test_label_cli import PROMPTS, saved, tree  # noqa: F401
from train_cases import TORCHRUN

from sam3_hf.prediction.processes import FOLDER, Outcome, Processes

# Ends the second process in the middle of its share, as a machine would that loses its power.
KILLED = """
import os, signal
from sam3_hf.prediction.output_folder import PredictionFolder
write, written = PredictionFolder.write, []
def write_two(self, *arguments):
    if len(written) == 2 and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(self, *arguments))
PredictionFolder.write = write_two
"""


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Thirteen pictures, one of them damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


@pytest.fixture
def run(saved, pictures, tmp_path):  # noqa: F811
    """
    Runs a sub-command over the pictures, after some lines of Python; all its processes end with it. Without a launcher
    there are two that torchrun has not started.
    """

    def run(command: str, output: str, *arguments, launcher=TORCHRUN, before: str = ""):
        program = tmp_path / "program.py"
        program.write_text(before + "\nfrom sam3_hf.cli import app\napp()\n")
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        options = ["--model", saved, "--output", tmp_path / output, "--threshold", 0, "--mask-threshold", 0.4, *words]
        options += ["--workers", 0, "--batch-size", 2, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        words = [str(program), command, str(pictures), *map(str, options)]
        if launcher is None:
            return warm.run_two(words, tmp_path, environment)
        return subprocess.run(
            [sys.executable, *launcher, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HUNG,
        )

    return run


@pytest.mark.slow
def test_one_of_two_is_killed_and_the_next_run_ends_as_one_process_does(run, tmp_path):
    killed = run("label", "two", before=KILLED)
    assert killed.returncode != 0 and not list((tmp_path / "two").rglob("_annotations.coco.json"))
    assert len(list((tmp_path / "two" / "predictions").glob("*.json"))) >= 2
    again, alone = run("label", "two"), run("label", "one", launcher=[])
    for finished in (again, alone):
        assert finished.returncode == 1 and finished.stderr.count("1 could not be read or written:") == 1
        assert finished.stderr.count("cut.png") == 1, finished.stderr
    new, before = map(int, re.search(r"(\d+) pictures were new, (\d+) done before", again.stdout).groups())
    assert new >= 1 and before >= 2 and new + before == 12
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "train" / "_annotations.coco.json").read_text())["annotations"]


@pytest.mark.slow
def test_predict_shares_pictures_too(run, pictures, tmp_path):
    (pictures / "cut.png").unlink()
    shared, alone = run("predict", "two", "--overlays"), run("predict", "one", "--overlays", launcher=[])
    assert shared.returncode == alone.returncode == 0, shared.stderr
    assert shared.stdout.replace("two", "one") == alone.stdout
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_an_error_before_the_start_is_said_once(run, tmp_path):
    finished = run("label", "out", "--valid-share", 1, launcher=None)
    assert finished.returncode != 0 and finished.stderr.count("must be 0 or more and less than 1") == 1
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_gone_is_not_waited_for(tmp_path):
    main = Processes(0, 3)
    main.enter(tmp_path)
    for index in (1, 2):
        if not (child := os.fork()):
            Processes(index, 3).enter(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
    Processes(2, 3).gather(tmp_path, Outcome(1, 2, {5: "bad"}))
    with pytest.raises(OSError, match="process 1 of 3 .* run the same command again"):
        main.gather(tmp_path, Outcome())
    Processes(1, 3).gather(tmp_path, Outcome(3, 4, {4: "worse"}))
    found = main.gather(tmp_path, Outcome(1, 1, {9: "last"}))
    assert found == Outcome(5, 7, {4: "worse", 5: "bad", 9: "last"}) and list(found.failures) == [4, 5, 9]
    assert not (tmp_path / FOLDER).exists()


def test_a_second_command_stops_at_once(tmp_path):
    first = Processes()
    first.enter(tmp_path)
    if not (child := os.fork()):
        try:
            Processes().enter(tmp_path)
        except OSError as error:
            os._exit(7 if "another command writes into" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    first.gather(tmp_path, Outcome())
    Processes().enter(tmp_path)


def test_every_picture_is_in_one_share():
    shares = [Processes(index, 3).share(range(10)) for index in range(3)]
    assert sorted(sum(shares, [])) == list(range(10)) and max(map(len, shares)) == 4
