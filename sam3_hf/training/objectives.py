"""What training minimises."""

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn


class Objective(ABC):
    """
    The loss of one forward pass over a batch. It may hold modules and buffers of its own, which the optimizer does not
    see; the trained model comes with each call.

    Attributes:
        progress: share of the steps that are done when this one is, above 0 to 1.
    """

    progress = 1.0

    @abstractmethod
    def __call__(self, model: nn.Module, batch: dict, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Called in training mode, under autocast.

        Args:
            model: as returned by `accelerator.prepare`. Call it once, and itself, not its parts: where there are
                several processes, this is what exchanges gradients.
            batch: as `PromptCollator` makes it, on the CPU: "phrases", "image_ids" and so on.
            inputs: what `model` takes of the batch, on its device, with "labels".

        Returns:
            The loss, a scalar to go backward from, and at least one term that it consists of: scalars without a
            gradient by the names that metrics.jsonl and TensorBoard shall have for them, other than "loss" and
            "grad_norm".

        Raises:
            ValueError: the loss cannot be computed, as where predictions are not finite. The step fails with this
                message and the ids of the images.
        """

    def start_step(self, step: int, total_steps: int) -> None:
        """Called before the forward passes of step 1, 2, ... `total_steps`."""
        self.progress = step / total_steps

    def complete(self, batch: dict) -> dict:
        """A batch of the loader with all that a step needs; called by all processes for each pass."""
        return batch

    def idle(self, model: nn.Module) -> list[nn.Parameter]:
        """
        Parameters that stand still in this step. Their gradients are thrown away when all passes of it are done, so
        that nothing, weight decay included, moves them: a gradient of zero, as several processes need one, would not
        do.

        Args:
            model: as in the call.
        """
        return []

    def keeps_masks(self, had_masks: bool, labels_have_masks: bool) -> bool:
        """
        Whether the trained model's masks mean something.

        Args:
            had_masks: whether they do before the first step.
            labels_have_masks: whether any object of the training split has one.
        """
        return labels_have_masks

    def disk_bytes(self, folder: Path) -> int:
        """What it will yet write on the disk of a folder, checkpoints not counted."""
        return 0

    def state_dict(self) -> dict:
        """What a checkpoint has to hold of the objective, for `torch.load` with `weights_only`; empty if nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state that was not empty."""
        raise ValueError(f"{type(self).__name__} has no state, but the checkpoint holds one: {sorted(state)[:5]}")


class Labels(Objective):
    """The model's own loss: how far its predictions are from the annotations."""

    def __call__(self, model: nn.Module, batch: dict, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = model(**inputs)
        return outputs.loss, outputs.loss_dict
