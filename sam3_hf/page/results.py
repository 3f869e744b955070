"""What models found, as HTML: pictures with masks and boxes, a legend, a table, and downloads."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath

from PIL import Image

from ..plain_text import plain
from ..prediction.detections import Detections
from ..rle import mask_areas
from ..visualization import Colour, draw_instances, instance_colors, score_text
from .asking import Answer
from .pictures import as_url

MASKS, BOXES = "masks", "boxes"
LAYERS = [MASKS, BOXES]
_LINK_TO_IMAGE = "this.href = this.closest('figure').querySelector('img').src"


def show(answers: Sequence[Answer], threshold: float, layers: Sequence[str] = LAYERS) -> str:
    """
    The answers side by side, as HTML in which nothing of a name or phrase is markup.

    Args:
        threshold: shown are detections with a higher score, at least `LOWEST_SCORE`.
        layers: what of `LAYERS` is drawn.
    """
    return f'<div class="sam3-answers">{"".join(_figure(answer, threshold, layers) for answer in answers)}</div>'


def as_error(line: str) -> str:
    """What is wrong, as HTML."""
    return f'<p class="sam3-error" role="alert">{_text(line, 500)}</p>'


def draw(answer: Answer, threshold: float, layers: Sequence[str] = LAYERS) -> Image.Image:
    """The picture, up to 1280 pixels wide and high, with what was found in the colours of [`colours_of`]."""
    found, shown = answer.above(threshold), answer.picture.shown
    height, width = shown.shape[1:]
    colours = colours_of(found)
    kwargs = {"colors": [colours[label] for label in found.labels]}
    tags = {"labels": found.labels, "scores": found.scores.tolist(), "tag_labels": len(found.prompts) > 1}
    boxes, masks = (found if MASKS in layers else replace(found, rle=None)).scaled(width, height)
    canvas = Image.fromarray(shown.permute(1, 2, 0).numpy())
    if masks is None:
        return draw_instances(canvas, boxes, **kwargs, **tags) if BOXES in layers else draw_instances(canvas)
    if BOXES not in layers:
        return draw_instances(canvas, boxes, masks, **kwargs, **tags)
    canvas = draw_instances(canvas, boxes, masks, **kwargs, tag_labels=False)
    return draw_instances(canvas, boxes * (canvas.width / width), **kwargs, **tags)


def colours_of(found: Detections) -> dict[str, Colour]:
    """{phrase: its colour}, the same for any threshold and model."""
    return dict(zip(found.prompts, instance_colors(len(found.prompts)), strict=True))


def as_coco(answer: Answer, threshold: float) -> dict:
    """What was found as a COCO dataset of one image, a `score` beside each annotation."""
    found, picture = answer.above(threshold), answer.picture
    category_ids = {label: index for index, label in enumerate(found.prompts, 1)}
    annotations = []
    for index, entry in enumerate(found.to_coco(1, category_ids), 1):
        width, height = entry["bbox"][2:]
        area = float(mask_areas([entry["segmentation"]])[0]) if "segmentation" in entry else width * height
        annotations.append({"id": index, **entry, "area": area, "iscrowd": 0})
    height, width = found.size
    return {
        "info": {"description": f"found by {answer.model}, scores above {threshold:.2f}"},
        "images": [{"id": 1, "file_name": picture.name, "width": width, "height": height}],
        "categories": [{"id": index, "name": label} for label, index in category_ids.items()],
        "annotations": annotations,
    }


def _figure(answer: Answer, threshold: float, layers: Sequence[str]) -> str:
    name = _text(answer.model)
    if answer.found is None:
        return f"<figure><figcaption><b>{name}</b></figcaption>{as_error(answer.error)}</figure>"
    found = answer.above(threshold)
    file = re.sub(r"[^\w.-]+", "-", f"{PurePath(answer.picture.name).stem}-{answer.model}")
    coco = base64.b64encode(json.dumps(as_coco(answer, threshold)).encode()).decode()
    said = f"{len(found)} found in {_duration(answer.seconds)} ({_text(answer.computed)})"
    parts = [
        f"<figcaption><b>{name}</b><span>{said}</span></figcaption>",
        f'<img src="{as_url(draw(answer, threshold, layers))}" alt="{len(found)} found by {name}">',
        _legend(found),
        _table(found),
        "<nav>",
        # The picture is in the page already, and is not sent a second time.
        f'<a href="#" download="{file}.png" onclick="{_LINK_TO_IMAGE}">Download PNG</a>',
        f'<a href="data:application/json;base64,{coco}" download="{file}.json">Download COCO JSON</a>',
        "</nav>",
    ]
    return f"<figure>{''.join(parts)}</figure>"


def _legend(found: Detections) -> str:
    rows = []
    for label, colour in colours_of(found).items():
        count, best = found.labels.count(label), found.best.get(label)
        said = f"{count} found" if count else "none"
        said += "" if best is None else f", best score {score_text(best)}"
        rows.append(f"<li>{_swatch(colour)}<span>{_text(label)}</span><small>{said}</small></li>")
    return f'<ul class="sam3-legend">{"".join(rows)}</ul>'


def _table(found: Detections) -> str:
    if not len(found):
        return ""
    areas = [None] * len(found) if found.rle is None else mask_areas(found.rle).tolist()
    colours, rows = colours_of(found), []
    for label, score, box, area in zip(found.labels, found.scores.tolist(), found.boxes.tolist(), areas, strict=True):
        swatch = _swatch(colours[label])
        cells = [f"{swatch}{_text(label)}", f"{score:.2f}", " ".join(f"{side:.0f}" for side in box)]
        cells += [] if area is None else [f"{area:.0f}"]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ["phrase", "score", "left top right bottom", *(["pixels of the mask"] if found.rle is not None else [])]
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<details><summary>Scores and boxes</summary><table><tr>{head}</tr>{''.join(rows)}</table></details>"


def _swatch(colour: Colour) -> str:
    return f'<i style="background: rgb{colour}"></i>'


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _text(text: str, longest: int = 80) -> str:
    return escape(plain(text, longest))
