"""What the benchmarks on CUDA share: the device, its description, and a clock."""

import hashlib
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.native import NativeLibrary


def require(library: NativeLibrary) -> None:
    """Refuse to measure without a device, or without the kernels.

    Raises:
        SystemExit: with the reason.
    """
    if not torch.cuda.is_available():
        raise SystemExit(
            f"nothing to measure: PyTorch {torch.__version__} sees no CUDA device (torch.cuda.is_available() is False)"
        )
    if library.get() is None:
        raise SystemExit(f"nothing to measure: the library {library.name} is not available ({library.state})")


def describe_device(library: NativeLibrary, source_folder: Path) -> dict[str, Any]:
    """Device, versions, and a hash of the sources that were compiled."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    sources = sorted(path for path in source_folder.rglob("*") if path.is_file())
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "driver_and_clocks": _output(query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _output(["nvcc", "--version"]).split()[-1],
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "library": library.state,
    }


def headline(device: dict[str, Any]) -> str:
    """Device and versions in one line."""
    return (
        f"{device['name']} (compute capability {device['capability']}), torch {device['torch']}, CUDA {device['cuda']}"
    )


def milliseconds(call: Callable[[], object], repetitions: int) -> float:
    """The median time of a call on the device, in ms, after one call to warm up."""
    call()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
