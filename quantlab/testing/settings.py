"""The global settings that belong to the engine: how they are read, changed and put back."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cuDNN allow_tf32": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
    ),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradient mode": (torch.is_grad_enabled, lambda value: torch.set_grad_enabled(value)),
    "threads": (torch.get_num_threads, torch.set_num_threads),
}


def read_settings() -> dict[str, object]:
    """The settings as they are now, by name."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


@contextmanager
def settings_restored() -> Iterator[None]:
    """Put back, on leaving, whatever was changed inside: one careless method must not spoil the next check."""
    before = read_settings()
    try:
        yield
    finally:
        for name, (read, write) in _SETTINGS.items():
            if read() != before[name]:
                write(before[name])


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Inside, the PyTorch reference takes the place of native kernels."""
    before = os.environ.get("QUANTLAB_KERNELS")
    os.environ["QUANTLAB_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["QUANTLAB_KERNELS"]
        else:
            os.environ["QUANTLAB_KERNELS"] = before
