"""The settings of adapters."""

import dataclasses
import re
from dataclasses import dataclass

from .fields import check_finite, check_range, option


@dataclass
class AdapterArguments:
    """Low-rank adapters, which train instead of the weights of the model."""

    _argument_group_name = "adapters (all but --lora_rank itself need --lora_rank)"

    lora_rank: int | None = option(
        None,
        "train adapters of this rank beside linear layers, through peft, and leave the weights of --init as they are: "
        "less memory, checkpoints of a few MB. Without it, the weights train",
    )
    lora_alpha: float | None = option(
        None, "adapters count lora_alpha / lora_rank times; by default lora_rank, that is once"
    )
    lora_dropout: float | None = option(None, "share of the adapters' inputs, 0 to below 1, set to 0; by default none")
    lora_targets: str | None = option(
        None,
        "which layers get one: 'detector', by default, 'vision', 'all', or a regular expression for whole names, as "
        "'detr_decoder.*', among layers named q_proj, k_proj, v_proj, o_proj, fc1 and fc2",
    )
    merge_adapter: bool = option(
        True,
        "final/ holds the whole model; 'false': the adapter and the name of the lite model of --init that it belongs "
        "to",
    )

    def __post_init__(self):
        check_finite(self)
        if self.lora_rank is None:
            for item in dataclasses.fields(self):
                if getattr(self, item.name) != item.default:
                    raise ValueError(
                        f"{item.name} needs --lora_rank, the rank of adapters: give it, or leave this out"
                    )
            return
        check_range(self, "lora_rank", 1)
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        try:
            re.compile(f"(?:{self.lora_targets})")
        except re.error as error:
            raise ValueError(f"lora_targets {self.lora_targets!r} is no regular expression: {error}") from None
