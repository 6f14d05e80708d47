"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantlab.engine.device import synchronize
from quantlab.skeleton import CPU

PARTS = ("load", "forward", "statistics", "solve", "write")


class Profile:
    """Seconds by part of the engine's work; parts do not nest.

    Args:
        device: where the work is done.

    Attributes:
        seconds: by name of the part.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside to a part."""
        start = time.monotonic()
        try:
            yield
        finally:
            synchronize(self._device)
            self.seconds[part] += time.monotonic() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call, rounded, and start anew."""
        taken = {part: round(value, 4) for part, value in self.seconds.items()}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        return taken
