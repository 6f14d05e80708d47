"""The CUDA library of the solvers: its functions as ctypes sees them (csrc/cuda_solver/interface.h)."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from quantlab_kernels.cuda_common import check_driver, recipe_for_this_machine
from quantlab_kernels.native import NativeLibrary

SOURCE_FOLDER = Path(__file__).parent / "csrc" / "cuda_solver"

FLAGS = ("-fmad=false",)
"""Products and sums stay apart where the sources keep them apart: a level minus a weight must not depend on whether the
compiler fused the product that the level comes from."""

BLOCK_ROWS = 32
"""Rows of errors by position are padded to a multiple of this."""

MAX_BLOCK = 64
"""Inputs of a block of block descent, which has this many places."""

SEGMENT = 224
"""Inputs whose codes are sorted together."""


class Books(Structure):
    """`Books` of interface.h."""

    _fields_ = (
        ("levels", c_void_p),
        ("midpoints", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("groups", c_int32),
        ("group_size", c_int32),
        ("count", c_int32),
    )


class Sweep(Structure):
    """`Sweep` of interface.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("columns", c_void_p),
        ("feedback", c_void_p),
        ("energy", c_void_p),
        ("shift", c_void_p),
        ("targets", c_void_p),
        ("behind", c_void_p),
        ("codes", c_void_p),
        ("error", c_void_p),
        ("loss", c_void_p),
        ("rounded", c_void_p),
        ("feedback_pitch", c_int64),
        ("behind_pitch", c_int64),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("begin", c_int32),
        ("end", c_int32),
    )


class Descent(Structure):
    """`Descent` of interface.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("diagonal", c_void_p),
        ("inverse_diagonal", c_void_p),
        ("error", c_void_p),
        ("codes", c_void_p),
        ("gain", c_void_p),
        ("hessian_pitch", c_int64),
        ("error_pitch", c_int64),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("passes", c_int32),
        ("mode", c_int32),
        ("closer", c_float),
    )


class Blocks(Structure):
    """`Blocks` of interface.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("within", c_void_p),
        ("feedback", c_void_p),
        ("upper", c_void_p),
        ("precision", c_void_p),
        ("error", c_void_p),
        ("codes", c_void_p),
        ("gained", c_void_p),
        ("hessian_pitch", c_int64),
        ("error_pitch", c_int64),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("visited", c_int32),
        ("size", c_int32),
    )


class Factors(Structure):
    """`Factors` of interface.h."""

    _fields_ = (
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("within", c_void_p),
        ("feedback", c_void_p),
        ("upper", c_void_p),
        ("precision", c_void_p),
        ("failed", c_void_p),
        ("damping", c_double),
        ("inputs", c_int32),
        ("visited", c_int32),
        ("size", c_int32),
    )


class Joint(Structure):
    """`Joint` of interface.h."""

    _fields_ = (
        ("product", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("tables", c_void_p),
        ("loss", c_void_p),
        ("codes", c_void_p),
        ("sums", c_void_p),
        ("gradient", c_void_p),
        ("matrices", c_void_p),
        ("ridge", c_double),
        ("threshold", c_double),
        ("rows", c_int32),
        ("inputs", c_int32),
        ("visited", c_int32),
        ("levels", c_int32),
        ("passes", c_int32),
    )


class Cluster(Structure):
    """`Cluster` of interface.h."""

    _fields_ = (
        ("values", c_void_p),
        ("weights", c_void_p),
        ("mass", c_void_p),
        ("moment", c_void_p),
        ("share", c_void_p),
        ("cumulative", c_void_p),
        ("distinct", c_void_p),
        ("centers", c_void_p),
        ("rows", c_int32),
        ("size", c_int32),
        ("levels", c_int32),
        ("iterations", c_int32),
        ("greedy", c_int32),
    )


def declare(library: ctypes.CDLL) -> None:
    """Set the argument types of all functions; each takes a device and a stream in the end.

    Raises:
        BuildError: the library cannot work with the driver.
    """
    pointer, count, number = c_void_p, c_int32, c_double
    arguments: dict[str, tuple[object, ...]] = {
        "sweep": (POINTER(Sweep), POINTER(Books)),
        "descend": (POINTER(Descent), POINTER(Books)),
        "factor_blocks": (POINTER(Factors),),
        "descend_in_blocks": (POINTER(Blocks), POINTER(Books)),
        "descend_jointly": (POINTER(Joint),),
        "sort_codes": (pointer, count, count, count, pointer, pointer),
        "sum_hessian_rows": (pointer, pointer, pointer, count, count, count, pointer),
        "sums_by_code": (pointer, pointer, count, count, count, count, pointer),
        "solve": (pointer, count, count, number, number, count, pointer, pointer, pointer),
        "look_up": (pointer, pointer, count, count, count, count, pointer),
        "cluster": (POINTER(Cluster),),
        "fill_cells": (pointer, pointer, c_int64, count, count, count, pointer, pointer, pointer, pointer),
    }
    for name, types in arguments.items():
        getattr(library, f"quantlab_solver_{name}").argtypes = (*types, c_int32, c_void_p)
    check_driver(library, "quantlab_solver")


LIBRARY = NativeLibrary("solver-cuda", lambda: recipe_for_this_machine("solver-cuda", SOURCE_FOLDER, FLAGS), declare)
