"""What the CUDA libraries share: how their sources are compiled, and the stream that work goes to."""

from collections.abc import Sequence
from pathlib import Path

import torch

from quantlab_kernels.build import BuildError, Recipe

INTRINSICS_FOLDER = Path(__file__).parent / "csrc" / "cuda" / "device"
"""Holds intrinsics.cuh, which all CUDA sources include; the tests put another one in its place."""

OLDEST_CAPABILITY = (8, 0)
"""mma.sync on 16 x 8 x 16 and cp.async begin with Ampere."""


def compile_flags(architectures: Sequence[str]) -> tuple[str, ...]:
    """Flags of nvcc for machine code of some architectures, such as "90"."""
    targets = [flag for arch in architectures for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    return ("-std=c++20", "-O3", "-I", str(INTRINSICS_FOLDER), *targets)


def cuda_recipe(name: str, folder: Path, architectures: Sequence[str], flags: Sequence[str] = ()) -> Recipe:
    """How to make a library of all sources in a folder.

    The runtime is linked statically, so that the library needs no CUDA of PyTorch's version, nor any to be loaded.

    Args:
        name: of the library; architectures are added to it.
        folder: sources, and headers at any depth.
        architectures: such as "90".
        flags: further ones of nvcc.
    """
    headers = {*folder.rglob("*.h"), *folder.rglob("*.cuh"), *INTRINSICS_FOLDER.glob("*.cuh")}
    return Recipe(
        name=f"{name}-sm{'-'.join(architectures)}",
        sources=tuple(sorted(folder.glob("*.cu"))),
        headers=tuple(sorted(headers)),
        command=(
            "nvcc",
            *compile_flags(architectures),
            *flags,
            "-shared",
            "-cudart",
            "static",
            "--threads",
            "0",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
        ),
    )


def architectures_of_this_machine() -> list[str]:
    """Those of the visible devices: code for them alone compiles in a fraction of the time of code for all.

    Raises:
        BuildError: no device is new enough.
    """
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    architectures = [f"{major}{minor}" for major, minor in capabilities if (major, minor) >= OLDEST_CAPABILITY]
    if not architectures:
        raise BuildError(
            f"the CUDA kernels need a device of compute capability {OLDEST_CAPABILITY} or newer; found {capabilities}"
        )
    return architectures


def current_stream(device: torch.device) -> int:
    """Handle of the stream that PyTorch uses now."""
    return torch.cuda.current_stream(device).cuda_stream
