"""How the engine uses the machine, as opposed to what it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from quantlab.engine.solve import SolveOptions
from quantlab.skeleton import CPU

OptionsOf = Callable[[str], SolveOptions | None]
"""The options of a layer by its full name in the model; None leaves the layer as it is."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine uses the machine.

    Attributes:
        memory_budget_bytes: the memory that the process may occupy; None for no limit.
        activations: where hidden states are kept between blocks; "auto" takes memory if there is room.
        calibration_shards: parts of the calibration set whose sums are added in order.
        rows_per_unit: rows that a row-independent method is given at once; None for all that the budget allows.
        device: where the model computes and layers are solved, one block at a time.
        device_memory_budget_bytes: memory that may be occupied there, if it is not main memory; None for no limit.
    """

    memory_budget_bytes: int | None = None
    activations: Literal["auto", "ram", "disk"] = "auto"
    calibration_shards: int = 1
    rows_per_unit: int | None = None
    device: torch.device = CPU
    device_memory_budget_bytes: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether the model computes in another memory than the main one."""
        return self.device != CPU

    @property
    def working_budget_bytes(self) -> int | None:
        """The budget of the memory in which the model computes; None for no limit."""
        return self.device_memory_budget_bytes if self.on_device else self.memory_budget_bytes


@contextmanager
def single_threaded(active: bool) -> Iterator[None]:
    """Inside, if active, torch computes every operation on one thread.

    Matrix products and factorisations split their sums by the number of threads, so their last digits depend on
    it; there is no other setting that takes this dependence away.
    """
    threads = torch.get_num_threads()
    if active:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if active:
            torch.set_num_threads(threads)
