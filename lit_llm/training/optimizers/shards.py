"""Rows of parameters that several devices share (FSDP2), for optimisers that look at more than single entries.

A sharded parameter is a DTensor: every device has some of its rows. On one device, and where every device has the whole
model, each function returns what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_rows(tensor: Tensor) -> Tensor:
    """Rows of a tensor on this device. In-place operations on them change the sharded tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def sharded_as(parameter: Tensor, rows: Tensor) -> Tensor:
    """A tensor that consists of every device's rows, which are divided as those of `parameter` are."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, its rows gathered from the devices."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, sharded as `parameter` is; each device takes its rows of the copy that it has."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def summed_over_shards(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Sums over the devices that share `parameter`."""
    if isinstance(parameter, DTensor):
        torch.distributed.all_reduce(numbers, group=parameter.device_mesh.get_group())
    return numbers


WHOLE_STATE = ("step", "column_moment")
"""Entries of an optimiser's state that every device has in full."""


def divide_state(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state, sharded as its parameters are. A hook for `register_load_state_dict_pre_hook`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: divided_as(parameters[index], value) if name not in WHOLE_STATE else value
            for name, value in entries.items()
        }
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
