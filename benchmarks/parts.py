"""What each change of this package against stock SAM 3 gains: predicted by counts, and measured, in one run.

    python benchmarks/parts.py --preset small --image-size 336 --prompts 4 --precisions bf16

A row is one change in one pass: a part of the model and the stock way of doing the same (`changes.py`), with equal
weights and inputs. All but seconds is stock / ours. Predicted, by counting what a call does on this device in eager
mode: `FLOP` of matrix products and convolutions; `bytes` of all tensors that kernels read and write, each at its full
size; `kernels` started; `kept`, the memory that a forward pass leaves behind for the backward pass, outputs included.
Measured: `time`, the ratio of the medians of repeats that alternate between the two; on a CPU of processor time, which
other processes do not lengthen. `claims` names the columns that the change is there to lower; where inputs are small,
the weights can outweigh it. What starting kernels and waiting for them costs shows on a GPU only.

`difference` is the largest of an output, as part of its largest value (of masks, the pixels that differ, as part of
all), `gradients` that of all gradients as one vector, by norm. The script fails, after its report, where one of them
exceeds `tolerance`. Forward passes are in evaluation mode without gradients; backward passes start from random ones.
Precisions but fp32 are autocast; the loss and post-processing are in float32 always.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from changes import FLOAT32, UNDER_AUTOCAST, Change, Setting, models
from common import DTYPES, autocast, device, median, parser, reporting, settle
from counting import Counter, flops
from torch import Tensor, nn

from sam3_hf import recomputation_sam3_lite
from sam3_hf.precision_sam3_lite import precision_name

# What rounding explains; a wrong result differs by about as much as it is large.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.2}


class Counted(NamedTuple):
    """What one call does; numbers under the names of their columns."""

    numbers: dict[str, int | None]
    outputs: Sequence
    gradients: dict[str, Tensor]


class Way:
    """One of the two ways of a change, in one pass and precision."""

    def __init__(self, function: Callable, change: Change, module: nn.Module | None, precision: str, training: bool):
        self.function, self.precision, self.training = function, precision, training
        self.leaves = {f"input {i}": tensor for i, tensor in enumerate(change.inputs)}
        if module is not None:
            module.train(training)
            self.leaves |= dict(module.named_parameters())
        for leaf in self.leaves.values():
            leaf.requires_grad_(training)

    def forward(self) -> Sequence:
        with autocast(self.precision), torch.set_grad_enabled(self.training):
            return self.function()

    def backward(self, outputs: Sequence[Tensor]) -> None:
        if self.training:
            reached = [tensor for tensor in outputs if tensor.requires_grad]
            torch.autograd.backward(reached, self.seeds)

    def seed(self, outputs: Sequence[Tensor]) -> None:
        """Gradients to start from that tell every element of every output from every other."""
        generator = torch.Generator().manual_seed(0)
        self.seeds = [
            torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in outputs if tensor.requires_grad
        ]

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def count(self) -> Counted:
        self.clear()
        with Counter(device=device().type) as counter:
            with flops() as arithmetic:
                outputs = self.forward()
            kept = counter.live if self.training else None
        if self.training:
            self.seed(outputs)
        with flops() as later, counter:
            self.backward(outputs)
        flop = arithmetic.get_total_flops() + later.get_total_flops()
        numbers = {"FLOP": flop, "bytes": counter.moved, "kernels": counter.kernels, "kept": kept}
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        self.clear()
        return Counted(numbers, outputs, gradients)

    def seconds(self) -> float:
        """Of one call; without a GPU of processor time, which other processes on the machine do not lengthen."""
        clock = time.perf_counter if device().type == "cuda" else time.process_time
        self.clear()
        settle()
        start = clock()
        self.backward(self.forward())
        settle()
        return clock() - start


@torch.no_grad()
def difference(ours: Tensor, stock: Tensor) -> float:
    """
    Of floats the largest, as part of the largest value; of masks the pixels that differ, as part of all.

    Raises:
        ValueError: outputs of different shapes.
    """
    if ours.shape != stock.shape:
        raise ValueError(f"outputs of different shapes: {tuple(ours.shape)} and {tuple(stock.shape)}")
    if stock.is_floating_point():
        return ((ours.float() - stock.float()).abs().max() / stock.float().abs().max()).item()
    return ((ours != stock).sum() / stock.count_nonzero()).item()


def gradient_difference(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> float:
    """
    Norm of the difference of all gradients as part of the norm of the stock ones.

    Raises:
        ValueError: gradients that only one of the two ways has.
    """
    if ours.keys() != stock.keys():
        raise ValueError(f"gradients of only one of the two ways: {sorted(ours.keys() ^ stock.keys())}")
    squares = torch.tensor(
        [
            [(ours[name].double() - value.double()).square().sum(), value.double().square().sum()]
            for name, value in stock.items()
        ]
    )
    apart, whole = squares.sum(0).sqrt()
    return (apart / whole).item()


def compare(change: Change, ways: Sequence[Way]) -> tuple[dict, dict]:
    """What the counts predict, and how far the results of the two ways are apart."""
    stock, ours = (way.count() for way in ways)
    pairs = zip(change.finish(ours.outputs), stock.outputs, strict=True)
    apart = {
        "difference": torch.tensor([difference(*pair) for pair in pairs]).max().item(),  # not finite if one is not
        "gradients": gradient_difference(ours.gradients, stock.gradients) if stock.gradients else None,
    }
    gains = {name: of / ours.numbers[name] if of else None for name, of in stock.numbers.items()}
    return gains, apart


def measure(change: Change, precision: str, training: bool, repeats: int) -> dict:
    """A row of the table."""
    modules = change.modules or (None, None)
    functions = zip((change.stock, change.ours), modules, strict=True)
    ways = [Way(function, change, module, precision, training) for function, module in functions]
    gains, apart = compare(change, ways)
    seconds = [[way.seconds() for way in ways] for _ in range(repeats)]
    stock, ours = (median(list(column)) for column in zip(*seconds, strict=True))
    return {
        "change": change.name,
        "pass": "forward + backward" if training else "forward",
        "precision": precision,
        **gains,
        "time": stock / ours,
        "stock s": stock,
        "our s": ours,
        **apart,
        "tolerance": TOLERANCES[precision],
        "claims": ", ".join(change.training_claims if training else change.claims),
    }


def measurements(arguments: argparse.Namespace) -> Iterator[dict]:
    both = models(arguments.preset, arguments.image_size)
    settings = {name: Setting(*both, arguments.prompts, DTYPES[name]) for name in {"fp32", *arguments.precisions}}
    for change_in in (*UNDER_AUTOCAST, *FLOAT32):
        for precision in arguments.precisions if change_in in UNDER_AUTOCAST else ["fp32"]:
            change = change_in(settings[precision])
            passes = [False] if change.training_claims is None else [False, True]
            for training in passes:
                yield measure(change, precision, training, arguments.repeats)


def mistakes(rows: list[dict]) -> list[str]:
    """A line for each row whose outputs or gradients differ by more than rounding, or are not finite."""
    return [
        f"{row['change']} ({row['pass']}, {row['precision']}): outputs differ by {row['difference']:.2g}, "
        f"gradients by {row['gradients'] or 0:.2g}; {row['tolerance']:g} may be rounding"
        for row in rows
        if not (row["difference"] <= row["tolerance"] and (row["gradients"] or 0) <= row["tolerance"])
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", default="tiny", help="sizes of both models; default: %(default)s")
    options.add_argument("--image-size", type=int, help="side of the input in pixels; default: the preset's")
    options.add_argument("--prompts", type=int, default=4, help="on the one image; default: %(default)s")
    options.add_argument(
        "--precisions",
        nargs="+",
        type=precision_name,
        choices=DTYPES,
        default=["fp32", "bf16"],
        help="all but fp32: autocast",
    )
    options.add_argument("--repeats", type=int, default=3, help="of each way to time; default: %(default)s")
    arguments = options.parse_args()
    # What is recomputed at full size is here too: a miniature would keep its small tensors.
    everything = mock.patch.object(recomputation_sam3_lite, "WORTH_IT", 0)
    with everything, reporting(arguments) as (rows, _):
        for row in measurements(arguments):
            rows.append(row)
    wrong = mistakes(rows)
    if wrong:
        sys.exit("Not what stock SAM 3 computes:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
