"""Where layers are solved: beside the model in the memory of the host, or on a GPU."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Value = TypeVar("Value")


def solving_device(gpus: float) -> torch.device:
    """The device for a unit that occupies so many CUDA devices; the executor has made them the only visible ones."""
    return torch.device("cuda" if gpus > 0 else "cpu")


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
