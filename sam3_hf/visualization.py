"""Pictures for people: instances drawn over an image, prediction beside ground truth, training curves."""

import colorsys
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torchvision.ops import box_iou

from .plain_text import plain

LONGEST_SIDE = (512, 1280)  # drawings are scaled into this range of pixels: labels need room, files should stay small
CROWDED = 30  # more instances are drawn without tags, which would hide them
LEAST_CROWDED_SIDE = 1024  # pixels of the longest side of such drawings: their instances are small
STROKE_SHARE = 1 / 12  # of the shorter side of an instance that its outline takes at most: small things stay visible
FILL_OPACITY = 0.15  # shows which pixels are meant, and leaves them the colour that a phrase may name
LOWEST_SHARED_IOU = 0.5  # of the boxes of a prediction and a true object that are drawn in one colour
PALETTE = ("#f5b700", "#00a1e4", "#dc0073", "#5dd400", "#8f5bd6", "#ff7a33", "#00c2a8", "#3b4cca")
FIELDS = ("boxes", "masks", "labels", "scores")
LEAST_LEGEND_WIDTH = 360  # pixels: a narrow picture is not wide enough for what is written below it
PAPER, INK, FAINT_INK = (255, 255, 255), (34, 38, 46), (110, 116, 128)

Colour = tuple[int, int, int]


def instance_colors(count: int) -> list[Colour]:
    """Different colors, RGB in 0 to 255, for instances by their index; the first ones are the same for any count."""
    return [instance_color(index) for index in range(count)]


def instance_color(index: int) -> Colour:
    """The color of one of them."""
    if index < len(PALETTE):
        red, green, blue = (int(PALETTE[index][start : start + 2], 16) for start in (1, 3, 5))
    else:  # steps of the golden ratio keep hues apart however many follow
        shade = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 - 0.25 * (index % 2), 0.9)
        red, green, blue = (round(255 * channel) for channel in shade)
    return red, green, blue


def drawing_colors(labels: Sequence[str]) -> list[Colour]:
    """Of each instance its own; where they are too many to be tagged, and of several concepts, of each concept one."""
    concepts = list(dict.fromkeys(labels))
    if len(labels) <= CROWDED or len(concepts) == 1:
        return instance_colors(len(labels))
    of_concept = dict(zip(concepts, instance_colors(len(concepts)), strict=True))
    return [of_concept[label] for label in labels]


def draw_instances(
    image: Image.Image | np.ndarray,
    boxes=None,
    masks=None,
    labels: Sequence[str] | None = None,
    scores=None,
    *,
    colors: Sequence[Colour] | None = None,
    tag_labels: bool = True,
    crowded: bool | None = None,
) -> Image.Image:
    """Outlines instances in an image, each in a colour of its own and with a tag, and tints their masks a little.

    Small images are enlarged and large ones reduced, so that the longest side is between 512 and 1280 pixels. More
    than 30 instances have no tags, and their image is enlarged to 1024 pixels. Small ones have thinner outlines.

    Args:
        image: PIL image, or (height, width, 3) uint8.
        boxes: (n, 4) xyxy in pixels of `image`. Drawn for instances without a mask; the tags of all are beside them.
            Default: the bounds of the masks.
        masks: (n, height, width) bool or 0/1 at the size of `image`; None draws boxes alone.
        labels: n concepts; default "object". Shown on one line, as far as there is room.
        scores: (n,) in [0, 1]; None leaves them out.
        colors: n times RGB; default: `drawing_colors`.
        tag_labels: False leaves the concept out of the tags, for pictures that say it elsewhere.
        crowded: draw as of more than 30 instances; default: where there are more.

    Raises:
        ValueError: lengths differ, or masks are not of the image's size.
    """
    image = _as_image(image)
    boxes, masks, labels, scores = _check_instances(image, boxes, masks, labels, scores)
    colors = colors or drawing_colors(labels)
    crowded = len(labels) > CROWDED if crowded is None else crowded
    scale = _scale_of(image, crowded)
    canvas = _resize(image, scale)
    stroke = max(3, round(max(canvas.size) / 320))

    areas = masks.sum(axis=(1, 2)) if masks is not None else np.zeros(len(labels))
    order = np.argsort(-areas, kind="stable")  # small ones last: on top
    for index in order:
        width, height = (boxes[index, 2:] - boxes[index, :2]) * scale
        thin = max(1, min(stroke, round(min(width, height) * STROKE_SHARE)))
        if areas[index]:
            _draw_mask(canvas, masks[index], colors[index], thin)
        else:
            _draw_box(ImageDraw.Draw(canvas), boxes[index] * scale, colors[index], thin)
    if crowded:
        return canvas
    draw = ImageDraw.Draw(canvas)
    taken = []
    for index in order:
        words = [plain(labels[index])] if tag_labels else []
        words += [f"{scores[index]:.2f}"] if scores is not None else []
        if words:
            others = np.delete(boxes, index, axis=0) * scale
            _draw_tag(draw, canvas.size, boxes[index] * scale, " ".join(words), colors[index], taken, others)
    return canvas


def side_by_side(
    image: Image.Image | np.ndarray,
    prediction: Mapping,
    ground_truth: Mapping,
    title: str = "",
    names: tuple[str, str] = ("Prediction", "Ground truth"),
    counted: tuple[str, str] = ("predicted", "true"),
) -> Image.Image:
    """Prediction at the left, ground truth at the right, and below how many there are of each concept.

    A true object has the colour of the prediction that covers it, if there is one. Tags name the concepts if there are
    several; where there are more than 30 objects, each concept has one colour instead.

    Args:
        image: PIL image, or (height, width, 3) uint8.
        prediction, ground_truth: dicts of `boxes`, `masks`, `labels`, `scores`, each as in `draw_instances`.
            Each may have `best`: {concept: its highest score}, shown where there is nothing of it.
        title: a line above, as the file name.
        names, counted: what else stands above the two, and in the counts, where they are two predictions.
    """
    image = _as_image(image)
    both = (prediction, ground_truth)
    shown = sorted({*(prediction.get("labels") or ()), *(ground_truth.get("labels") or ())})
    crowded = max(len(instances.get("labels") or ()) for instances in both) > CROWDED
    by_concept = dict(zip(shown, instance_colors(len(shown)), strict=True)) if crowded and len(shown) > 1 else {}
    if by_concept:
        shared = [[by_concept[label] for label in instances.get("labels") or ()] for instances in both]
    else:
        shared = _shared_colors(image, prediction, ground_truth)
    halves = [
        draw_instances(
            image,
            *(instances.get(field) for field in FIELDS),
            colors=colors,
            tag_labels=len(shown) > 1,
            crowded=crowded,
        )
        for instances, colors in zip(both, shared, strict=True)
    ]
    width, height = halves[0].size
    margin, text_height = 16, 20
    title_height = 34 if title else 0
    counts = [(_counted(both, concept, counted), [by_concept[concept]] if by_concept else []) for concept in shown]
    legend = _Legend(counts or [(_nothing(prediction), [])], 2 * width + margin)
    top = margin + title_height + 32
    panel = Image.new("RGB", (2 * width + 3 * margin, top + height + margin + legend.height + margin // 2), PAPER)
    draw = ImageDraw.Draw(panel)
    if title:
        draw.text((margin, margin - 2), _fit(plain(title, 400), 2 * width, 22), font=_font(22), fill=INK)
    for name, half, left in zip(names, halves, (margin, width + 2 * margin), strict=True):
        name = _fit(plain(name, 400), width, text_height)
        draw.text((left, margin + title_height), name, font=_font(text_height), fill=INK)
        panel.paste(half, (left, top))
    legend.draw(draw, margin, top + height + margin, FAINT_INK)
    return panel


def with_legend(drawing: Image.Image, entries: Sequence[tuple[str, Sequence[Colour]]]) -> Image.Image:
    """A drawing above its legend: texts, each after patches of the colours that it explains, if any."""
    margin = 12
    width = max(drawing.width, LEAST_LEGEND_WIDTH)
    legend = _Legend(entries, width - 2 * margin)
    sheet = Image.new("RGB", (width, drawing.height + legend.height + margin), PAPER)
    sheet.paste(drawing, (0, 0))
    legend.draw(ImageDraw.Draw(sheet), margin, drawing.height + margin // 2)
    return sheet


def contact_sheet(
    pictures: Sequence[Image.Image], titles: Sequence[str], legend: Mapping[str, Colour], columns: int = 4
) -> Image.Image:
    """Pictures of any sizes in a grid, each under its title, above a legend {text: colour}."""
    margin, tile, title_height = 16, 384, 24
    columns = max(min(columns, len(pictures)), 1)
    width = columns * (tile + margin) + margin
    explained = _Legend([(text, [color]) for text, color in legend.items()], width - 2 * margin)
    small = [_within(picture.convert("RGB"), tile) for picture in pictures]
    row_height = title_height + max((picture.height for picture in small), default=0) + margin
    top = -(-len(pictures) // columns) * row_height + margin
    sheet = Image.new("RGB", (width, top + (explained.height + margin if legend else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, title) in enumerate(zip(small, titles, strict=True)):
        left = margin + number % columns * (tile + margin)
        above = margin + number // columns * row_height
        draw.text((left, above), _fit(plain(title, 400), tile, 16), font=_font(16), fill=INK)
        sheet.paste(picture, (left, above + title_height))
    explained.draw(draw, margin, top)
    return sheet


def _within(picture: Image.Image, side: int) -> Image.Image:
    """The picture itself, or a smaller one whose sides are at most so many pixels."""
    return ImageOps.contain(picture, (min(picture.width, side), min(picture.height, side)), Image.Resampling.LANCZOS)


def plot_curves(metrics_jsonl: str | Path, out_png: str | Path) -> Path:
    """Draws the curves of a training run: losses, scores and learning rates by step.

    Args:
        metrics_jsonl: one JSON object a line with `kind` ("train", ...), `step` and numbers. Drawn are `loss` of
            every kind; AP, AP50, cgF1 and IL_MCC, by the names that `CocoAP` and `CGF1` give them; `lr` and all that
            starts with `lr_`. Panels without numbers are left out.
        out_png: the picture to write.

    Raises:
        ValueError: the file has no such number.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {name: series for name, series in _read_series(Path(metrics_jsonl)).items() if series}
    if not panels:
        raise ValueError(f"{metrics_jsonl}: no loss, score or learning rate in it; was it written by a training run?")
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (name, series) in zip(axes[0], panels.items(), strict=True):
        for index, (label, points) in enumerate(sorted(series.items())):
            steps, values = np.array(sorted(points.items()), dtype=float).T
            color = PALETTE[(index + 1) % len(PALETTE)]
            noisy = name == "Loss" and len(steps) > 60
            line = {"color": color, "linewidth": 1.8, "marker": "o" if len(steps) < 40 else None, "markersize": 4}
            if noisy:
                axis.plot(steps, values, color=color, alpha=0.3)
            axis.plot(steps, _smooth(values) if noisy else values, label=label, **line)
        axis.set_title(name, loc="left", fontsize=12)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
        if name == "Scores":
            axis.set_ylim(min(0, axis.get_ylim()[0]), 1)
        elif name == "Learning rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(out_png, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return Path(out_png)


def _read_series(path: Path) -> dict[str, dict[str, dict[int, float]]]:
    """{panel: {label: {step: value}}}; a step written twice keeps the later value."""
    panels = {"Loss": {}, "Scores": {}, "Learning rate": {}}
    figures = ("AP", "AP50", "cgF1")
    scores = {f"{iou_type}_{figure}": f"{iou_type} {figure}" for iou_type in ("bbox", "segm") for figure in figures}
    scores["IL_MCC"] = "presence MCC"
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if not isinstance(value, (int, float)):
                continue
            if name == "loss":
                panel, label = "Loss", record.get("kind", "loss")
            elif name in scores:
                panel, label = "Scores", scores[name]
            elif name == "lr" or name.startswith("lr_"):
                panel, label = "Learning rate", name
            else:
                continue
            panels[panel].setdefault(label, {})[record["step"]] = value
    return panels


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a thirtieth of the run, narrower towards the ends."""
    half = max(1, len(values) // 60)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _as_image(image) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")


def _as_array(values) -> np.ndarray | None:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return None if values is None else np.asarray(values)


def _check_instances(image: Image.Image, boxes, masks, labels, scores):
    """As `draw_instances` takes them; boxes and labels are complete, masks and scores None or complete."""
    boxes, masks, scores = _as_array(boxes), _as_array(masks), _as_array(scores)
    given = {"boxes": boxes, "masks": masks, "labels": labels, "scores": scores}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"boxes, masks, labels and scores must be equally many, got {counts}")
    count = next(iter(counts.values()), 0)
    if masks is not None and count and masks.shape[1:] != (image.height, image.width):
        raise ValueError(f"masks of {masks.shape[1:]} on an image of {(image.height, image.width)} (height, width)")
    masks = masks.astype(bool) if masks is not None and count else None
    if boxes is None:
        boxes = np.array([_bounds(mask) for mask in masks] if masks is not None else [])
    labels = [str(label) for label in labels] if labels is not None else ["object"] * count
    return boxes.astype(float).reshape(-1, 4), masks, labels, scores


def _scale_of(image: Image.Image, crowded: bool) -> float:
    longest = max(image.size)
    return min(max(longest, LEAST_CROWDED_SIDE if crowded else LONGEST_SIDE[0]), LONGEST_SIDE[1]) / longest


def _resize(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _draw_mask(canvas: Image.Image, mask: np.ndarray, color: Colour, stroke: int) -> None:
    size, scales = mask.shape[::-1], (canvas.width / mask.shape[1], canvas.height / mask.shape[0])
    bounds = _bounds(mask)
    # Only what is around the mask is enlarged: three of its pixels are as far as the filters below reach.
    start = [math.floor(max(side - 3, 0) * scale) for side, scale in zip(bounds[:2], scales, strict=True)]
    end = [
        min(math.ceil(min(side + 3, most) * scale), whole)
        for side, most, scale, whole in zip(bounds[2:], size, scales, canvas.size, strict=True)
    ]
    box = [side / scale for side, scale in zip([*start, *end], scales * 2, strict=True)]
    soft = Image.fromarray(mask.astype(np.uint8) * 255)
    soft = soft.resize((end[0] - start[0], end[1] - start[1]), Image.Resampling.BILINEAR, box)
    if scales[0] > 1:  # rounds off the steps of enlarged pixels
        soft = soft.filter(ImageFilter.GaussianBlur(0.6 * scales[0]))
    inside = soft.point(lambda value: 255 if value >= 128 else 0)
    if inside.getbbox() is None:
        return
    left, top, right, bottom = inside.getbbox()
    frame = (left - stroke, top - stroke, right + stroke, bottom + stroke)
    inside = inside.crop(frame)
    halo = inside.filter(ImageFilter.MaxFilter(3))
    core = inside.filter(ImageFilter.MinFilter(2 * stroke + 1))
    frame = (frame[0] + start[0], frame[1] + start[1], frame[2] + start[0], frame[3] + start[1])
    canvas.paste(PAPER, frame, ImageChops.subtract(halo, inside))
    canvas.paste(color, frame, inside.point(lambda value: round(value * FILL_OPACITY)))
    canvas.paste(color, frame, ImageChops.subtract(inside, core))


def _draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Colour, stroke: int) -> None:
    left, top, right, bottom = (round(float(side)) for side in box)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PAPER, width=1)
    draw.rectangle((left, top, right, bottom), outline=color, width=stroke)


def _draw_tag(draw, size: tuple[int, int], box: np.ndarray, text: str, color, taken: list, others: np.ndarray) -> None:
    """
    Writes at the first place by the box that is free of tags and other boxes: above it, below it, inside it, or beside
    it. Or where the fewest are hidden.
    """
    height = max(18, round(max(size) / 48))
    font = _font(round(height * 0.74))
    while len(text) > 1 and font.getlength(text) > size[0] - height:
        text = text[:-2] + "…"
    width = round(draw.textlength(text, font=font)) + height // 2
    left, top, right, bottom = (float(side) for side in box)
    positions = [
        (left, top - height),
        (left, bottom),
        (left, top),
        (right - width, bottom - height),
        (right, top),
        (left - width, top),
        (right - width, top - height),
        (right - width, bottom),
    ]
    positions = [
        (min(max(round(x), 0), max(size[0] - width, 0)), min(max(round(y), 0), max(size[1] - height, 0)))
        for x, y in positions
    ]
    tags = [(x, y, x + width, y + height) for x, y in positions]
    hidden = [
        2 * sum(_overlap(tag, other) for other in taken) + sum(_overlap(tag, one) for one in others) for tag in tags
    ]
    tag = tags[int(np.argmin(hidden))]
    taken.append(tag)
    draw.rounded_rectangle(tag, height // 5, fill=color, outline=INK)
    light = color[0] * 0.299 + color[1] * 0.587 + color[2] * 0.114 > 140
    middle = ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2)
    draw.text(middle, text, font=font, fill=INK if light else PAPER, anchor="mm")


def _overlap(first: tuple, second: tuple) -> int:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _shared_colors(image: Image.Image, prediction: Mapping, ground_truth: Mapping) -> tuple[list[Colour], ...]:
    """Colours of predicted and of true instances: one where they are of one concept and their boxes overlap."""
    (found, _, found_labels, _), (true, _, true_labels, _) = (
        _check_instances(image, *(instances.get(field) for field in FIELDS))
        for instances in (prediction, ground_truth)
    )
    colors = instance_colors(len(found_labels) + len(true_labels))
    free, of_true = set(range(len(found_labels))), []
    overlaps = box_iou(torch.as_tensor(true), torch.as_tensor(found))
    for index, label in enumerate(true_labels):
        same = [position for position in free if found_labels[position] == label]
        best = max(same, key=lambda position: overlaps[index, position], default=None)
        shares = best is not None and overlaps[index, best] >= LOWEST_SHARED_IOU
        of_true.append(colors[best if shares else len(found_labels) + index])
        free -= {best} if shares else set()
    return colors[: len(found_labels)], of_true


def _count(instances: Mapping, concept: str) -> int:
    return list(instances.get("labels") or ()).count(concept)


def _counted(both: tuple[Mapping, Mapping], concept: str, counted: tuple[str, str]) -> str:
    parts = []
    for instances, what in zip(both, counted, strict=True):
        found, best = _count(instances, concept), instances.get("best", {}).get(concept)
        note = f" (best score {score_text(best)})" if not found and best is not None else ""
        parts.append(f"{found} {what}{note}")
    return f"{plain(concept)}: {', '.join(parts)}"


def _nothing(prediction: Mapping) -> str:
    best = prediction.get("best") or {}
    concept = max(best, key=best.get, default=None)
    note = f" (best score {score_text(best[concept])}, {plain(concept)})" if best else ""
    return f"nothing predicted{note}, nothing to find"


def score_text(score: float) -> str:
    """Two decimals; of less than 0.01, the first digit that is not zero."""
    return f"{score:.2f}" if score >= 0.01 else f"{score:.1g}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


class _Legend:
    """Texts after patches of colours, in lines of at most `width` pixels."""

    LINE, PATCH, GAP, SIZE = 28, 14, 4, 17

    def __init__(self, entries: Sequence[tuple[str, Sequence[Colour]]], width: int):
        self.rows, x = [[]], 0  # each of (x, patches, text)
        for text, colors in entries:
            patches = len(colors) * (self.PATCH + self.GAP)
            text = _fit(plain(text, 400), width - patches, self.SIZE, from_end=True)
            needed = patches + round(_font(self.SIZE).getlength(text)) + 28
            if self.rows[-1] and x + needed > width + 28:
                self.rows.append([])
                x = 0
            self.rows[-1].append((x, colors, text))
            x += needed
        self.height = self.LINE * len(self.rows)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int, ink: Colour = INK) -> None:
        for row, entries in enumerate(self.rows):
            middle = top + self.LINE * row + 10
            for x, colors, text in entries:
                x += left
                for color in colors:
                    draw.rectangle((x, middle - self.PATCH // 2, x + self.PATCH, middle + self.PATCH // 2), fill=color)
                    x += self.PATCH + self.GAP
                x += self.GAP if colors else 0
                draw.text((x, middle), text, font=_font(self.SIZE), fill=ink, anchor="lm")


def _fit(text: str, width: int, size: int, from_end: bool = False) -> str:
    """The text, cut at its start where it is too long: the end of a path says more. Or cut at its end."""
    if _font(size).getlength(text) <= width:
        return text
    while len(text) > 1 and _font(size).getlength("…" + text) > width:
        text = text[:-1] if from_end else text[1:]
    return text + "…" if from_end else "…" + text
