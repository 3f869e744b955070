"""A folder with the graphs of a model: what its JSON says, and whether all is there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..configuration_sam3_lite import Sam3LiteConfig
from ..limits_sam3_lite import read_config
from ..sources_sam3_lite import read_json

EXPORT_FILE = "sam3_lite_export.json"
VOCABULARY_FILE = "vocabulary.npz"
LAYOUT = 1  # of the folder; readers refuse a later one
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True)
class Export:
    """
    What an exported folder holds.

    Args:
        folder: where it is.
        facts: the content of its JSON.
        config: of the model.
    """

    folder: Path
    facts: dict
    config: Sam3LiteConfig

    @property
    def format(self) -> str:
        return self.facts["format"]

    @property
    def precision(self) -> str:
        return self.facts["precision"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over those of all files."""
        return hashlib.sha256(json.dumps(self.facts["files"], sort_keys=True).encode()).hexdigest()

    def graph(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIXES[self.format]}"


def is_export(source: str | os.PathLike) -> bool:
    """
    Whether a source is a folder of graphs.

    Raises:
        ValueError: it holds graphs that this package did not write.
    """
    folder = Path(source)
    if (folder / EXPORT_FILE).is_file():
        return True
    if folder.is_dir() and not (folder / "config.json").exists():
        graphs = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES.values())
        if graphs:
            raise ValueError(
                f"{folder} holds {graphs[0]} and no {EXPORT_FILE}: it is half copied, or of another program; write it "
                "with `sam3-lite export`."
            )
    return False


def read_export(source: str | os.PathLike) -> Export:
    """
    Reads the JSON of a folder of graphs, and looks whether its files are there and whole.

    Raises:
        ValueError: the JSON lacks something, or is of a later layout.
        OSError: a file is missing or truncated.
    """
    folder = Path(source)
    path = folder / EXPORT_FILE
    facts = read_json(path)
    missing = [key for key in ("layout", "format", "precision", "graphs", "files", "config") if key not in facts]
    if missing:
        raise ValueError(f"{path} lacks `{missing[0]}`: export the model again.")
    if facts["layout"] != LAYOUT:
        raise ValueError(f"{path} has layout {facts['layout']}, this version of sam3-hf reads {LAYOUT}: update it.")
    if facts["format"] not in SUFFIXES:
        raise ValueError(f"{path}: `format` {facts['format']!r} is none of {', '.join(SUFFIXES)}: export again.")
    config = read_config(Sam3LiteConfig.from_dict, facts["config"], path)
    export = Export(folder, facts, config)
    expected = {export.graph(name).name for name in facts["graphs"]}
    if config.vocabulary is not None:
        expected.add(VOCABULARY_FILE)
    for name in sorted(expected | set(facts["files"])):
        _check_file(folder / name, facts["files"].get(name))
    return export


def _check_file(path: Path, recorded: dict | None) -> None:
    if recorded is None:
        raise ValueError(f"{path.parent / EXPORT_FILE} does not know {path.name}: export the model again.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the folder is half copied: copy it again, or export again")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise OSError(f"{path} has {size} of {recorded['bytes']} bytes: copy the folder again, or export again")


def record_files(folder: Path) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} of what a runtime reads in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found
