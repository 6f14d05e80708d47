"""The native library of the solvers: where it comes from and what its functions look like."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import replace

from quantlab_kernels.build import Recipe
from quantlab_kernels.isa import Isa, chosen_isa, cpu_recipe
from quantlab_kernels.native import NativeLibrary

_SOURCES = (
    "solver_sweep.cpp",
    "solver_descent.cpp",
    "solver_blocks.cpp",
    "solver_joint.cpp",
    "solver_gram.cpp",
    "solver_levels.cpp",
    "solver_kmeans.cpp",
    "solver_products.cpp",
)
_HEADERS = ("solver_vector.h", "solver_tile.h", "solver_rounding.h", "solver_cholesky.h")


class SweepOperands(Structure):
    """`solver::Sweep` of solver_sweep.cpp."""

    _fields_ = (
        ("weight", c_void_p),
        ("columns", c_void_p),
        ("feedback", c_void_p),
        ("energy", c_void_p),
        ("shift", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
    )


class DescentOperands(Structure):
    """`solver::Descent` of solver_descent.cpp."""

    _fields_ = (
        ("weight", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("inverse_diagonal", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("sweeps", c_int64),
        ("mode", c_int64),
        ("closer", c_float),
    )


class BlockOperands(Structure):
    """`solver::Blocks` of solver_blocks.cpp."""

    _fields_ = (
        ("weight", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("within", c_void_p),
        ("feedback", c_void_p),
        ("upper", c_void_p),
        ("precision", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("visited", c_int64),
        ("size", c_int64),
    )


class JointOperands(Structure):
    """`solver::Joint` of solver_joint.cpp."""

    _fields_ = (
        ("product", c_void_p),
        ("hessian", c_void_p),
        ("order", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("visited", c_int64),
        ("levels", c_int64),
        ("passes", c_int64),
        ("ridge", c_double),
        ("threshold", c_double),
    )


class CodebookOperands(Structure):
    """`solver::Codebooks` of solver_rounding.h."""

    _fields_ = (
        ("levels", c_void_p),
        ("midpoints", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("groups", c_int64),
        ("group_size", c_int64),
        ("count", c_int64),
    )


def solver_recipe(isa: Isa) -> Recipe:
    """How to make the library for one instruction set.

    Products and sums stay apart where the sources keep them apart: a level minus a weight must not depend on whether
    the compiler fused the product that the level comes from.
    """
    recipe = cpu_recipe("solver", _SOURCES, _HEADERS, isa)
    return replace(recipe, command=(*recipe.command, "-ffp-contract=off"))


def declare(library: ctypes.CDLL) -> None:
    """Set the argument and result types of all functions."""
    sweep, descent = POINTER(SweepOperands), POINTER(DescentOperands)
    blocks, books = POINTER(BlockOperands), POINTER(CodebookOperands)
    pointer, count, threads = c_void_p, c_int64, c_int
    arguments: dict[str, tuple[object, ...]] = {
        "solver_sweep_scratch": (count,),
        "solver_sweep": (sweep, books, *(pointer,) * 5, threads),
        "solver_load_tiles": (sweep, pointer, threads),
        "solver_block_targets": (sweep, count, count, pointer, pointer, threads),
        "solver_round_block": (sweep, books, count, count, pointer, pointer, pointer, pointer, pointer, threads),
        "solver_store_tiles": (sweep, pointer, pointer, threads),
        "solver_descent_scratch": (count,),
        "solver_descend": (descent, books, pointer, pointer, pointer, pointer, threads),
        "solver_multiply": (pointer, pointer, count, count, pointer, pointer, threads),
        "solver_measure": (pointer, pointer, count, count, pointer, pointer, threads),
        "solver_factor_blocks": (pointer, count, pointer, count, count, c_double, *(pointer,) * 4, threads),
        "solver_blocks_scratch": (count,),
        "solver_descend_in_blocks": (blocks, books, pointer, pointer, pointer, pointer, threads),
        "solver_joint_scratch": (count, count),
        "solver_descend_jointly": (POINTER(JointOperands), *(pointer,) * 4, threads),
        "solver_triangle_floats": (count,),
        "solver_pack_triangle": (pointer, count, pointer, threads),
        "solver_gram_scratch": (count, count),
        "solver_gram": (pointer, pointer, count, count, count, pointer, pointer, threads),
        "solver_kmeans_scratch": (count, count),
        "solver_cluster": (*(pointer,) * 4, *(count,) * 4, c_int, pointer, pointer, threads),
        "solver_cluster_in_cells": (pointer, pointer, *(count,) * 6, c_int, pointer, pointer, threads),
        "solver_solve": (pointer, count, count, c_double, c_double, count, pointer, pointer, threads),
        "solver_sums_by_code": (pointer, pointer, count, count, count, pointer, threads),
        "solver_select_levels": (pointer, pointer, count, count, count, pointer, threads),
        "solver_relabel": (pointer, pointer, count, count, count, pointer, threads),
        "solver_product_scratch": (count,),
        "solver_add_products": (pointer, pointer, count, count, count, pointer, pointer, threads),
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = c_int64 if name in _COUNTS else None


_COUNTS = frozenset(
    {
        "solver_sweep_scratch",
        "solver_descent_scratch",
        "solver_factor_blocks",
        "solver_blocks_scratch",
        "solver_joint_scratch",
        "solver_triangle_floats",
        "solver_gram_scratch",
        "solver_kmeans_scratch",
        "solver_product_scratch",
        "solver_solve",
    }
)

LIBRARY = NativeLibrary("solver", lambda: solver_recipe(chosen_isa()), declare)
