"""What a run tells of how it goes."""

from dataclasses import dataclass

from .fields import check_range, option


@dataclass
class ProgressArguments:
    """What a run tells of how it goes."""

    _argument_group_name = "progress"

    early_score_steps: int = option(
        50,
        "score a few fixed validation pictures after every so many steps, where evaluations are further apart, to see "
        "early whether the model learns; 0: never",
    )

    def __post_init__(self):
        check_range(self, "early_score_steps", 0)
