"""Pushing a model to the Hub: one commit with all that it needs, and nothing that it does not."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..processing_sam3_lite import Sam3LiteProcessor
from ..sources_sam3_lite import ADAPTER_CONFIG, EXPORT_FILE, read_json
from .model_card import (
    CARD_FILE,
    LICENSE_FILE,
    PLACEHOLDER,
    SAM_LICENSE_TEXT,
    UNKNOWN,
    VIDEO_MODEL_TYPE,
    Origin,
    folder_origin,
    model_card,
    origin_of,
    versions,
    weight_files,
    write_card,
)

logger = logging.get_logger(__name__)

# Beside the weights, files of these kinds are pushed: configuration, reports, code, card and pictures. All else stays,
# as the state of an optimizer, checkpoints and weights in other formats do.
PUSHED = ("*.json", "*.jsonl", "*.py", "*.md", "*.txt", "*.png", "*.jpg", "*.jpeg", "LICENSE", "NOTICE")
MODEL_TYPES = ("sam3_lite", VIDEO_MODEL_TYPE)
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt")


class PushError(OSError):
    """A push that did not come to its commit; the message says why, and how to go on."""


class PushRefused(Exception):
    """What the Hub would do is not what was asked for."""


class Kind(NamedTuple):
    """
    A kind of folder that is pushed.

    Args:
        weights: patterns of names of its weights. Those of an earlier push that the folder does not have any more are
            deleted in the same commit.
        other: a file that tells a repository of another kind, which is left alone.
    """

    weights: tuple[str, ...]
    other: str


MODEL = Kind(("*.safetensors", "*.safetensors.index.json"), EXPORT_FILE)


def push_folder(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """
    Pushes a saved model in one commit. The folder is not changed: if it has no `README.md`, or no copy of the licence
    that its weights fall under, these are made for the repository alone.

    Args:
        folder: as `save_pretrained` or a training run (`final/`) writes it.
        repo_id: `owner/name`; created if there is none.
        options: those of [`push_files`].

    Raises:
        ValueError: the folder is no model that can be pushed.
        OSError: weights are missing in it.
        PushError: the Hub refused, or could not be reached.
    """
    folder = Path(folder)
    files = files_to_push(folder)
    card = None if folder / CARD_FILE in files else str(model_card(folder))
    return push_files(folder, files, repo_id, MODEL, card, **options)


def push_files(
    folder: Path,
    files: list[Path],
    repo_id: str,
    kind: Kind,
    card: str | None = None,
    *,
    private: bool = False,
    gated: Literal["auto", "manual"] | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Pushes files of a folder in one commit, with a copy of the licence that the weights fall under if it is not among
    them.

    Args:
        folder: says in the usual files where its weights come from.
        files: of the folder.
        repo_id: `owner/name`; created if there is none.
        kind: of the folder.
        card: content of `README.md`. Default: that of the folder, which is among the files.
        private: create the repository as a private one.
        gated: who wants the weights has to ask for them, with automatic or manual approval.
        revision: branch to commit to, created if there is none. Default: `main`.
        commit_message: of the commit.
        token: default: `HF_TOKEN`, or that of `hf auth login`.

    Raises:
        PushError: the Hub refused, or could not be reached; or the repository holds a model of another kind.
    """
    additions = [CommitOperationAdd(path.name, path) for path in files if path.name != CARD_FILE]
    card = card or (folder / CARD_FILE).read_text(encoding="utf-8")
    if folder_origin(folder).derived and folder / LICENSE_FILE not in files:
        additions.append(CommitOperationAdd(LICENSE_FILE, SAM_LICENSE_TEXT))
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise PushRefused(f"{repo_id} exists and is public: make it private in its settings, or push elsewhere")
        if gated is not None:
            api.update_repo_settings(repo_id, gated=gated)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        additions.append(CommitOperationAdd(CARD_FILE, card.replace(PLACEHOLDER, repo_id).encode()))
        there = api.list_repo_files(repo_id, revision=revision)
        if kind.other in there:
            raise PushRefused(f"{repo_id} holds a model of another kind ({kind.other}): push to another repository")
        return api.create_commit(
            repo_id,
            [*additions, *_stale(there, additions, kind)],
            commit_message=commit_message or "Upload model with sam3-hf",
            revision=revision,
            num_threads=1,  # the bars of several threads, and log lines written between them, break each other
        )
    except Exception as error:  # of several libraries, by version; all of them mean that there is no commit
        flags = {"--private": private, "--gated": gated, "--revision": revision}
        raise PushError(_failure(error, folder, repo_id, flags)) from error


def _stale(there: list[str], additions: list[CommitOperationAdd], kind: Kind) -> list[CommitOperationDelete]:
    """What is to be deleted of the files of a repository: weights that are not pushed again."""
    kept = {addition.path_in_repo for addition in additions}
    own = [name for name in there if "/" not in name and name not in kept]
    return [CommitOperationDelete(name) for name in own if any(fnmatch(name, pattern) for pattern in kind.weights)]


def files_to_push(folder: Path) -> list[Path]:
    """
    The files of a model folder that belong on the Hub.

    Raises:
        ValueError: it is no model folder; the message says what to push instead.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if any((folder / name).exists() for name in CHECKPOINT_FILES):
        raise ValueError(f"{folder} is a checkpoint to resume from, not a model: push the folder final/ of its run.")
    if not (folder / "config.json").is_file():
        if (folder / "final" / "config.json").is_file():
            raise ValueError(f"{folder} is the folder of a run: push {folder / 'final'}.")
        for adapter in (folder, folder / "final"):
            if (adapter / ADAPTER_CONFIG).is_file():
                raise ValueError(
                    f"{adapter} holds an adapter, and no model: push it with `hf upload OWNER/NAME {adapter}`, or run "
                    "the command that trained it again with --resume auto and --merge_adapter true for a whole one."
                )
        raise ValueError(f"{folder} is no model: it has no config.json.")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{folder} holds a model of type {model_type!r}: `sam3-lite convert` makes a lite one of it.")
    weights = weight_files(folder)
    rest = set(others_to_push(folder))
    if len(weights) == 1:
        rest.discard(folder / SAFE_WEIGHTS_INDEX_NAME)
    return sorted({*weights, *rest})


def others_to_push(folder: Path) -> list[Path]:
    """The files of a folder that go to the Hub beside its weights."""
    found = {path for pattern in PUSHED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.startswith("."))


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processor: ProcessorMixin | None = None,
    max_shard_size: int | str = "50GB",
    **kwargs,
) -> CommitInfo:
    """
    Pushes a model from memory, with its processor, mapping report and card, in one commit.

    Args:
        model: a [`Sam3LiteModel`] or [`Sam3LiteVideoModel`].
        processor: for a video model a [`Sam3VideoProcessor`]. Default: that of the model's configuration, with the
            tokenizer of what it was loaded from.
        max_shard_size: of the weight files, as in `save_pretrained`.
        kwargs: those of [`push_files`].

    Raises:
        PushError: the Hub refused, or could not be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (processor or _processor_of(model)).save_pretrained(folder)
        write_card(folder, {"origin": asdict(model_origin(model)), "versions": versions()})
        try:
            return push_folder(folder, repo_id, **kwargs)
        except PushError as error:
            reason = str(error).split("\n")[0]
            raise PushError(f"{reason}\nThe model is unchanged in memory: call push_to_hub again.") from error


def _processor_of(model: PreTrainedModel) -> ProcessorMixin:
    video = model.config.model_type == VIDEO_MODEL_TYPE
    config = model.config.detector_config if video else model.config
    if model.mapping_report is not None and model.mapping_report.text_source is not None:
        processor = Sam3LiteProcessor.of_origin(model.mapping_report.text_source, config)
    else:
        commit = getattr(model.config, "_commit_hash", None)  # of the Hub, if it was loaded from there
        processor = Sam3LiteProcessor.of_origin(model.name_or_path, config, **({"revision": commit} if commit else {}))
    return processor.to_video() if video else processor


def model_origin(model: PreTrainedModel) -> Origin:
    """
    Where the weights of a model in memory come from, as far as it and the folder that it was loaded from
    tell.
    """
    report = model.mapping_report
    if report is not None and not report.source_is_lite:
        return Origin(report.source, True, on_hub=not os.path.exists(report.source))
    if not model.name_or_path:
        return UNKNOWN
    try:
        return origin_of(model.name_or_path, report and report.text_source)
    except (OSError, ValueError) as error:
        logger.warning(f"It is not known where the weights come from, as {model.name_or_path} cannot be read: {error}")
        return UNKNOWN


def _failure(error: Exception, folder: Path, repo_id: str, flags: dict[str, bool | str | None]) -> str:
    """What went wrong, in a line, and the command to go on with, in another."""
    cause = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text = " ".join(str(cause).split())
    reason = text if isinstance(cause, PushRefused) else f"{type(cause).__name__}: {text}"
    if status == 401:
        reason = "no valid token: log in with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        reason = f"the token may not write to {repo_id}: use one with write access, or another repository"
    elif status is not None:
        reason = f"the Hub answered {status}: {text}"
    given = "".join(f" {flag}" if value is True else f" {flag} {value}" for flag, value in flags.items() if value)
    return (
        f"{folder} was not pushed to {repo_id}: {reason}\n"
        "The folder is as it was; files that the Hub has already are not sent again. To go on: "
        f"sam3-lite push {folder} {repo_id}{given}"
    )
