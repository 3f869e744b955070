"""The accelerator of a run, and what it makes of a model and its optimizer."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradScalerKwargs, broadcast_object_list, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

from ..modeling_sam3_lite import Sam3LiteModel
from .adapters import check_adapters
from .arguments import Arguments, OptimizationArguments
from .optim import build_optimizer
from .reporting import set_up_logging

logger = logging.getLogger(__name__)

# The loss, a sum over decoder layers, is in the hundreds, and 2^16 times it overflows: from there, the demo in
# emulated FP16 skips its first steps until the scale is 2^9 or less (benchmarks/fp16_recipe.py --init-scale 65536).
# At the other end nothing is lost before 2^-4: gradients at 2^0, 2^6 and 2^9 are the same but for rounding.
FIRST_LOSS_SCALE = 2.0**6


def process_state() -> PartialState:
    """This process among those of the run, and its device."""
    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    # Without being told so, several processes on a machine without GPU would not find each other.
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def start_accelerator(arguments: Arguments) -> Accelerator:
    """An accelerator in the wanted precision; float32 where FP16 cannot run, which is said once."""
    check_adapters(arguments.adapter)
    state = process_state()
    set_up_logging(Path(arguments.output.output_dir), state.is_main_process)
    precision = arguments.optimization.mixed_precision
    if precision == "fp16" and state.device.type == "cpu":
        logger.warning("FP16 training needs a GPU; going on in float32 on the CPU")
        precision = "no"
    accelerator = Accelerator(
        cpu=_on_cpu(),
        mixed_precision=precision,
        gradient_accumulation_steps=arguments.optimization.gradient_accumulation_steps,
        kwargs_handlers=[GradScalerKwargs(init_scale=FIRST_LOSS_SCALE)],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if arguments.optimization.ema_decay:
            raise ValueError("ema_decay does not work with FSDP, where no process holds whole weights: set it to 0")
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported: set fsdp_version to 2")
        # Autocast chooses the precision of each operation, as without FSDP. Accelerate's own policy would gather all
        # weights and add up all gradients in half precision.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def decide(accelerator: Accelerator, decision: Callable):
    """What the main process decides, in all processes; they raise its error as well."""
    outcome = (None, None)
    if accelerator.is_main_process:
        try:
            outcome = (decision(), None)
        except (OSError, ValueError) as error:
            outcome = (None, error)
    ((result, error),) = broadcast_object_list([outcome])
    if error is not None:
        raise error
    return result


def prepare(accelerator: Accelerator, model: Sam3LiteModel, settings: OptimizationArguments) -> tuple:
    """
    The model and an optimizer over its weights, as `accelerator.prepare` returns them; `get_vision_features` works
    under FSDP as well.
    """
    optimizer = build_optimizer(model, settings, fused=accelerator.device.type == "cuda")
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        register_fsdp_forward_method(model, "get_vision_features")  # gathers the weights, as for forward
    return model, optimizer
