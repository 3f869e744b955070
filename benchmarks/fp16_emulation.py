"""Trains in FP16 on a CPU, in the numbers that a GPU would have.

    python benchmarks/fp16_emulation.py training/configs/demo.yaml --max_steps 20

Takes the settings of `training/train.py`. Tensors are float16 where autocast makes them so. A CPU would add up float16
products in float16, and slowly; here products, norms and softmax are computed in float32 and then rounded, as a GPU
does. Of this model's operations, autocast on a CPU leaves the same in float16 as on CUDA.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sam3_hf.training import main as trainer
from sam3_hf.training import session
from sam3_hf.training.arguments import Arguments

ATEN = torch.ops.aten
# Computed in float32; for each, which of its results a GPU keeps in float32.
ROUNDED = {
    ATEN.mm.default: (),
    ATEN.addmm.default: (),
    ATEN.mv.default: (),
    ATEN.bmm.default: (),
    ATEN.baddbmm.default: (),
    ATEN.convolution.default: (),
    ATEN.convolution_backward.default: (),
    ATEN._scaled_dot_product_flash_attention_for_cpu.default: (1,),  # logarithms of sums
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: (),
    ATEN.native_layer_norm.default: (1, 2),  # mean and inverse deviation
    ATEN.native_layer_norm_backward.default: (),
    ATEN.native_group_norm.default: (),
    ATEN.native_group_norm_backward.default: (),
    ATEN._softmax.default: (),
    ATEN._softmax_backward_data.default: (),
}


class RoundedProducts(TorchDispatchMode):
    """Within, operations of `ROUNDED` that get a float16 tensor compute in float32, and round what they return."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if function not in ROUNDED or all(tensor.dtype != torch.float16 for tensor in tensors):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, _widened, (args, kwargs))
        results = function(*args, **kwargs)
        if isinstance(results, torch.Tensor):
            return results.half()
        kept = ROUNDED[function]
        return tuple(result if index in kept else _rounded(result) for index, result in enumerate(results))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _rounded(result):
    return result.half() if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else result


@contextmanager
def emulated_fp16(init_scale: float | None = None) -> Iterator[None]:
    """
    Within, the trainer computes on a CPU as `--mixed_precision fp16` would on a GPU.

    Args:
        init_scale: the loss scale to start from instead of the trainer's own.
    """
    start_accelerator = session.start_accelerator

    def start(arguments: Arguments) -> Accelerator:
        arguments.optimization.mixed_precision = "no"  # Accelerate knows no FP16 on a CPU
        accelerator = start_accelerator(arguments)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        settings = accelerator.scaler_handler.to_kwargs()
        if init_scale is not None:
            settings["init_scale"] = init_scale
        accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
        return accelerator

    with (
        mock.patch.dict(AcceleratorState._shared_state),  # which the next accelerator takes its precision from
        mock.patch.object(session, "start_accelerator", start),
        RoundedProducts(),
    ):
        yield


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--init-scale", type=float, help="loss scale to start from; default: the trainer's")
    arguments, settings = options.parse_known_args()
    with emulated_fp16(arguments.init_scale):
        return trainer.main(settings)


if __name__ == "__main__":
    sys.exit(main())
