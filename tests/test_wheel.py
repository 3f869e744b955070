"""What `pip install` gives: a wheel of this tree, from which a model trains where the repository is out of sight."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import micro_config

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds, for what takes some on an idle machine

CHECK = """
import json, sys
from pathlib import Path
import sam3_hf

package = Path(sam3_hf.__file__).parent
model = sam3_hf.Sam3LiteModel.from_pretrained(sys.argv[1])
standard = sam3_hf.Sam3LiteModel.from_pretrained(package / "assets" / "tiny-standard", preset="same")
print(json.dumps([str(package), model.config.image_size, len(standard.detr_decoder.layers)]))
"""


def run(command: list, cwd: Path, **variables: str) -> str:
    """What the command prints; it knows of this tree neither by its folder nor by PYTHONPATH."""
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**known, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed package and its commands in bin/."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building writes beside the sources
    shutil.copytree(ROOT / "sam3_hf", source / "sam3_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source], folder)
    (wheel,) = folder.glob("sam3_hf-*.whl")
    run([*pip, "install", "--no-index", "--no-deps", "--target", folder / "site", wheel], folder)
    return folder / "site"


def test_every_file_of_the_package_is_in_the_wheel(installed):
    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(installed / "sam3_hf") == files(ROOT / "sam3_hf")


@pytest.mark.slow
def test_a_model_trains_from_the_wheel(installed, tmp_path):
    sizes = {name: value for name, value in micro_config().to_dict().items() if name.endswith("_config")}
    settings = {"preset": "tiny", "model_overrides": sizes, "num_workers": 0, "prediction_images": 1}
    settings |= {"data": "generated", "generated_train": 4, "generated_valid": 1, "generated_concepts": 2}
    settings |= {"max_steps": 2, "batch_size": 2, "prompts_per_image": 2, "output_dir": "run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run([installed / "bin" / "sam3-lite", "train", "config.yaml"], tmp_path, PYTHONPATH=str(installed))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in metrics] == [("eval", 2)]
    found = run([sys.executable, "-c", CHECK, "run/final"], tmp_path, PYTHONPATH=str(installed))
    assert json.loads(found) == [str(installed / "sam3_hf"), 64, 6]
