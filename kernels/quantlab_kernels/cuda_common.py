"""What the CUDA libraries share: how their sources are compiled, and the stream that work goes to."""

import ctypes
import os
import shutil
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


def cuda_recipe(
    name: str, folder: Path, architectures: Sequence[str], flags: Sequence[str] = (), compiler: str = "nvcc"
) -> Recipe:
    """How to make a library of all sources in a folder.

    The runtime is linked statically, so that the library needs no CUDA of PyTorch's version, nor any to be loaded.

    Args:
        name: of the library; architectures are added to it.
        folder: sources, and headers at any depth.
        architectures: such as "90".
        flags: further ones of nvcc.
        compiler: nvcc.
    """
    headers = {*folder.rglob("*.h"), *folder.rglob("*.cuh"), *INTRINSICS_FOLDER.glob("*.cuh")}
    return Recipe(
        name=f"{name}-sm{'-'.join(architectures)}",
        sources=tuple(sorted(folder.glob("*.cu"))),
        headers=tuple(sorted(headers)),
        command=(
            compiler,
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


def recipe_for_this_machine(name: str, folder: Path, flags: Sequence[str] = ()) -> Recipe:
    """How to make a library for the visible devices: code for them alone compiles in a fraction of the time.

    Args:
        name: of the library.
        folder: sources and headers.
        flags: further ones of nvcc.

    Raises:
        BuildError: no device is new enough, or there is no nvcc.
    """
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    architectures = [f"{major}{minor}" for major, minor in capabilities if (major, minor) >= OLDEST_CAPABILITY]
    if not architectures:
        raise BuildError(
            f"the CUDA kernels need a device of compute capability {OLDEST_CAPABILITY} or newer; found {capabilities}"
        )
    return cuda_recipe(name, folder, architectures, flags, _find_nvcc())


def check_driver(library: ctypes.CDLL, prefix: str) -> None:
    """Call a library once, before it is relied on.

    Args:
        library: the loaded library.
        prefix: of its functions `probe` and `error`.

    Raises:
        BuildError: it cannot work, for example since the driver is older than the toolkit.
    """
    error = getattr(library, f"{prefix}_error")
    error.argtypes, error.restype = (ctypes.c_int,), ctypes.c_char_p
    status = getattr(library, f"{prefix}_probe")()
    if status != 0:
        raise BuildError(
            f"the CUDA kernels are compiled, but CUDA answers with status {status}: {error(status).decode()}; "
            "is nvcc of a newer CUDA than the driver (nvidia-smi) supports? CUDA_HOME chooses another one"
        )


def current_stream(device: torch.device) -> int:
    """Handle of the stream that PyTorch uses now."""
    return torch.cuda.current_stream(device).cuda_stream


def _find_nvcc() -> str:
    """That of CUDA_HOME if it is set, else the one on the PATH, else the one of the usual folder.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if found := shutil.which(place):
            return found
    raise BuildError(
        f"the CUDA kernels are compiled by nvcc, which is not there ({', '.join(places)}); install the CUDA toolkit, "
        "or say in CUDA_HOME where it is"
    )
