"""Every code block of the README, run as it is written there, in one folder; what differs is in the tables below."""

import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from conftest import HUNG
from hub_stand_in import TOKEN, HubStandIn
from typer.testing import CliRunner

from sam3_hf import Sam3LitePipeline
from sam3_hf.cli import app
from sam3_hf.data import read_category_map

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
STANDARD = ROOT / "sam3_hf" / "assets" / "tiny-standard"

# Replaced wherever they occur in code blocks: nothing can be downloaded here, and `lite` takes gigabytes.
SUBSTITUTIONS = {
    "facebook/sam3": str(STANDARD),
    'preset="lite"': 'preset="tiny"',
    "path/to/images": "outputs/demo/data/valid",
    "path/to/dataset": "outputs/demo/data",
}
# Added to commands that start so: one step instead of a training run, and the smallest sizes. Those of the checkpoint
# are kept in the demo, as a model of the preset tiny finds nothing before it is trained.
ADDED = {
    "accelerate launch --cpu --num_cpu_threads_per_process 1 training/train.py training/configs/demo.yaml": (
        "--preset tiny-standard --max_steps 1 --generated_train 4 --generated_valid 4 --num_workers 0"
        " --prediction_images 1"
    ),
    "accelerate launch training/train.py training/configs/lite_fp16.yaml": (
        "--preset tiny --max_steps 1 --save_every_epochs 1 --num_workers 0 --prediction_images 1"
    ),
    "sam3-lite convert": "--preset tiny --no-search-depth",
    "sam3-lite predict": "--workers 0",
    "sam3-lite evaluate": "--workers 0",
}
# Not run, and why; the tests named check them.
NOT_RUN = {
    "make demo": "installs, and trains for minutes: test_what_make_stands_for",
    "make test": "installs, and runs this test: test_what_make_stands_for",
    'python -m venv .venv && . .venv/bin/activate && pip install -e ".[train,dev]"': (
        "installs: test_what_make_stands_for"
    ),
    "OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal": "runs this test: test_what_make_stands_for",
}


def sam3_lite(arguments: list[str]):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def python(arguments: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def accelerate(arguments: list[str]):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HUNG)
    assert finished.returncode == 0, finished.stdout


# The programs that commands may call; none has to be on the PATH. Those that can run in this process: importing takes
# longer than they do.
PROGRAMS = {"sam3-lite": sam3_lite, "python": python, "accelerate": accelerate}

# What commands that start so leave behind, as the text around them says.
WRITTEN = {
    "python training/demo.py": ["outputs/demo/predictions/*/*.png", "outputs/demo/segmented.png"],
    "sam3-lite predict": [
        "found/predictions/*.json",
        "found/coco_results.json",
        "found/coco_images.json",
        "found/overlays/*.png",
        "found/masks/*/*.png",
    ],
    "sam3-lite convert": ["sam3-lite-calibrated/model.safetensors"],
    "sam3-lite evaluate": ["scores/metrics.json", "scores/precision_recall.png", "scores/confusion.png"],
}


@dataclass(frozen=True)
class Block:
    """A code block: what it is in, its first line in the file (from 1), and the heading that it is under."""

    language: str
    text: str
    line: int
    section: str

    def commands(self) -> list[str]:
        """One for each command of a block of bash, without comments."""
        lines = re.sub(r"(^|\s)#.*", "", self.text, flags=re.M).replace("\\\n", " ").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip()]


def blocks_of(markdown: str) -> list[Block]:
    blocks = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, re.M | re.S):
        before = markdown[: match.start(2)]
        section = re.findall(r"^## (.*)", before, re.M)[-1]
        blocks.append(Block(match[1], match[2], before.count("\n") + 1, section))
    return blocks


TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in block.commands()]


def blocks_in(section: str, language: str) -> list[Block]:
    found = [block for block in BLOCKS if (block.section, block.language) == (section, language)]
    assert found, f"no block of {language} under '## {section}'"
    return found


def substituted(text: str) -> str:
    for old, new in SUBSTITUTIONS.items():
        text = text.replace(old, new)
    return text


def words_of(command: str) -> list[str]:
    """Program and arguments to execute for a command of the README."""
    words = shlex.split(substituted(command))
    strange = [word for word in words if re.search(r"[<>|;&$`*?]", word)]
    if words[0] not in PROGRAMS or strange:
        raise ValueError(f"this test does not know how to run `{command}`: say it in its tables")
    more = [flags for start, flags in ADDED.items() if command.startswith(start)]
    return [*words, *shlex.split(" ".join(more))]


class Workspace:
    """The current folder, which looks like that of the repository; what ran there once is not run again."""

    def __init__(self, folder: Path, hub: HubStandIn):
        self.folder, self.hub, self.done = folder, hub, set()
        for name in ("training", "sam3_hf"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: str):
        if command in NOT_RUN or command in self.done:
            return
        program, *arguments = words_of(command)
        PROGRAMS[program](arguments)
        self.done.add(command)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """With the model and the pictures of the demo, which the README starts with."""
    folder = tmp_path_factory.mktemp("readme")
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("HF_HOME", str(folder / "home"))  # without the user's settings of Accelerate
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        workspace = Workspace(folder, hub)
        for block in blocks_in("Two commands", "bash"):
            for command in block.commands():
                workspace.run(command)
        assert (folder / "outputs" / "demo" / "final" / "model.safetensors").is_file()
        yield workspace


def named(language: str):
    blocks = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", blocks, ids=[f"line {block.line}" for block in blocks])


@named("bash")
def test_commands(block, workspace):
    for command in block.commands():
        workspace.run(command)
        patterns = [pattern for start, names in WRITTEN.items() if command.startswith(start) for pattern in names]
        missing = [pattern for pattern in patterns if not list(workspace.folder.glob(pattern))]
        assert not missing, f"{command} did not write {missing}"


@named("python")
def test_python(block, workspace):
    code = "\n" * (block.line - 1) + substituted(block.text)  # tracebacks show the lines of the README
    exec(compile(code, README, "exec"), {"__name__": "__main__"})
    for folder in set(re.findall(r'\.save_pretrained\("(.+?)"\)', block.text)):
        Sam3LitePipeline.from_pretrained(folder)  # which takes model and processor


@named("yaml")
def test_category_maps(block, tmp_path):
    (tmp_path / "map.yaml").write_text(block.text, encoding="utf-8")
    assert read_category_map(tmp_path / "map.yaml", ["RBC", "WBC"]) == {
        "RBC": "red blood cell",
        "WBC": "white blood cell",
    }


@named("")
def test_what_a_run_writes(block, workspace):
    for command in (command for training in blocks_in(block.section, "bash") for command in training.commands()):
        workspace.run(command)
    folder, *lines = block.text.splitlines()
    names = [name for line in lines for name in re.split(r"\s{3,}", line.strip())[0].split(", ")]
    assert len(names) > 5
    for name in names:
        found = list((workspace.folder / folder).rglob(name.rstrip("/").replace("epoch_N", "epoch_*")))
        assert found, f"a run does not write {name}"


def test_nothing_is_left_out_and_every_entry_is_needed():
    assert len(re.findall(r"^\s*(?:```|~~~)", TEXT, re.M)) == 2 * len(BLOCKS), "a block that is not found as one"
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", ""}
    for command in COMMANDS:
        if command not in NOT_RUN:
            words_of(command)
    assert set(NOT_RUN) <= set(COMMANDS)
    run = [command for command in COMMANDS if command not in NOT_RUN]
    for start in (*ADDED, *WRITTEN):
        assert any(command.startswith(start) for command in run), f"no command starts with {start}"
    for text in SUBSTITUTIONS:
        assert any(text in block.text for block in BLOCKS), f"{text} does not occur"
    for program in PROGRAMS:
        assert any(command.split()[0] == program for command in run), f"{program} is not called"


@pytest.mark.parametrize(
    "command", ["conda install sam3-hf", "make all", "sam3-lite info a | less", "python x.py && ls"]
)
def test_a_command_that_is_not_known_fails(command):
    with pytest.raises(ValueError, match="does not know how to run"):
        words_of(command)


def test_what_make_stands_for():
    """The commands that the README gives for those of make: their words, in their order, among what make would run."""
    made = ""
    for target in [command for command in NOT_RUN if command.startswith("make ")]:
        shown = ["make", "--dry-run", "--always-make", "PYTHON=python", *target.split()[1:]]
        made += subprocess.run(shown, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [shlex.split(line) for line in made.replace(".venv/bin/", "").replace("\\\n", " ").splitlines()]
    _, block = blocks_in("Two commands", "bash")
    commands = [part for command in block.commands() for part in command.split(" && ")]
    commands.remove(". .venv/bin/activate")  # make calls the programs by their paths
    for command in commands:
        assert any(is_part_of(shlex.split(command), line) for line in lines), f"make does not run `{command}`"


def is_part_of(words: list[str], line: list[str]) -> bool:
    rest = iter(line)
    return all(word in rest for word in words)


def test_from_nothing_to_a_prediction_in_under_ten_lines(workspace, capsys):
    make, _ = blocks_in("Two commands", "bash")
    first = blocks_in("Find things in a picture", "python")[0]
    assert len([make.commands()[0], *first.text.strip().splitlines()]) < 10
    exec(first.text, {})
    assert re.search(r"^(striped square|blue circle) 0\.\d\d \[.*\] \d+ pixels$", capsys.readouterr().out, re.M)


def test_push_made_one_commit(workspace):
    (command,) = (command for block in blocks_in("Share it", "bash") for command in block.commands())
    workspace.run(command)
    (repository,) = workspace.hub.repositories.values()
    _, commit = repository.branches["main"]
    assert repository.private and {"model.safetensors", "config.json", "README.md", "example.png"} <= set(commit.files)
