"""`sam3-lite info`: what a model consists of, and what it costs to store and to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import model_errors
from ..exporting.folder import is_export
from ..exporting.info import export_info
from ..plain_text import aligned, plain
from ..precision_sam3_lite import precision_name
from ..sharing.adapter import adapter_info
from ..sharing.info import model_info
from .errors import one_line_errors


def info(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or Meta's .pt file.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = "main",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """
    Shows parts, parameters, bytes, FLOPs per image and per prompt, vocabulary and licence of a model; of an exported
    one, what its graphs take on disk; of an adapter, its model and where in it it stands.
    """
    with one_line_errors(), model_errors(model):
        text, facts = _facts(model, revision)
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else text(facts))


def _facts(model: str, revision: str) -> tuple[Callable[[dict], str], dict]:
    """What there is to say, and what makes text of it."""
    if is_export(model, revision=revision):
        return exported_as_text, export_info(model, revision=revision)
    if (adapter := adapter_info(model, revision=revision)) is not None:
        return adapter_as_text, adapter
    return as_text, model_info(model, revision=revision)


def as_text(facts: dict) -> str:
    """The facts of [`model_info`] as lines, with a table of the parts."""
    rows = [("part", "parameters", "MB", "GFLOP", "per")]
    for name, part in facts["parts"].items():
        flops = (f"{part['flops'] / 1e9:.2f}", part["per"]) if "flops" in part else ("", "")
        rows.append((name, f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.2f}", *flops))
    rows.append(("all", f"{facts['parameters']:,}", f"{facts['bytes'] / 1e6:.2f}", "", ""))
    return "\n".join(
        [
            *_head(facts, precision_name(facts["dtype"])),
            *_mapped(facts),
            "",
            *aligned(rows, left=(0, 4)),
            "",
            *_costs(facts),
        ]
    )


def exported_as_text(facts: dict) -> str:
    """The facts of [`export_info`] as lines, with a table of the graphs."""
    rows = [("graph", "MB"), *((name, f"{part['bytes'] / 1e6:.2f}") for name, part in facts["parts"].items())]
    rows.append(("all", f"{facts['bytes'] / 1e6:.2f}"))
    return "\n".join([*_head(facts, f"{facts['format']} in {facts['precision']}"), "", *aligned(rows)])


def adapter_as_text(facts: dict) -> str:
    """The facts of [`adapter_info`] as lines, with a table of the parts that it stands in."""
    rows = [("part", "layers", "parameters", "MB")]
    for name, part in (*facts["parts"].items(), ("all", facts)):
        layers = f"{part['layers']:,}" if "layers" in part else ""
        rows.append((name, layers, f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.2f}"))
    head = f"{facts['source']}: adapter of rank {facts['rank']}, alpha {facts['alpha']}, without its model"
    return "\n".join([head, f"model: {facts['base']}", "", *aligned(rows)])


def _head(facts: dict, stored: str) -> list[str]:
    sizes, vocabulary = facts["sizes"], facts["vocabulary"]
    preset = facts["preset"] or "sizes of its own"
    if facts["text_encoder"] not in (None, "standard"):
        preset += f" with text encoder {facts['text_encoder']}"
    return [
        f"{facts['source']}: {preset}, {stored}, licence {facts['license']}",
        f"ViT {sizes['vision_width']} x {sizes['vision_layers']} x {sizes['vision_heads']}, "
        f"DETR {sizes['detr_encoder_layers']} + {sizes['detr_decoder_layers']}, {sizes['queries']} queries, "
        f"images of {sizes['image_size']} px in patches of {sizes['patch_size']}",
        "vocabulary: any text" if vocabulary is None else f"vocabulary: {', '.join(map(plain, vocabulary))}",
    ]


def _mapped(facts: dict) -> list[str]:
    mapping = facts["mapping"]
    if mapping is None:
        return []
    totals = ", ".join(
        f"{total['tensors']} tensors {action} ({total['parameters']:,} parameters)"
        for action, total in mapping["totals"].items()
    )
    return [f"mapped from {mapping['source']} by {mapping['strategy']}: {totals}"]


def _costs(facts: dict) -> list[str]:
    first, further = facts["flops_per_image"], facts["flops_per_prompt"]
    lines = [
        f"an image with one prompt: {first / 1e9:.2f} GFLOP; each further prompt: {further / 1e9:.2f} GFLOP "
        f"({further / first:.1%})"
    ]
    if facts["vocabulary"] is not None:
        count = len(facts["vocabulary"])
        lines.append(f"an image with all {count} classes: {(first + (count - 1) * further) / 1e9:.2f} GFLOP")
    return lines
