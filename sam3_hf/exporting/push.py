"""Pushing a folder of graphs to the Hub."""

from __future__ import annotations

import os

from huggingface_hub import CommitInfo

from ..sharing.hub import Kind, others_to_push, push_files
from ..sharing.model_card import CARD_FILE, folder_origin
from .card import export_card
from .folder import read_export

EXPORTED = Kind(("*.onnx", "*.onnx.data", "*.xml", "*.bin", "*.npz"), "config.json")


def push_export(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """
    Pushes a folder of `sam3-lite export` in one commit; its id is a model for [`Sam3LitePipeline`] then. A card or a
    copy of the licence that the folder lacks is made for the repository alone.

    Args:
        folder: holds the graphs.
        repo_id: `owner/name`; created if there is none.
        options: those of [`~sam3_hf.sharing.hub.push_files`].

    Raises:
        ValueError: the folder is damaged.
        OSError: files are missing or truncated.
        PushError: the Hub refused, or could not be reached.
    """
    export = read_export(folder)
    files = {*others_to_push(export.folder), *(export.folder / name for name in export.facts["files"])}
    has_card = export.folder / CARD_FILE in files
    card = None if has_card else str(export_card(export.facts, folder_origin(export.folder)))
    return push_files(export.folder, sorted(files), repo_id, EXPORTED, card, **options)
