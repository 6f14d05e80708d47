"""How much memory this process has used and uses, and how much there is."""

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


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


def physical_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
