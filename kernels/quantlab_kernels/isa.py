"""The instruction sets that CPU libraries are compiled for, and the one this machine runs.

A library has the same interface for every instruction set and is compiled for one of them, so each machine
compiles only what it uses and no code of one set can leak into another.
"""

import enum
import functools
import os
import platform
from pathlib import Path

from quantlab_kernels.build import Recipe, build_library, cxx_command
from quantlab_kernels.native import open_library

CPU_SOURCES = Path(__file__).parent / "csrc" / "cpu"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


class Isa(enum.IntEnum):
    """Instruction sets, each containing the ones before it."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512BF16 = 3

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler needs to use it."""
        return ((), _AVX2, _AVX512, (*_AVX512, "-mavx512bf16"))[self]


@functools.cache
def detected_isa() -> Isa:
    """The best instruction set of this machine, by CPUID.

    Raises:
        BuildError: the query could not be compiled.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return Isa.PORTABLE
    query = Recipe("isa", (CPU_SOURCES / "isa.cpp",), (), cxx_command())
    return Isa(open_library(build_library(query)).quantlab_cpu_isa())


def chosen_isa() -> Isa:
    """The best instruction set, or what `QUANTLAB_CPU_ISA` asks for.

    Raises:
        ValueError: the environment asks for something unknown or something this machine lacks.
        BuildError: see `detected_isa`.
    """
    best = detected_isa()
    if not (wanted := os.environ.get("QUANTLAB_CPU_ISA")):
        return best
    available = [isa.name.lower() for isa in Isa if isa <= best]
    if wanted not in available:
        raise ValueError(f"QUANTLAB_CPU_ISA={wanted!r}: this machine runs {', '.join(available)}")
    return Isa[wanted.upper()]


def cpu_recipe(
    name: str, sources: tuple[str, ...], headers: tuple[str, ...], isa: Isa, flags: tuple[str, ...] = ()
) -> Recipe:
    """How to make a library from files in `csrc/cpu` for one instruction set, with `flags` besides the usual ones."""
    return Recipe(
        name=f"{name}-{isa.name.lower()}",
        sources=tuple(CPU_SOURCES / source for source in sources),
        headers=tuple(CPU_SOURCES / header for header in headers),
        command=cxx_command((*isa.flags, *flags)),
    )
