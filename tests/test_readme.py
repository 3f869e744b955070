"""
Every code block of the README and of docs/, run as it is written there, in one folder; what differs is in the tables
below. And what the pages name: links, headings, files, rooms.
"""

import ast
import dataclasses
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
import transformers
import warm
from accelerate.commands.launch import launch_command_parser
from conftest import HUNG
from hub_stand_in import TOKEN, HubStandIn
from torchvision.transforms.functional import to_pil_image
from typer.main import get_command
from typer.testing import CliRunner
from video_cases import film, lite_config, stock_video_model

from sam3_hf import Sam3LitePipeline, Sam3LiteProcessor
from sam3_hf.cli import app
from sam3_hf.data import read_category_map
from sam3_hf.training.arguments import GROUPS

ROOT = Path(__file__).parents[1]
STANDARD = ROOT / "sam3_hf" / "assets" / "tiny-standard"
README_LINES = 150
README_SECTIONS = ["Two commands", "Find things", "Start from SAM 3", "Train", "Evaluate", "Share", "Links"]

# Replaced wherever they occur in code blocks: nothing can be downloaded here, and `lite` takes gigabytes.
SUBSTITUTIONS = {
    'Sam3LiteVideoModel.from_pretrained("facebook/sam3", preset="lite")': (
        'Sam3LiteVideoModel.from_pretrained("sam3-video", preset="same")'
    ),
    'Sam3VideoProcessor.from_pretrained("facebook/sam3")': 'Sam3VideoProcessor.from_pretrained("sam3-video")',
    "facebook/sam3": str(STANDARD),
    'preset="lite"': 'preset="tiny"',
    'preset="lite-plus"': 'preset="tiny-plus"',
    "path/to/images": "outputs/demo/data/valid",
    "path/to/dataset": "outputs/demo/data",
    "path/to/frames": "frames",
    "phrases.txt": str(ROOT / "training" / "configs" / "other_words.txt"),
}
# One step instead of a training run, of the smallest model.
ONE_STEP = "--preset tiny --max_steps 1 --save_every_epochs 1 --num_workers 0 --prediction_images 1"
# Added to commands that start so: the smallest sizes, and no more processes. Those of the checkpoint are kept in the
# demo, as a model of the preset tiny finds nothing before it is trained.
ADDED = {
    "accelerate launch --cpu --num_cpu_threads_per_process 1 training/train.py training/configs/demo.yaml": (
        "--preset tiny-standard --max_steps 1 --generated_train 4 --generated_valid 4 --generated_concepts 12"
        " --num_workers 0 --prediction_images 1"
    ),
    "accelerate launch training/train.py training/configs/lite_fp16.yaml": ONE_STEP,
    "sam3-lite train": ONE_STEP,
    "sam3-lite convert facebook/sam3 sam3-lite-calibrated": "--preset tiny --no-search-depth",
    "sam3-lite convert facebook/sam3 sam3-lite-fp16": "--preset tiny",
    "sam3-lite convert facebook/sam3 sam3-lite-words": (
        "--preset tiny-plus --text-hidden-size 16 --text-num-hidden-layers 1"
    ),
    "sam3-lite distill-text": "--steps 2",
    "sam3-lite label": "--workers 0",
    "sam3-lite predict": "--workers 0",
    "sam3-lite evaluate": "--workers 0",
    "sam3-lite compare": "--workers 0",
}
# Not run, and why; the tests named check them.
NOT_RUN = {
    "make demo": "installs, and trains for minutes: test_what_make_stands_for",
    "make test": "installs, and runs this test: test_what_make_stands_for",
    'python -m venv .venv && . .venv/bin/activate && pip install -e ".[train,dev]"': (
        "installs: test_what_make_stands_for"
    ),
    "OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal": "runs this test: test_what_make_stands_for",
    "sam3-lite demo outputs/demo/final --compare sam3_hf/assets/tiny-standard": (
        "serves until it is stopped: test_page.py, test_page_browser.py"
    ),
    'sam3-lite track clip.mp4 --model runs/final --prompt "red car" --output out': "needs a film: test_track_cli.py",
    "sam3-lite export outputs/demo/final deployed": "traces for minutes: test_exporting.py",
    "sam3-lite export outputs/demo/final deployed-int8 --precision int8 --calibration-images path/to/images"
    ' --calibration-prompt "red square"': "traces for minutes: test_exporting.py",
    "sam3-lite export outputs/demo/final deployed-fp16 --precision fp16": "traces for minutes: test_exporting.py",
    "sam3-lite export deployed deployed-openvino --format openvino": "needs what was not run: test_exporting.py",
    "trtexec --onnx=deployed-fp16/vision.onnx --fp16 --shapes=pixel_values:1x3x1008x1008 --saveEngine=vision.plan": (
        "needs TensorRT"
    ),
    "trtexec --onnx=deployed-fp16/detector.onnx --fp16 --saveEngine=detector.plan"
    " --minShapes=coarse:1x256x72x72,prompt:1x8x256,prompt_mask:1x8,image_index:1"
    " --optShapes=coarse:1x256x72x72,prompt:1x33x256,prompt_mask:1x33,image_index:1"
    " --maxShapes=coarse:1x256x72x72,prompt:8x33x256,prompt_mask:8x33,image_index:8": "needs TensorRT",
}


def sam3_lite(arguments: list[str]):
    if arguments[0] == "train":  # it takes over signals and the accelerator: in a process of its own
        in_a_process(["-c", "from sam3_hf.cli import app; app()", *arguments])
        return
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def python(arguments: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def accelerate(arguments: list[str]):
    """The launcher itself for the demo; what it would start for the other commands."""
    if "training/configs/demo.yaml" not in arguments:
        command, *options = arguments
        assert command == "launch"
        launched = launch_command_parser().parse_args(options)
        in_a_process([launched.training_script, *launched.training_script_args])
        return
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HUNG)
    assert finished.returncode == 0, finished.stdout


def in_a_process(arguments: list[str]):
    finished = warm.run(arguments, Path.cwd(), dict(os.environ), together=True)
    assert finished.returncode == 0, finished.stdout


# The programs that commands may call; none has to be on the PATH. Those that can run in this process: importing takes
# longer than they do.
PROGRAMS = {"sam3-lite": sam3_lite, "python": python, "accelerate": accelerate}

# What commands that start so leave behind, as the text around them says.
WRITTEN = {
    "python training/demo.py": ["outputs/demo/predictions/*/*.png", "outputs/demo/segmented.png"],
    "sam3-lite label": ["labelled/settings.json", "labelled/predictions/*.json", "labelled/*/_annotations.coco.json"],
    "sam3-lite predict path/to/images --model outputs/mine/final": ["found_parts/overlays/*.png"],
    "sam3-lite predict outputs/demo/data/valid": [
        "found/predictions/*.json",
        "found/coco_results.json",
        "found/coco_images.json",
        "found/overlays/*.png",
        "found/masks/*/*.png",
    ],
    "sam3-lite convert facebook/sam3 sam3-lite-calibrated": ["sam3-lite-calibrated/model.safetensors"],
    "sam3-lite convert outputs/demo/checkpoints/best bare": ["bare/model.safetensors"],
    "sam3-lite compare": ["compared/comparison.json"],
    "sam3-lite check": ["dataset.png"],
    "sam3-lite evaluate --model outputs/demo/final": [
        "scores/metrics.json",
        "scores/precision_recall.png",
        "scores/confusion.png",
    ],
    "sam3-lite evaluate --model outputs/mine/final": ["scores_mine/confusion.png", "scores_mine/precision_recall.png"],
}


@dataclass(frozen=True)
class Block:
    """A code block: what it is in, its page, its first line there (from 1), and the heading that it is under."""

    language: str
    text: str
    page: Path
    line: int
    section: str

    def commands(self) -> list[str]:
        """One for each command of a block of bash, without comments."""
        lines = re.sub(r"(^|\s)#.*", "", self.text, flags=re.M).replace("\\\n", " ").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip()]


@dataclass
class Page:
    """A Markdown file: all of it, its code blocks, what is left without them, and its headings."""

    path: Path
    text: str = field(init=False)
    blocks: list[Block] = field(init=False)
    prose: str = field(init=False)
    headings: list[str] = field(init=False)

    def __post_init__(self):
        self.text = self.path.read_text(encoding="utf-8")
        self.blocks = blocks_of(self.text, self.path)
        self.prose = FENCED.sub("", self.text)
        self.headings = re.findall(r"^#+ (.*)$", self.prose, re.M)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def anchors(self) -> set[str]:
        """What `#...` may be after the name of this page, as GitHub makes it of the headings."""
        plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in self.headings]
        slugs = [re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain]
        assert len(set(slugs)) == len(slugs), f"{self.name} has two headings of one name"
        return set(slugs)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks_of(markdown: str, page: Path) -> list[Block]:
    blocks = []
    for match in FENCED.finditer(markdown):
        before = markdown[: match.start(2)]
        section = re.findall(r"^## (.*)", FENCED.sub("", before), re.M)[-1]
        blocks.append(Block(match[1], match[2], page, before.count("\n") + 1, section))
    return blocks


README, *DOCS = PAGES = [Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = [block for page in PAGES for block in page.blocks]
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in block.commands()]
TRAINING = next(page for page in DOCS if page.path.stem == "training")


def blocks_in(page: Page, section: str, language: str) -> list[Block]:
    found = [block for block in page.blocks if (block.section, block.language) == (section, language)]
    assert found, f"no block of {language} in {page.name} under '## {section}'"
    return found


def substituted(text: str) -> str:
    for old, new in SUBSTITUTIONS.items():
        text = text.replace(old, new)
    return text


def words_of(command: str) -> list[str]:
    """Program and arguments to execute for a command of the pages."""
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
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the stand-in is on this machine
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "home" / "modules"))
        workspace = Workspace(folder, hub)
        for block in blocks_in(TRAINING, "Install", "bash")[:1]:
            for command in block.commands():
                workspace.run(command)
        assert (folder / "outputs" / "demo" / "final" / "model.safetensors").is_file()
        stock_video_model().save_pretrained(folder / "sam3-video")
        Sam3LiteProcessor.from_config(lite_config()).to_video().save_pretrained(folder / "sam3-video")
        (folder / "frames").mkdir()
        for number, frame in enumerate(film(3)):
            to_pil_image(frame).save(folder / "frames" / f"{number}.png")
        yield workspace


def named(language: str):
    blocks = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", blocks, ids=[f"{block.page.name} {block.line}" for block in blocks])


@named("bash")
def test_commands(block, workspace):
    for command in block.commands():
        workspace.run(command)
        patterns = [pattern for start, names in WRITTEN.items() if command.startswith(start) for pattern in names]
        missing = [pattern for pattern in patterns if not list(workspace.folder.glob(pattern))]
        assert not missing, f"{command} did not write {missing}"


@named("python")
def test_python(block, workspace):
    code = "\n" * (block.line - 1) + substituted(block.text)  # tracebacks show the lines of the page
    exec(compile(code, block.page, "exec"), {"__name__": "__main__"})
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
def test_what_a_command_writes(block, workspace):
    """A folder, and below it names with what they are: of the command that is given this folder as its output."""
    folder, *lines = block.text.splitlines()
    writers = [c for c in COMMANDS if re.search(rf"--output(_dir)? {re.escape(folder.rstrip('/'))}( |$)", c)]
    assert writers, f"no command writes {folder}"
    for command in writers:
        workspace.run(command)
    names = [name for line in lines for name in re.split(r"\s{3,}", line.strip())[0].split(", ")]
    assert len(names) >= 5
    for name in names:
        found = list((workspace.folder / folder).rglob(name.rstrip("/").replace("epoch_N", "epoch_*")))
        assert found, f"`{writers[0]}` does not write {name}"


def test_nothing_is_left_out_and_every_entry_is_needed():
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.text, re.M)
        assert len(fences) == 2 * len(page.blocks), f"{page.name} has a block that is not found as one"
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
    """The commands that the docs give for those of make: their words, in their order, among what make would run."""
    made = ""
    for target in [command for command in NOT_RUN if command.startswith("make ")]:
        shown = ["make", "--dry-run", "--always-make", "PYTHON=python", *target.split()[1:]]
        made += subprocess.run(shown, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [shlex.split(line) for line in made.replace(".venv/bin/", "").replace("\\\n", " ").splitlines()]
    block, *_ = blocks_in(TRAINING, "Install", "bash")
    commands = [part for command in block.commands() for part in command.split(" && ")]
    commands.remove(". .venv/bin/activate")  # make calls the programs by their paths
    for command in commands:
        assert any(is_part_of(shlex.split(command), line) for line in lines), f"make does not run `{command}`"


def is_part_of(words: list[str], line: list[str]) -> bool:
    rest = iter(line)
    return all(word in rest for word in words)


def test_from_nothing_to_a_prediction_in_under_ten_lines(workspace, capsys):
    (make,) = blocks_in(README, "Two commands", "bash")
    first = blocks_in(README, "Find things", "python")[0]
    assert len([make.commands()[0], *first.text.strip().splitlines()]) < 10
    exec(first.text, {})
    assert re.search(r"^(red square|ring) 0\.\d\d \[.*\] \d+ pixels$", capsys.readouterr().out, re.M)


def test_push_made_one_commit(workspace):
    (command,) = (command for block in blocks_in(README, "Share", "bash") for command in block.commands())
    workspace.run(command)
    (repository,) = workspace.hub.repositories.values()
    _, commit = repository.branches["main"]
    assert repository.private and {"model.safetensors", "config.json", "README.md", "example.png"} <= set(commit.files)


def test_the_readme_is_short_and_in_order():
    assert len(README.text.splitlines()) <= README_LINES
    assert re.findall(r"^## (.*)$", README.prose, re.M) == README_SECTIONS


def links_of(page: Page) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.prose)


def broken_links(page: Page) -> list[str]:
    """Those that do not lead to a file of the repository, or to a heading of it."""
    broken = []
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        if not (target.is_file() and target.is_relative_to(ROOT)) or (anchor and anchor not in Page(target).anchors()):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize(
    "link", ["none.md", "#nothing", "docs/mapping.md#nothing", "docs", "../outside.md", "http://example.org"]
)
def test_a_broken_link_is_seen(link):
    page = Page(README.path)
    page.prose = f"[here]({link}) and [there](docs/mapping.md#sizes)"
    assert broken_links(page) == [link]


def test_the_readme_links_to_every_page_of_the_docs():
    assert {page.name for page in DOCS} <= {link.partition("#")[0] for link in links_of(README)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    """In `code`, commands included: paths into the folders of the repository, and modules of the package."""
    code = " ".join([*re.findall(r"`([^`]+)`", page.prose), *(block.text for block in page.blocks)])
    folders = "sam3_hf|training|benchmarks|tests|docs|model_cards"
    paths = set(re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*", code))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"\bsam3_hf(?:\.[a-z_0-9]+)+", code))
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


def test_options_that_are_named_for_those_of_other_libraries_exist():
    """In the last columns of docs/coming_from.md but for the rows of those libraries, and in its prose."""
    page = next(page for page in DOCS if page.path.stem == "coming_from")
    others = ("| ultralytics ", "| RF-DETR ", "| Transformers", "| Meta's ")
    lines = [line for line in page.prose.splitlines() if not line.startswith(others)]
    ours = [line.rstrip(" |").rpartition("|")[2] for line in lines]
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z_-]*)", "\n".join(ours)))
    known = {f"--{item.name}" for group in GROUPS for item in dataclasses.fields(group)}
    known |= {
        option for command in get_command(app).commands.values() for one in command.params for option in one.opts
    }
    assert len(named) > 20 and named - known == set()


def rooms_by_row() -> dict[str, int]:
    """The row of each room and module in the first table of docs/architecture.md."""
    page = next(page for page in DOCS if page.path.stem == "architecture")
    table = re.search(r"^\| room .*?(?=\n\n)", page.text, re.M | re.S)[0]
    return {
        name.removesuffix(".py"): row
        for row, line in enumerate(table.splitlines()[2:])
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def room_of(module: str) -> str:
    return "*_sam3_lite" if module.endswith("_sam3_lite") else module


def test_the_table_of_rooms_is_that_of_the_package():
    """Every room has its row, and at import each row reaches for those above only."""
    package, rows, wrong = ROOT / "sam3_hf", rooms_by_row(), set()
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert rooms <= rows.keys()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        own = room_of(parts[0].removesuffix(".py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ImportFrom) or node.level != len(parts):
                continue
            for name in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                other = room_of(name)
                if other != own and rows[other] >= rows[own]:
                    wrong.add((own, other))
    assert wrong == set()
