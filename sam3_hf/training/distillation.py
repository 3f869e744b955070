"""Learning from a teacher: its feature pyramid, and what its detector and mask head say of each prompt."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling_sam3_lite import Sam3LiteModel
from ..outputs_sam3_lite import DetectorOutput, Sam3LiteOutput
from ..passes_sam3_lite import Segmented, TrainingPass
from .arguments import DistillationArguments
from .correspondence import Target, in_order, layer_map, match_queries, partners_of, same_queries
from .distillation_terms import (
    box_errors,
    disagreeing_points,
    feature_errors,
    mask_errors,
    presence_errors,
    query_errors,
    relative_errors,
    score_errors,
    semantic_errors,
)
from .objectives import Objective
from .phrase_choice import PhraseChoice
from .retention import Retention
from .teacher import Answers, Segments, Teacher

logger = logging.getLogger(__name__)

LEVEL_WEIGHTS = (1.0, 0.5, 0.5)  # of the pyramid, fine to coarse: most of the masks is in the finest
VISION, MASKS = "vision_encoder.", "mask_decoder."
SEEN = "teacher_vision"  # in a batch: the teacher's features of its pictures


class Distillation(Objective):
    """
    How far the model is from its teacher, and, with a weight above 0, from the labels.

    Attributes:
        layers: the teacher's decoder layer that each of the model's follows.
        by_number: whether a query follows that of the same number. Otherwise they are matched in each batch.
    """

    def __init__(
        self,
        teacher: Teacher,
        model: Sam3LiteModel,
        settings: DistillationArguments,
        chosen_layers: list[int] | None = None,
        choice: PhraseChoice | None = None,
        retention: Retention | None = None,
    ):
        """
        Args:
            model: the student before its first step.
            chosen_layers: the teacher's decoder layers that its own come from, if that is known.
            choice: of the phrases for batches that come without; None if they come with them.
            retention: what else the teacher is asked of labelled images. The others then follow their labels alone.
        """
        self.teacher, self.settings, self.choice, self.retention = teacher, settings, choice, retention
        decoder, taught = model.detr_decoder, teacher.model.detr_decoder
        self.layers = layer_map(len(decoder.layers), len(taught.layers), chosen_layers)
        self.by_number = same_queries(decoder, taught)
        weights = settings.weights()
        if weights["distill_queries_weight"] and not self.by_number:
            logger.info(
                "the model's queries are not those of the teacher: they are matched, and distill_queries is left out"
            )
        self.learns_masks = teacher.has_masks and bool(
            weights["distill_masks_weight"] or weights["distill_semantic_weight"]
        )
        self.learns_detector = any(weight for name, weight in weights.items() if name != "distill_features_weight")

    @property
    def features_only(self) -> bool:
        """Whether this step is one of those that train the feature pyramid alone."""
        return self.progress <= self.settings.feature_steps

    @property
    def uses_labels(self) -> bool:
        return self.settings.label_loss_weight > 0 and not self.features_only

    @property
    def uses_detector(self) -> bool:
        return self.uses_labels or (self.learns_detector and not self.features_only)

    def keeps_masks(self, had_masks: bool, labels_have_masks: bool) -> bool:
        if self.settings.label_loss_weight > 0:
            return self.learns_masks or labels_have_masks
        return self.learns_masks or had_masks  # the mask head stands still, and features follow those it was made for

    def idle(self, model: nn.Module) -> list[nn.Parameter]:
        named = list(extract_model_from_parallel(model).named_parameters())
        if not self.uses_detector:
            return [parameter for name, parameter in named if not name.startswith(VISION)]
        if not (self.uses_labels or self.learns_masks):
            return [parameter for name, parameter in named if name.startswith(MASKS)]
        return []

    def complete(self, batch: dict) -> dict:
        if self.choice is None:
            return batch if self.retention is None else self.retention.add(batch)
        if not self.uses_detector:
            return self.choice.ask(batch)
        vision = self.teacher.look(batch["pixel_values"])
        return self.choice.ask(batch, partial(self.teacher.sees, vision=vision)) | {SEEN: vision}

    def __call__(self, model: nn.Module, batch: dict, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.uses_labels:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        device = inputs["pixel_values"].device
        first = 0 if self.retention is None else len(batch["labels"])
        asked = prompts_from(batch, first), device, self.uses_detector, self.learns_masks
        levels, answers = self.teacher(*asked, batch.get(SEEN))
        if self.choice is not None and answers is not None:
            self.choice.note(batch, answers.present)
        outputs = model(**inputs, criterion=partial(self.compare, levels, answers, first))
        loss = outputs.loss
        if isinstance(model, DistributedDataParallel):  # it waits for a gradient of every parameter
            idle = [parameter.sum() for parameter in self.idle(model) if parameter.requires_grad]
            loss = loss + 0 * sum(idle)
        return loss, outputs.loss_dict

    def compare(
        self, levels: tuple[Tensor, ...], answers: Answers | None, first: int, student: TrainingPass
    ) -> Sam3LiteOutput:
        """
        The loss of a pass of the student, and its weighted terms.

        Args:
            levels, answers: what the teacher says.
            first: the first prompt of the student that the teacher was asked too.
        """
        label_loss, losses, masks = 0.0, {}, None
        if answers is not None:
            found = student.found.answers_from(first)
            target, partners = self._target(found, answers)
            segmented = self._segment(student, answers, first)
            if answers.segments is not None:
                masks = pair_masks(student, answers, first, segmented, partners)
            if self.uses_labels:
                weight = self.settings.label_loss_weight
                label_loss, losses = student.label_loss(segmented)
                label_loss, losses = weight * label_loss, {name: weight * value for name, value in losses.items()}
        with torch.autocast(levels[0].device.type, enabled=False):
            terms = {"features": feature_term(student.levels, levels)}
            if answers is not None:
                counts = count(answers, target, masks)
                terms |= detector_terms(found, answers, target, counts, self.settings.distill_temperature)
                if self.by_number:
                    goal = answers.found.hidden[self.layers]
                    terms["queries"] = query_errors(found.hidden, goal, target.trust).sum() / counts.trust
                if masks is not None:
                    terms |= mask_terms(masks, counts, student.model.config.loss_config)
        weights = self.settings.weights()
        terms = {f"distill_{name}": weights[f"distill_{name}_weight"] * term for name, term in terms.items()}
        loss = torch.stack(list(terms.values())).sum() + label_loss
        return Sam3LiteOutput(loss=loss, loss_dict=losses | {name: term.detach() for name, term in terms.items()})

    def _target(self, own: DetectorOutput, answers: Answers) -> tuple[Target, Tensor | None]:
        """What the student's queries follow, and their partners among the teacher's if they had to be matched."""
        found = answers.found
        presence = found.presence_logits[self.layers]
        target = Target(found.logits[self.layers], found.boxes[self.layers], answers.trust, presence)
        if self.by_number:
            return target, None
        partners = match_queries(own.logits, own.boxes, target)
        return in_order(target, partners), partners

    def _segment(self, student: TrainingPass, answers: Answers, first: int) -> Segmented | None:
        """Runs the mask head, once, for the prompts that the teacher has masks of, or the labels."""
        wanted = [] if answers.segments is None else [answers.segments.segmented + first]
        if self.uses_labels:
            wanted.append(student.prompts_with_masks())
        return student.segment(torch.cat(wanted).unique()) if wanted else None

    def disk_bytes(self, folder: Path) -> int:
        cache = self.teacher.cache
        same_disk = cache is not None and os.stat(cache.folder).st_dev == os.stat(folder).st_dev
        return cache.lacking_bytes() if same_disk else 0

    def state_dict(self) -> dict:
        state = {"layers": self.layers, "by_number": self.by_number}
        return state if self.choice is None else state | {"choice": self.choice.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: the checkpoint's teacher had more decoder layers than this one, or it is of other pictures.
        """
        depth = len(self.teacher.model.detr_decoder.layers)
        if max(state["layers"]) >= depth:
            raise ValueError(
                f"--teacher has {depth} decoder layers, that of the checkpoint at least {max(state['layers']) + 1}: "
                "go on with the same teacher, or start anew in another --output_dir"
            )
        self.layers, self.by_number = state["layers"], state["by_number"]
        if self.choice is not None and "choice" in state:
            self.choice.load_state_dict(state["choice"])


class MaskPairs(NamedTuple):
    """Masks and semantic maps of the student, and what they follow."""

    own: Tensor  # (masks, h, w) logits
    goal: Tensor
    own_semantic: Tensor  # (segmented, 1, h, w) logits
    goal_semantic: Tensor
    present: Tensor  # (segmented,) bool: the teacher sees the concept


class Counts(NamedTuple):
    """What sums are divided by, see `over_processes`."""

    prompts: Tensor
    present: Tensor
    trust: Tensor
    masks: Tensor


def prompts_from(batch: dict, first: int) -> dict:
    """A batch with the prompts from one on, for a teacher; those before it may have boxes, if it is not the first."""
    if first == 0:
        return batch
    kept = {"phrases": batch["phrases"][first:], "image_index": batch["image_index"][first:]}
    return {"pixel_values": batch["pixel_values"], **kept}


def pair_masks(
    student: TrainingPass, answers: Answers, first: int, segmented: Segmented, partners: Tensor | None
) -> MaskPairs:
    """
    Computes the student's masks of the queries that the teacher is confident of, in the caller's autocast state.

    Args:
        first: the first prompt of the student that the teacher was asked too.
        segmented: at least the prompts that the teacher segmented.
        partners: of `match_queries`, if queries had to be matched.
    """
    said: Segments = answers.segments
    prompts, queries, goal = said.prompts, said.queries, said.masks
    if partners is not None:
        queries = partners_of(partners, prompts, queries)
        kept = queries >= 0
        prompts, queries, goal = prompts[kept], queries[kept], goal[kept.to(goal.device)]
    device = answers.present.device
    rows = torch.searchsorted(segmented.prompts, said.segmented + first).to(device)
    return MaskPairs(
        own=student.masks(segmented, prompts + first, queries),
        goal=goal,
        own_semantic=segmented.semantic[rows],
        goal_semantic=said.semantic,
        present=answers.present[said.segmented.to(device)],
    )


def count(answers: Answers, target: Target, masks: MaskPairs | None) -> Counts:
    """Those of a batch; a collective call."""
    present = answers.present.float()
    sizes = [len(present), 0 if masks is None else len(masks.own)]
    prompts, num_masks = present.new_tensor(sizes).unbind()
    return Counts(*over_processes(torch.stack([prompts, present.sum(), target.trust.sum(), num_masks])).unbind())


def over_processes(counts: Tensor) -> Tensor:
    """
    Counts added up over processes, at least 1, divided by the number of processes: by these, the mean over processes
    of sums is that of the whole batch.
    """
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
        processes = torch.distributed.get_world_size()
    return counts.clamp(min=1) / processes


def feature_term(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """The mean over images of `feature_errors`, weighted over levels `(images, channels, h, w)`, fine to coarse."""
    pairs = zip(LEVEL_WEIGHTS, student, teacher, strict=True)
    return sum(weight * feature_errors(own, goal).mean() for weight, own, goal in pairs)


def detector_terms(
    found: DetectorOutput, answers: Answers, target: Target, counts: Counts, temperature: float
) -> dict[str, Tensor]:
    """
    The terms of encoder, scores, presence and boxes. Where the teacher does not see the concept, scores and presence
    alone count: it trusts no box there.
    """
    encoded = relative_errors(found.encoded, answers.found.encoded) * answers.present
    boxes, giou = box_errors(found.boxes, target.boxes, target.trust)
    return {
        "encoder": encoded.sum() / counts.present,
        "scores": score_errors(found.logits, target.logits, temperature).sum() / counts.prompts,
        "presence": presence_errors(found.presence_logits, target.presence_logits).sum() / counts.prompts,
        "boxes": boxes.sum() / counts.trust,
        "giou": giou.sum() / counts.trust,
    }


def mask_terms(masks: MaskPairs, counts: Counts, config) -> dict[str, Tensor]:
    """The terms of masks and semantic maps; `config` is the loss configuration of the model."""
    semantic = semantic_errors(masks.own_semantic, masks.goal_semantic) * masks.present
    total = masks.own.sum().float()  # 0 without masks, and keeps the mask head in the graph
    if len(masks.own):
        points = disagreeing_points(masks.own.detach(), masks.goal, config)
        total = mask_errors(masks.own, masks.goal, points).sum()
    return {"masks": total / counts.masks, "semantic": semantic.sum() / counts.present}
