"""The end of a run whose scores do not get better any more."""

from .progress_arguments import ProgressArguments


class EarlyStopping:
    """
    Counts evaluations without a better score, whether or not that shall end the run: one that goes on may ask for it.

    Attributes:
        stale: evaluations since the last one that was better by more than the least difference.
    """

    def __init__(self, settings: ProgressArguments, metric: str):
        """
        Args:
            metric: name of the score; all but "loss" shall rise.
        """
        self.patience, self.min_delta = settings.early_stopping_patience, settings.early_stopping_min_delta
        self.metric, self.stale, self._reference = metric, 0, None

    def note(self, value: float) -> None:
        """Takes in the score of an evaluation."""
        sign = -1 if self.metric == "loss" else 1
        if self._reference is None or sign * (value - self._reference) > self.min_delta:
            self.stale, self._reference = 0, value
        else:
            self.stale += 1

    @property
    def is_due(self) -> bool:
        """Whether the run shall end here."""
        return 0 < self.patience <= self.stale

    def __str__(self) -> str:
        return (
            f"{self.metric} has not become better than {self._reference:.4f} by more than {self.min_delta:g} in "
            f"{self.stale} evaluations; to train on, raise --early_stopping_patience and add --resume auto"
        )

    def state_dict(self) -> dict:
        return {"metric": self.metric, "stale": self.stale, "reference": self._reference}

    def load_state_dict(self, state: dict) -> None:
        """Goes on counting, unless it was by another score."""
        if state["metric"] == self.metric:
            self.stale, self._reference = state["stale"], state["reference"]
