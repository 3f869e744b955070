"""Tensors of which each process of FSDP holds a part, put together and taken apart; others are left as they are."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def joined(state: dict) -> dict:
    """The same, also in dicts within, with whole tensors in every process; called by all of them."""
    return {key: _joined(value) for key, value in state.items()}


def _joined(value):
    if isinstance(value, dict):
        return joined(value)
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a whole tensor of a parameter's shape, which every process has."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def load_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads the state of an optimizer that `joined` has put together."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: part_like(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
