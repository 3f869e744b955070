"""What was found in an image, its masks run-length encoded, and its forms for other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..plain_text import plain
from ..rle import decode_mask, ious
from ..visualization import score_text

SHOWN = 10  # detections, and prompts, that the text of a result lists
LEGEND_LABELS = 24  # that a legend has room for
LEGEND_COLORS = 8  # of detections of one label that it shows; of more it shows none


@dataclass(repr=False)
class Detections:
    """
    The detections of one image, best first. Masks are kept run-length encoded, a few hundred bytes each.

    Args:
        boxes: `(n, 4)` float32 xyxy, in pixels of the image and clamped to it.
        scores: `(n,)` float32 in [0, 1].
        labels: n prompts.
        rle: n masks in COCO's compressed encoding, `{"size": [height, width], "counts": str}`; None from a model that
            was trained on boxes alone.
        size: height and width of the image.
        prompts: all labels that were asked for, in their order.
        best: {label: the highest score that anything in the image has for it}, of a detection or below the threshold.
    """

    boxes: Tensor
    scores: Tensor
    labels: list[str]
    rle: list[dict] | None
    size: tuple[int, int]
    prompts: list[str]
    best: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """What is there of each label, and the best few with score and box; fits on a screen."""
        height, width = self.size
        found = Counter(self.labels)
        counts = ", ".join(f"{found[label]} {plain(label)}{self._missed(label)}" for label in self.prompts[:SHOWN])
        counts += f", and {len(self.prompts) - SHOWN} more prompts" if len(self.prompts) > SHOWN else ""
        masks = "" if self.rle is not None else ", no masks"
        lines = [f"Detections({counts}; image of {width}x{height} pixels{masks})"]
        for label, score, box in zip(self.labels[:SHOWN], self.scores.tolist(), self.boxes.tolist(), strict=False):
            corners = ", ".join(f"{side:.0f}" for side in box)
            lines.append(f"  {score:.2f}  {plain(label)}  [{corners}]")
        lines += [f"  and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join(lines)

    def _missed(self, label: str) -> str:
        """The best score of a label of which nothing was found, as a remark."""
        if label in self.labels or label not in self.best:
            return ""
        return f" (best score {score_text(self.best[label])})"

    def legend(self, colors: Sequence[tuple[int, int, int]]) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """
        What a drawing of them says below: how many there are of each label, with their scores and colours; of what is
        not there, the best score.

        Args:
            colors: RGB of each detection.
        """
        entries = [] if len(self) else [("Nothing above the threshold.", [])]
        for label in sorted(self.prompts, key=lambda label: label not in self.labels)[:LEGEND_LABELS]:
            own = [index for index, other in enumerate(self.labels) if other == label]
            if not own:
                entries.append((f"{plain(label, 40)}: none{self._missed(label)}", []))
                continue
            scores = [self.scores[index].item() for index in own]
            ends = dict.fromkeys([score_text(min(scores)), score_text(max(scores))])
            shades = list(dict.fromkeys(tuple(colors[index]) for index in own))
            text = f"{plain(label, 40)}: {len(own)} ({' to '.join(ends)})"
            entries.append((text, shades if len(shades) <= LEGEND_COLORS else []))
        rest = len(self.prompts) - LEGEND_LABELS
        return entries + ([(f"and {rest} more prompts", [])] if rest > 0 else [])

    @property
    def masks(self) -> Tensor | None:
        """`(n, height, width)` bool, decoded at each access: n bytes per pixel of the image. None without masks."""
        if self.rle is None:
            return None
        masks = torch.zeros((len(self), *self.size), dtype=torch.bool)
        for mask, rle in zip(masks, self.rle, strict=True):
            mask.copy_(torch.from_numpy(decode_mask(rle)))
        return masks

    def scaled(self, width: int, height: int) -> tuple[Tensor, np.ndarray | None]:
        """
        Boxes `(n, 4)` float32 xyxy and masks `(n, height, width)` bool in a picture of another size; masks are decoded
        one at a time, and None where there are none.
        """
        boxes = self.boxes * (torch.tensor([width, height] * 2) / torch.tensor([*self.size[::-1]] * 2))
        if self.rle is None:
            return boxes, None
        masks = np.zeros((len(self), height, width), dtype=bool)
        for mask, rle in zip(masks, self.rle, strict=True):
            mask[:] = Image.fromarray(decode_mask(rle)).convert("L").resize((width, height), Image.Resampling.BOX)
        return boxes, masks

    def select(self, index: Sequence[int]) -> Detections:
        """The detections with these indices, in this order."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return Detections(
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=[self.labels[row] for row in index],
            rle=None if self.rle is None else [self.rle[row] for row in index],
            size=self.size,
            prompts=self.prompts,
            best=self.best,
        )

    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int]) -> list[dict]:
        """
        Entries of a COCO results file, as JSON takes them.

        Args:
            image_id: id of this image.
            category_ids: {label: category id}.

        Returns:
            n dicts: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`, and
            `segmentation` if there are masks.

        Raises:
            ValueError: a label has no id.
        """
        unknown = sorted(set(self.labels) - set(category_ids))
        if unknown:
            raise ValueError(f"`category_ids` has no id for {unknown}.")
        entries = [
            {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for (left, top, right, bottom), score, label in zip(
                self.boxes.tolist(), self.scores.tolist(), self.labels, strict=True
            )
        ]
        masks = [{}] * len(self) if self.rle is None else [{"segmentation": rle} for rle in self.rle]
        return [entry | mask for entry, mask in zip(entries, masks, strict=True)]

    def to_supervision(self):
        """
        `supervision.Detections` with masks; `class_id` is the index of the label in `prompts`, and the label itself
        is in `data["class_name"]`.

        Raises:
            ImportError: `supervision` is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("`to_supervision` needs the library: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=None if self.rle is None else self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=np.array([self.prompts.index(label) for label in self.labels], dtype=int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )


def suppress(labels: list[str], rle: list[dict], max_iou: float) -> list[int]:
    """
    Non-maximum suppression by masks, within each label.

    Args:
        labels, rle: of detections, best first.
        max_iou: a detection goes if its mask overlaps that of a better one of its label by more.

    Returns:
        Indices of those that stay, in order.
    """
    kept = []
    for label in dict.fromkeys(labels):
        own = [index for index, other in enumerate(labels) if other == label]
        overlaps = ious([rle[index] for index in own], [rle[index] for index in own])
        stay = []
        for row in range(len(own)):
            if all(overlaps[row, better] <= max_iou for better in stay):
                stay.append(row)
        kept += [own[row] for row in stay]
    return sorted(kept)
