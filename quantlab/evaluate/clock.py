"""Times on whatever device does the work."""

import time
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # its home, but not declared
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

ACTIVITIES = (ProfilerActivity.CUDA,)
"""Without those of the CPU, whose recording costs the most and says nothing about kernels."""

SECTION_TICKS = 32
"""After which the profiler's events are added up and dropped: those of a whole generation are millions."""


class Clock:
    """Times between ticks; on a CUDA device by events, so that ticking does not make the device wait.

    Args:
        device: that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        """Mark this moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Seconds between successive ticks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


class KernelClock:
    """Seconds that kernels on a CUDA device take, gaps between them excluded, by the torch profiler.

    The profiler slows the work down, so nothing else should be timed meanwhile. Not yet run on a GPU.

    Attributes:
        total_s: of all sections, when the block has ended.
    """

    def __init__(self) -> None:
        self.total_s = 0.0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def tick(self) -> None:
        """Say that a step of the work has been started."""
        self._ticks += 1
        if self._ticks == SECTION_TICKS:
            self._end()
            self._begin()

    def _begin(self) -> None:
        self._ticks = 0
        self._profiler = profile(activities=ACTIVITIES)
        self._profiler.start()

    def _end(self) -> None:
        self._profiler.stop()  # waits for the device
        self.total_s += kernel_s(self._profiler.events())


def kernel_s(events: Iterable[FunctionEvent]) -> float:
    """Seconds of all kernels and copies on a CUDA device among the events of the torch profiler.

    As in the last line of the profiler's own table, ranges that only name a part of the program do not count.
    """
    kernels = (event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    microseconds: float = sum(event.self_device_time_total for event in kernels)
    return microseconds / 1e6
