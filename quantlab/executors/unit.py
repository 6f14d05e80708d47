"""How a unit runs in a process of a cluster: under the settings of the driver, and never failing silently."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

_KERNELS = "QUANTLAB_KERNELS"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a result depends on besides arguments, and where relative paths begin.

    Attributes:
        threads: of torch; sums are split by it, so that it decides their last digits.
        gradients: whether torch records operations.
        kernels: choice of native or reference kernels, or None.
        folder: working folder of the driver.
    """

    threads: int
    gradients: bool
    kernels: str | None
    folder: str

    @classmethod
    def current(cls) -> "Settings":
        """Those of this process."""
        return cls(
            threads=torch.get_num_threads(),
            gradients=torch.is_grad_enabled(),
            kernels=os.environ.get(_KERNELS),
            folder=os.getcwd(),
        )

    def apply(self) -> None:
        """Make them those of this process."""
        torch.set_num_threads(self.threads)
        if self.kernels is None:
            os.environ.pop(_KERNELS, None)
        else:
            os.environ[_KERNELS] = self.kernels
        with suppress(OSError):  # only relative paths need it, and whoever opens one says what is missing
            os.chdir(self.folder)


@dataclass(frozen=True, eq=False)
class Failure:
    """What a unit raised, brought to the driver as a result, so that it is not taken for a lost machine."""

    error: Exception


def run_unit(settings: Settings, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a unit, or its Failure; a unit whose argument is a Failure has the same one."""
    for argument in arguments:
        if isinstance(argument, Failure):
            return argument
    settings.apply()
    try:
        with torch.set_grad_enabled(settings.gradients):
            return function(*arguments)
    except Exception as error:
        error.__dict__["remote_traceback"] = traceback.format_exc()
        return Failure(error)
