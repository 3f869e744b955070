"""A folder or repository with the graphs of a model: what its JSON says, and whether all is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file, extract_commit_hash

from ..configuration_sam3_lite import Sam3LiteConfig
from ..limits_sam3_lite import read_config
from ..sources_sam3_lite import EXPORT_FILE, read_json

VOCABULARY_FILE = "vocabulary.npz"
LAYOUT = 1  # of the folder; readers refuse a later one
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


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


def is_export(source: str | os.PathLike, **hub_arguments) -> bool:
    """
    Whether a source is a folder of graphs, or a repository of the Hub with some.

    Args:
        hub_arguments: `revision`, `token`, ... as in `from_pretrained`.

    Raises:
        ValueError: it is a folder with graphs that this package did not write.
    """
    return _find_json(source, hub_arguments) is not None


def _find_json(source: str | os.PathLike, hub_arguments: dict) -> Path | None:
    """The JSON of a folder or repository of graphs; None where there is none, or no such source."""
    folder = Path(source)
    if not folder.exists():
        return _find_on_hub(os.fspath(source), hub_arguments)
    if (folder / EXPORT_FILE).is_file():
        return folder / EXPORT_FILE
    if folder.is_dir() and not (folder / "config.json").exists():
        graphs = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES.values())
        if graphs:
            raise ValueError(
                f"{folder} holds {graphs[0]} and no {EXPORT_FILE}: it is half copied, or of another program; write it "
                "with `sam3-lite export`."
            )
    return None


def _find_on_hub(source: str, hub_arguments: dict) -> Path | None:
    try:
        path = cached_file(source, EXPORT_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    except (OSError, ValueError):  # no such repository, no access, no network: the loader of other models says which
        return None
    return None if path is None else Path(path)


def fetch_export(source: str | os.PathLike, also: Sequence[str] = (), **hub_arguments) -> Path:
    """
    A folder of graphs: the source, or where the files of a repository are kept, which are downloaded as far as they
    are not there.

    Args:
        source: of which `is_export` is true.
        also: names of files that are wanted beside the graphs and the tokenizer, if they are there.
        hub_arguments: `revision`, `token`, ... as in `from_pretrained`.

    Raises:
        ValueError, OSError: as `read_export`; or the repository lacks a file, or cannot be reached.
    """
    folder = Path(source)
    if folder.exists():
        return folder
    path = _find_json(source, hub_arguments)
    # All of one commit, whatever is pushed meanwhile.
    arguments = hub_arguments | {"revision": extract_commit_hash(str(path), None)}
    for name in _read(path).facts["files"]:
        cached_file(source, name, **arguments)
    for name in (*_TOKENIZER, *also):
        cached_file(source, name, _raise_exceptions_for_missing_entries=False, **arguments)
    return path.parent


def read_export(source: str | os.PathLike) -> Export:
    """
    Reads the JSON of a folder of graphs, and looks whether its files are there and whole.

    Raises:
        ValueError: the JSON lacks something, or is of a later layout.
        OSError: a file is missing or truncated.
    """
    export = _read(Path(source) / EXPORT_FILE)
    for name in export.facts["files"]:
        _check_file(export.folder / name, export.facts["files"][name]["bytes"])
    return export


def describe_export(source: str | os.PathLike, **hub_arguments) -> Export:
    """As `read_export`; of a repository the JSON alone is read, and no graph downloaded."""
    if os.path.exists(source):
        return read_export(source)
    return _read(_find_json(source, hub_arguments))


def _read(path: Path) -> Export:
    facts = read_json(path)
    missing = [key for key in ("layout", "format", "precision", "graphs", "files", "config") if key not in facts]
    if missing:
        raise ValueError(f"{path} lacks `{missing[0]}`: export the model again.")
    if facts["layout"] != LAYOUT:
        raise ValueError(f"{path} has layout {facts['layout']}, this version of sam3-hf reads {LAYOUT}: update it.")
    if facts["format"] not in SUFFIXES:
        raise ValueError(f"{path}: `format` {facts['format']!r} is none of {', '.join(SUFFIXES)}: export again.")
    config = read_config(Sam3LiteConfig.from_dict, facts["config"], path)
    export = Export(path.parent, facts, config)
    expected = {export.graph(name).name for name in facts["graphs"]}
    if config.vocabulary is not None:
        expected.add(VOCABULARY_FILE)
    unknown = sorted(expected - set(facts["files"]))
    if unknown:
        raise ValueError(f"{path} does not know {unknown[0]}: export the model again.")
    return export


def _check_file(path: Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the folder is half copied: copy it again, or export again")
    size = path.stat().st_size
    if size != expected:
        raise OSError(f"{path} has {size} of {expected} bytes: copy the folder again, or export again")


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
