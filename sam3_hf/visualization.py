"""Pictures for people: instances drawn over an image, prediction beside ground truth, training curves."""

import colorsys
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torchvision.ops import box_iou

from .plain_text import plain

LONGEST_SIDE = (512, 1280)  # drawings are scaled into this range of pixels: labels need room, files should stay small
FILL_OPACITY = 0.15  # shows which pixels are meant, and leaves them the colour that a phrase may name
LOWEST_SHARED_IOU = 0.5  # of the boxes of a prediction and a true object that are drawn in one colour
PALETTE = ("#f5b700", "#00a1e4", "#dc0073", "#5dd400", "#8f5bd6", "#ff7a33", "#00c2a8", "#3b4cca")
FIELDS = ("boxes", "masks", "labels", "scores")
PAPER, INK, FAINT_INK = (255, 255, 255), (34, 38, 46), (110, 116, 128)

Colour = tuple[int, int, int]


def instance_colors(count: int) -> list[Colour]:
    """Different colors, RGB in 0 to 255, for instances by their index; the first ones are the same for any count."""
    colors = []
    for index in range(count):
        if index < len(PALETTE):
            red, green, blue = (int(PALETTE[index][start : start + 2], 16) for start in (1, 3, 5))
        else:  # steps of the golden ratio keep hues apart however many follow
            shade = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85 - 0.25 * (index % 2), 0.9)
            red, green, blue = (round(255 * channel) for channel in shade)
        colors.append((red, green, blue))
    return colors


def draw_instances(
    image: Image.Image | np.ndarray,
    boxes=None,
    masks=None,
    labels: Sequence[str] | None = None,
    scores=None,
    *,
    colors: Sequence[Colour] | None = None,
    tag_labels: bool = True,
) -> Image.Image:
    """Outlines instances in an image, each in a colour of its own and with a tag, and tints their masks a little.

    Small images are enlarged and large ones reduced, so that the longest side is between 512 and 1280 pixels.

    Args:
        image: PIL image, or (height, width, 3) uint8.
        boxes: (n, 4) xyxy in pixels of `image`. Drawn for instances without a mask; the tags of all are beside them.
            Default: the bounds of the masks.
        masks: (n, height, width) bool or 0/1 at the size of `image`; None draws boxes alone.
        labels: n concepts; default "object". Shown on one line, as far as there is room.
        scores: (n,) in [0, 1]; None leaves them out.
        colors: n times RGB; default: `instance_colors`.
        tag_labels: False leaves the concept out of the tags, for pictures that say it elsewhere.

    Raises:
        ValueError: lengths differ, or masks are not of the image's size.
    """
    image = _as_image(image)
    boxes, masks, labels, scores = _check_instances(image, boxes, masks, labels, scores)
    colors = colors or instance_colors(len(labels))
    scale = _scale_of(image)
    canvas = _resize(image, scale)
    stroke = max(3, round(max(canvas.size) / 320))

    areas = masks.sum(axis=(1, 2)) if masks is not None else np.zeros(len(labels))
    order = np.argsort(-areas, kind="stable")  # small ones last: on top
    for index in order:
        if areas[index]:
            _draw_mask(canvas, masks[index], colors[index], stroke)
        else:
            _draw_box(ImageDraw.Draw(canvas), boxes[index] * scale, colors[index], stroke)
    draw = ImageDraw.Draw(canvas)
    taken = []
    for index in order:
        words = [plain(labels[index])] if tag_labels else []
        words += [f"{scores[index]:.2f}"] if scores is not None else []
        if words:
            _draw_tag(draw, canvas.size, boxes[index] * scale, " ".join(words), colors[index], taken)
    return canvas


def side_by_side(
    image: Image.Image | np.ndarray, prediction: Mapping, ground_truth: Mapping, title: str = ""
) -> Image.Image:
    """Prediction at the left, ground truth at the right, and below how many there are of each concept.

    A true object has the colour of the prediction that covers it, if there is one. Tags name the concepts if there are
    several.

    Args:
        image: PIL image, or (height, width, 3) uint8.
        prediction, ground_truth: dicts of `boxes`, `masks`, `labels`, `scores`, each as in `draw_instances`.
        title: a line above, as the file name.
    """
    image = _as_image(image)
    shown = sorted({*(prediction.get("labels") or ()), *(ground_truth.get("labels") or ())})
    halves = [
        draw_instances(image, *(instances.get(field) for field in FIELDS), colors=colors, tag_labels=len(shown) > 1)
        for instances, colors in zip(
            (prediction, ground_truth), _shared_colors(image, prediction, ground_truth), strict=True
        )
    ]
    width, height = halves[0].size
    margin, text_height = 16, 20
    title_height = 34 if title else 0
    counts = [
        f"{plain(concept)}: {_count(prediction, concept)} predicted, {_count(ground_truth, concept)} true"
        for concept in shown
    ] or ["nothing predicted, nothing to find"]
    rows = _flow(counts, 2 * width + margin)
    top = margin + title_height + 32
    panel = Image.new("RGB", (2 * width + 3 * margin, top + height + margin + len(rows) * 28 + margin // 2), PAPER)
    draw = ImageDraw.Draw(panel)
    if title:
        draw.text((margin, margin - 2), _fit(plain(title, 400), 2 * width, 22), font=_font(22), fill=INK)
    for name, half, left in zip(("Prediction", "Ground truth"), halves, (margin, width + 2 * margin), strict=True):
        draw.text((left, margin + title_height), name, font=_font(text_height), fill=INK)
        panel.paste(half, (left, top))
    for row, entries in enumerate(rows):
        for x, index in entries:
            position = (margin + x, top + height + margin + row * 28 + 10)
            draw.text(position, counts[index], font=_font(17), fill=FAINT_INK, anchor="lm")
    return panel


def contact_sheet(
    pictures: Sequence[Image.Image], titles: Sequence[str], legend: Mapping[str, Colour], columns: int = 4
) -> Image.Image:
    """Pictures of any sizes in a grid, each under its title, above a legend {text: colour}."""
    margin, tile, title_height = 16, 384, 24
    columns = max(min(columns, len(pictures)), 1)
    width = columns * (tile + margin) + margin
    lines = _flow([f"     {plain(text)}" for text in legend], width - 2 * margin)
    rows = -(-len(pictures) // columns)
    top = rows * (tile + title_height + margin) + margin
    sheet = Image.new("RGB", (width, top + 28 * len(lines) + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = margin + number % columns * (tile + margin)
        above = margin + number // columns * (tile + title_height + margin)
        draw.text((left, above), _fit(plain(title, 400), tile, 16), font=_font(16), fill=INK)
        small = picture.convert("RGB")
        small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(small, (left, above + title_height))
    for row, entries in enumerate(lines):
        for x, index in entries:
            text, color = list(legend.items())[index]
            middle = top + 28 * row + 10
            draw.rectangle((margin + x, middle - 7, margin + x + 14, middle + 7), fill=color)
            draw.text((margin + x + 22, middle), plain(text), font=_font(17), fill=INK, anchor="lm")
    return sheet


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


def _scale_of(image: Image.Image) -> float:
    longest = max(image.size)
    return min(max(longest, LONGEST_SIDE[0]), LONGEST_SIDE[1]) / longest


def _resize(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _draw_mask(canvas: Image.Image, mask: np.ndarray, color: Colour, stroke: int) -> None:
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.BILINEAR)
    if canvas.width > mask.shape[1]:  # rounds off the steps of enlarged pixels
        soft = soft.filter(ImageFilter.GaussianBlur(0.6 * canvas.width / mask.shape[1]))
    inside = soft.point(lambda value: 255 if value >= 128 else 0)
    if inside.getbbox() is None:
        return
    left, top, right, bottom = inside.getbbox()
    frame = (left - stroke, top - stroke, right + stroke, bottom + stroke)
    inside = inside.crop(frame)
    halo = inside.filter(ImageFilter.MaxFilter(3))
    core = inside.filter(ImageFilter.MinFilter(2 * stroke + 1))
    canvas.paste(PAPER, frame, ImageChops.subtract(halo, inside))
    canvas.paste(color, frame, inside.point(lambda value: round(value * FILL_OPACITY)))
    canvas.paste(color, frame, ImageChops.subtract(inside, core))


def _draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Colour, stroke: int) -> None:
    left, top, right, bottom = (round(float(side)) for side in box)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PAPER, width=1)
    draw.rectangle((left, top, right, bottom), outline=color, width=stroke)


def _draw_tag(draw, size: tuple[int, int], box: np.ndarray, text: str, color, taken: list) -> None:
    """Writes at the first free place by the box: above it, below it, inside it, or beside it."""
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
    tag = min(tags, key=lambda tag: sum(_overlap(tag, other) for other in taken))
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


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _flow(entries: list[str], width: int) -> list[list[tuple[int, int]]]:
    """Lays entries out in lines of at most `width` pixels: per line (x, index of the entry)."""
    rows, x = [[]], 0
    for index, entry in enumerate(entries):
        needed = round(_font(17).getlength(entry)) + 28
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append((x, index))
        x += needed
    return rows


def _fit(text: str, width: int, size: int) -> str:
    """The text, cut at its start where it is too long: the end of a path says more."""
    if _font(size).getlength(text) <= width:
        return text
    while len(text) > 1 and _font(size).getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
