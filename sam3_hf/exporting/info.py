"""What an exported folder is and costs to store."""

from __future__ import annotations

import os

from ..sharing.sizes import preset_of, text_encoder_of
from .folder import VOCABULARY_FILE, describe_export


def export_info(source: str | os.PathLike, **hub_arguments) -> dict:
    """
    Args:
        source: a folder of `sam3-lite export`, or a repository of the Hub with its content.
        hub_arguments: `revision`, `token`, ... as in `from_pretrained`.

    Returns:
        A dict that `json` can write: `source`, `license`, `preset`, `text_encoder`, `vocabulary` and `sizes` as in
        [`model_info`]; `format`, `precision` and `versions`; `parts`: for each graph, and a stored vocabulary, its
        `bytes`; and `bytes`, their sum.

    Raises:
        ValueError: the folder is damaged.
        OSError: files are missing or truncated.
    """
    export = describe_export(source, **hub_arguments)
    sizes = {name: file["bytes"] for name, file in export.facts["files"].items()}
    parts = {
        name: {"bytes": sum(size for file, size in sizes.items() if file.split(".")[0] == name)}
        for name in export.facts["graphs"]
    }
    if VOCABULARY_FILE in sizes:
        parts["vocabulary"] = {"bytes": sizes[VOCABULARY_FILE]}
    return {
        "source": os.fspath(source),
        "license": export.facts["license"],
        "preset": preset_of(export.config),
        "text_encoder": text_encoder_of(export.config),
        "format": export.format,
        "precision": export.precision,
        "versions": export.facts["versions"],
        "vocabulary": export.config.vocabulary,
        "sizes": export.facts["sizes"],
        "parts": parts,
        "bytes": sum(sizes.values()),
    }
