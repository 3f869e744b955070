"""What a run tells of how it goes, and when that ends it."""

from dataclasses import dataclass

from .fields import check_finite, check_range, option

SERVICES = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


@dataclass
class ProgressArguments:
    """What a run tells of how it goes, and when that ends it."""

    _argument_group_name = "progress"

    early_score_steps: int = option(
        50,
        "score a few fixed validation pictures after every so many steps, where evaluations are further apart, to see "
        "early whether the model learns; 0: never",
    )

    report_to: str = option(
        "tensorboard",
        f"services to report to, separated by commas, or 'none': {', '.join(SERVICES)}. All but tensorboard need "
        "their library, and get the settings as well",
    )

    early_stopping_patience: int = option(
        0, "end the run after so many evaluations in a row without a better --metric_for_best; 0: never"
    )
    early_stopping_min_delta: float = option(
        0.0, "count a score as better if it is so by more than this, in the units of the metric (AP is from 0 to 1)"
    )

    def __post_init__(self):
        check_finite(self)
        for name in ("early_score_steps", "early_stopping_patience", "early_stopping_min_delta"):
            check_range(self, name, 0)
        unknown = [name for name in self.services if name not in SERVICES]
        if unknown:
            raise ValueError(f"report_to: {unknown[0]!r} is none of {', '.join(SERVICES)}, or 'none' alone")

    @property
    def services(self) -> tuple[str, ...]:
        """The names in `report_to`, each once."""
        names = (name.strip() for name in self.report_to.split(","))
        return () if self.report_to == "none" else tuple(dict.fromkeys(names))
