"""Where the model computes and where its layers are solved: in main memory, or on a GPU."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from quantlab.errors import UsageError
from quantlab.memory import physical_bytes

Value = TypeVar("Value")


def is_there(device: torch.device) -> bool:
    """Whether this machine has a device."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def require_device(device: torch.device) -> None:
    """Make sure that a device is there, before any work.

    Raises:
        UsageError: it is not.
    """
    if not is_there(device):
        raise UsageError(
            f"there is no device {device}: PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices "
            "here; compute on cpu, or install a PyTorch built for CUDA (`quantlab doctor`)"
        )


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given to do; the CPU never has anything left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capacity_bytes(device: torch.device) -> int:
    """The memory that a device has."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_bytes()


def peak_device_bytes(device: torch.device) -> int:
    """The most that tensors of this process have occupied on a GPU at a time; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def solving_device(gpus: float, beside: torch.device) -> torch.device:
    """The device for a unit.

    Args:
        gpus: CUDA devices that it occupies; the executor has made them the only visible ones.
        beside: where the weights are; it is solved there if it occupies none.
    """
    return torch.device("cuda") if gpus > 0 else beside


def moved(value: Value, device: torch.device) -> Value:
    """A tensor, or a dataclass with tensors at any depth, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return cast(Value, value.to(device))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: moved(old, device)
            for field in fields(value)
            if isinstance(old := getattr(value, field.name), Tensor) or is_dataclass(old)
        }
        return cast(Value, replace(cast(Any, value), **changed))
    return value
