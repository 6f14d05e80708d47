"""How much memory this process has used and uses, over time and now, and how much there is."""

import ctypes
import gc
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_STATUS = Path("/proc/self/status")
_MOST_INTERVALS = 160
_FIRST_INTERVAL_S = 0.05
_LONGEST_WAIT_S = 0.5


def peak_rss_bytes() -> int:
    """The largest resident memory of this process since it began, or since `reset_peak_rss`."""
    if _STATUS.is_file():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Begin a new measurement with `peak_rss_bytes`, where the system can (Linux).

    Memory that was freed but kept for reuse is given back first, so that it does not count again.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def current_rss_bytes() -> int | None:
    """The resident memory of this process now; None where the system does not tell (it is not Linux)."""
    return _status_bytes("VmRSS") if _STATUS.is_file() else None


class MemoryTimeline:
    """The resident memory of this process over time, seen by a thread; empty where the system does not tell.

    A context manager. Of each interval the largest value seen is kept; intervals double as the work goes on, so that
    there are never many.
    """

    def __init__(self) -> None:
        self._interval_s = _FIRST_INTERVAL_S
        self._peaks: list[int] = []
        self._stages: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory timeline")

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, stage: str) -> None:
        """Note that a stage of the work begins now."""
        self._stages[stage] = round(time.monotonic() - self._started, 3)

    def record(self) -> dict[str, Any]:
        """What was seen so far: "interval_s", the peak "bytes" of every interval, and when the "stages" began in s."""
        return {"interval_s": self._interval_s, "bytes": list(self._peaks), "stages": dict(self._stages)}

    def _watch(self) -> None:
        while (occupied_bytes := current_rss_bytes()) is not None:
            self._note(time.monotonic() - self._started, occupied_bytes)
            if self._ended.wait(min(self._interval_s, _LONGEST_WAIT_S)):
                return

    def _note(self, passed_s: float, occupied_bytes: int) -> None:
        while passed_s >= _MOST_INTERVALS * self._interval_s:
            self._interval_s *= 2
            self._peaks = [max(self._peaks[index : index + 2]) for index in range(0, len(self._peaks), 2)]
        place = int(passed_s / self._interval_s)
        self._peaks += [occupied_bytes] * (place + 1 - len(self._peaks))  # nobody looked in the intervals between
        self._peaks[place] = max(self._peaks[place], occupied_bytes)


def physical_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
