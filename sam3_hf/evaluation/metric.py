"""What the two metrics share: the rows' schema, their checks, and gathering them over processes."""

import uuid
from collections.abc import Mapping, Sequence
from itertools import chain

import evaluate
import numpy as np
from datasets import Features, List, Value
from torch import distributed

_RLE = {"size": List(Value("int32")), "counts": Value("string")}
_PAIR = {
    "image_id": Value("int64"),
    "category": Value("int64"),
    "boxes": List(List(Value("float64"))),
    "masks": List(_RLE),
}
FEATURES = Features(
    {
        "predictions": {**_PAIR, "scores": List(Value("float64"))},
        "references": {**_PAIR, "iscrowd": List(Value("int8")), "areas": List(Value("float64"))},
    }
)


class DetectionMetric(evaluate.Metric):
    """Base of `CocoAP` and `CGF1`: both take the same rows, described in `sam3_hf.evaluation.rows`.

    Works without network. With several processes, where `torch.distributed` is set up, build it in each with
    `num_process` and `process_id` (world size and rank); each adds its own rows and calls `compute()`, which is a
    collective operation: process 0 gets the result over the rows of all, the others None. The rows travel through
    `torch.distributed` and not through lock files as elsewhere in `evaluate`, which deadlock when one process enters
    the next round before another has left the last, and need a file system that all nodes share. A pair that arrives
    twice, as when a sampler pads the last batch, counts once.

    Args:
        iou_types: "segm" for masks, "bbox" for boxes, or both.
        category_names: {category id: name} for the per-class results; the ids themselves where it has no entry.
        num_process, process_id: how many processes add rows, and which this one is.
        kwargs: of `evaluate.Metric`, as `cache_dir` (where the rows are kept on disk until they are evaluated) and
            `keep_in_memory`.
    """

    def __init__(
        self,
        iou_types: Sequence[str] = ("bbox", "segm"),
        category_names: Mapping[int, str] | None = None,
        num_process: int = 1,
        process_id: int = 0,
        experiment_id: str | None = None,
        **kwargs,
    ):
        unknown = set(iou_types) - {"bbox", "segm"}
        if unknown or not iou_types or isinstance(iou_types, str):
            raise ValueError(f'iou_types must be a sequence of "bbox" and "segm", got {iou_types!r}')
        names = list((category_names or {}).values())
        if len(set(names)) < len(names):
            raise ValueError(
                f"category_names holds a name twice: {sorted(names)}; per-class results need distinct ones"
            )
        if num_process > 1:
            _check_process_group(num_process, process_id)
        self.iou_types = tuple(iou_types)
        self.category_names = dict(category_names or {})
        self.processes = num_process
        # a name of its own keeps the rows apart from those of other processes and of runs that were killed
        super().__init__(experiment_id=f"{experiment_id or 'rows'}-{uuid.uuid4().hex}", **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="Rows: see sam3_hf.evaluation.rows.",
            features=FEATURES,
        )

    def add_batch(self, *, predictions=None, references=None):
        """Adds rows: two lists of the same length, `predictions[i]` and `references[i]` of the same pair."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one row of each")
        for prediction, reference in zip(predictions, references, strict=True):
            self._check(prediction, reference)
        super().add_batch(
            predictions=[_complete(row, FEATURES["predictions"]) for row in predictions],
            references=[_complete(row, FEATURES["references"]) for row in references],
        )

    def add(self, *, prediction=None, reference=None):
        """Adds the two rows of one pair."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None):
        """Computes the figures over all rows added, plus those given here; None on processes other than 0."""
        if predictions is None and references is None:
            # a process that had no rows still takes part
            predictions, references = [], []
        return super().compute(predictions=predictions, references=references)

    def _check(self, prediction: Mapping, reference: Mapping) -> None:
        pair = (reference.get("image_id"), reference.get("category"))
        where = f"image {pair[0]}, category {pair[1]}"
        if (prediction.get("image_id"), prediction.get("category")) != pair:
            raise ValueError(
                f"{where}: paired with the prediction for image {prediction.get('image_id')}, category "
                f"{prediction.get('category')}; add both rows of a pair at the same position"
            )
        sizes = set()
        for kind, row, companions in (
            ("prediction", prediction, ("scores",)),
            ("reference", reference, ("iscrowd", "areas")),
        ):
            missing = [key for key in ("boxes", *companions) if row.get(key) is None]
            if missing:
                raise ValueError(f"{where}: {kind} has no {', '.join(missing)}")
            boxes = np.asarray(row["boxes"], dtype=np.float64)
            if len(boxes) and (boxes.ndim != 2 or boxes.shape[1] != 4):
                raise ValueError(f"{where}: {kind} boxes must be (n, 4) xyxy, got shape {boxes.shape}")
            if len(boxes) and "segm" in self.iou_types and row.get("masks") is None:
                raise ValueError(f'{where}: {kind} has no masks; to evaluate boxes only, pass iou_types=("bbox",)')
            for key in (*companions, *(["masks"] if row.get("masks") is not None else [])):
                if len(row[key]) != len(boxes):
                    raise ValueError(f"{where}: {kind} has {len(boxes)} boxes but {len(row[key])} {key}")
            for key in ("boxes", *companions):
                if not np.isfinite(np.asarray(row[key], dtype=np.float64)).all():
                    raise ValueError(f"{where}: {kind} {key} hold a value that is not finite")
            sizes |= {tuple(mask["size"]) for mask in row.get("masks") or []}
        if len(sizes) > 1:
            raise ValueError(f"{where}: masks of different sizes {sorted(sizes)}; all must have the image's size")

    def _compute(self, predictions, references):
        if self.processes > 1:
            shares = [None] * self.processes if distributed.get_rank() == 0 else None
            distributed.gather_object((predictions, references), shares, dst=0)
            if shares is None:
                return None
            predictions, references = (list(chain.from_iterable(rows)) for rows in zip(*shares, strict=True))
        pairs = {}
        for prediction, reference in zip(predictions, references, strict=True):
            key = (reference["image_id"], reference["category"])
            if pairs.setdefault(key, (prediction, reference))[1] != reference:
                raise ValueError(f"image {key[0]}, category {key[1]}: added twice with different references")
        if not pairs:
            raise ValueError("No rows were added; call add_batch before compute")
        return self.figures([pairs[key] for key in sorted(pairs)])

    def figures(self, pairs: list[tuple[dict, dict]]) -> dict:
        """The metric's figures over (prediction, reference) rows, each pair once, sorted by image and category."""
        raise NotImplementedError

    def name_of(self, category: int) -> str:
        return self.category_names.get(category, str(category))


def _check_process_group(num_process: int, process_id: int) -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"num_process is {num_process}, but torch.distributed is not initialised; start the processes "
            "with `accelerate launch` or `torchrun`"
        )
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if (process_id, num_process) != (rank, world):
        raise ValueError(
            f"process_id {process_id} of num_process {num_process} does not agree with torch.distributed, where this "
            f"is rank {rank} of {world}"
        )


def _complete(row: Mapping, features: Mapping) -> dict:
    """The row as it is stored: the keys of the schema, no masks as an empty list."""
    return {**{key: row.get(key) for key in features}, "masks": row.get("masks") or []}


def xywh(boxes: Sequence) -> np.ndarray:
    """(n, 4) xyxy -> (n, 4) x, y, width, height, float64."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes
