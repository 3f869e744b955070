"""What a run tells of how it goes."""

from dataclasses import dataclass

from .fields import check_range, option

SERVICES = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


@dataclass
class ProgressArguments:
    """What a run tells of how it goes."""

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

    def __post_init__(self):
        check_range(self, "early_score_steps", 0)
        unknown = [name for name in self.services if name not in SERVICES]
        if unknown:
            raise ValueError(f"report_to: {unknown[0]!r} is none of {', '.join(SERVICES)}, or 'none' alone")

    @property
    def services(self) -> tuple[str, ...]:
        """The names in `report_to`, each once."""
        names = (name.strip() for name in self.report_to.split(","))
        return () if self.report_to == "none" else tuple(dict.fromkeys(names))
