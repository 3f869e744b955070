"""Counts what a step would do on a GPU, without one: fake CUDA tensors have shapes and dtypes, but no memory.

Operations run as they would in eager mode on CUDA, with its autocast rules; attention is counted as the
memory-efficient kernel. What a kernel needs inside of itself, and what the allocator wastes, is not counted. The
backward pass cannot run there, as autograd asks the device for a context, but does on fake CPU tensors.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder

DEVICE = "cuda"
ATEN = torch.ops.aten
# Operations that start no kernel though their schema does not say so.
NO_KERNEL = {ATEN._unsafe_view.default, ATEN.empty.memory_format, ATEN.empty_like.default, ATEN.empty_strided.default}


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """`scaled_dot_product_attention` by the kernel that CUDA would choose where there is a mask."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        attn_mask = None if attn_mask is None else attn_mask.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    attend = ATEN._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def fake_cpu(grid_side: int) -> Iterator[None]:
    """
    Tensors made within are fake.

    Args:
        grid_side: patches per side of the image, which stock `Sam3DetrDecoder` would read back from the device.
    """

    def coordinates(_, height, width, dtype, device):
        return (torch.arange(grid_side, device=device, dtype=dtype) / grid_side,) * 2

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", efficient_attention),
        mock.patch.object(Sam3DetrDecoder, "_get_coords", coordinates),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def fake_cuda(grid_side: int) -> Iterator[None]:
    """Tensors made within are fake, and on a CUDA device that does not exist; see `fake_cpu`."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        fake_cpu(grid_side),
        torch.device(DEVICE),
    ):
        yield


class Counter(TorchDispatchMode):
    """
    Kernels started, bytes of all tensors that they read and write, and bytes of the storages on a device that live at
    once, from `base` bytes on.
    """

    def __init__(self, base: int = 0, device: str = DEVICE):
        super().__init__()
        self.kernels, self.moved, self.live, self.peak = 0, 0, base, base
        self.device = device
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function.is_view:
            return outputs
        if function.namespace == "aten" and function not in NO_KERNEL:
            self.kernels += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, outputs)) if isinstance(leaf, torch.Tensor)]
            # What a broadcast tensor has once in memory, the cache serves from then on.
            self.moved += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        if function._schema.is_mutable:  # what it writes to was there before, as are weights that views are of
            return outputs
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self._enter(tensor.untyped_storage())
        return outputs

    def _enter(self, storage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.live -= size


@contextmanager
def flops() -> Iterator[FlopCounterMode]:
    """Counts a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter:
        yield counter
