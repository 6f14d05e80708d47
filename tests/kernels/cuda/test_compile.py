"""What the compiler of the device makes of the kernels: no spills, and registers within the budget.

nvcc needs no GPU. The first architecture is part of the default tests; its result is kept in the cache of pytest
until a source, the compiler or the flags change.
"""

import hashlib
import itertools
import re
import shutil
import subprocess

import pytest

from quantlab_kernels import cuda_library, solver_cuda_library
from quantlab_kernels.cuda_common import INTRINSICS_FOLDER, compile_flags

ARCHITECTURES = ["80", "86", "89", "90"]

# A block of matmul_small may have 512 threads, which share 65536 registers: above 128 it does not start at all.
# At 128, matmul_staged with its 256 threads has two blocks per multiprocessor.
PER_ROW, PER_GROUP, UNIFORM = range(3)
BUDGETS = {
    # (kernel, tokens, codebook): registers for 2, 3, 4 bits
    ("matmul_small", 8, PER_ROW): (64, 72, 88),
    ("matmul_small", 8, PER_GROUP): (88, 96, 104),
    ("matmul_small", 8, UNIFORM): (88, 96, 104),
    ("matmul_small", 16, PER_ROW): (72, 88, 96),
    ("matmul_small", 16, PER_GROUP): (96, 104, 120),
    ("matmul_small", 16, UNIFORM): (112, 120, 128),
    ("matmul_staged", 32, PER_ROW): (96, 96, 104),
    ("matmul_staged", 32, PER_GROUP): (96, 96, 112),
    ("matmul_staged", 32, UNIFORM): (128, 128, 128),
    ("matmul_staged", 64, PER_ROW): (128, 128, 128),
    ("matmul_staged", 64, PER_GROUP): (128, 128, 128),
    ("dequantize_tiles", None, PER_ROW): (40, 40, 48),
    ("dequantize_tiles", None, PER_GROUP): (40, 48, 56),
    ("dequantize_tiles", None, UNIFORM): (40, 48, 56),
    ("dequantize_planes", None, None): (40,),
    ("add_outliers", None, None): (40,),
}
# Of the solvers: the sweep and block descent have two blocks of 256 threads per multiprocessor, coordinate descent one,
# and the sum over rows of the Hessian, which lives on many loads under way, three; k-means has four.
SOLVER_BUDGETS = {
    "sweep_rows": 128,
    "descend_rows": 192,
    "descend_blocks": 128,
    "factor_blocks": 64,
    "descend_jointly": 128,
    "sort_codes": 32,
    "sum_hessian_rows": 80,
    "sum_by_code": 64,
    "solve_rows": 80,
    "look_up": 32,
    "cluster_rows": 64,
    "fill_cells": 64,
}
VARIANT = re.compile(
    r"(?P<kernel>\w+)<(?P<element>\w+)(?:, (?P<bits>\d), \(quantlab::Codebook\)(?P<codebook>\d)"
    r"(?:, (?P<tokens>\d+)(?:, \d+)?)?)?>\("
)
FOLDERS = {
    cuda_library.SOURCE_FOLDER: (),
    solver_cuda_library.SOURCE_FOLDER: solver_cuda_library.FLAGS,
}


@pytest.fixture
def resources(tmp_path, request):
    """Compiles a source and returns, for every kernel, its demangled name and what it takes."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is needed")

    def compile_source(folder, source, architecture):
        command = ["nvcc", *compile_flags([architecture]), *FOLDERS[folder], "-cubin", "-Xptxas", "-v"]
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        headers = {*folder.rglob("*.h"), *folder.rglob("*.cuh"), *INTRINSICS_FOLDER.glob("*.cuh")}
        content = b"\0".join(path.read_bytes() for path in (folder / source, *sorted(headers)))
        key = hashlib.sha256(f"{command}{version}{source}".encode() + content).hexdigest()
        output = request.config.cache.get(f"quantlab/ptxas-{key}", None)
        if output is None:
            command += [str(folder / source), "-o", str(tmp_path / "kernels.cubin")]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            output = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True, check=True).stdout
            request.config.cache.set(f"quantlab/ptxas-{key}", output)
        return parse(output)

    return compile_source


def parse(output):
    found = []
    for block in output.split("Compiling entry function")[1:]:
        name = re.search(r"\(anonymous namespace\)::(.*)\(", block)[1] + "("
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", block))
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        found.append((name, stack + stores + loads, registers, int(shared[1]) if shared else 0))
    return found


def budget_of(name):
    kernel = re.match(r"\w+", name)[0]
    if kernel in SOLVER_BUDGETS:
        return SOLVER_BUDGETS[kernel]
    variant = VARIANT.match(name)
    tokens, codebook = (variant[key] and int(variant[key]) for key in ("tokens", "codebook"))
    return BUDGETS[kernel, tokens, codebook][int(variant["bits"] or 2) - 2]


def check(found, count):
    assert len(found) == count
    for name, spilled, registers, shared in found:
        assert spilled == 0, f"{name} keeps {spilled} bytes in local memory"
        assert registers <= budget_of(name), f"{name} takes {registers} registers, more than {budget_of(name)}"
        assert shared <= 48 << 10, f"{name} takes {shared} bytes of shared memory"


# Numbers of kernels. Products: elements times bits times codebooks times sizes; the staged kernel has one size less for
# uniform codebooks; planes and outliers come in three elements. Solvers: three rounders, for two of three modes of
# coordinate descent; three windows of levels; two elements of a look-up.
SOURCES = {
    (cuda_library.SOURCE_FOLDER, "matmul_small.cu"): 36,
    (cuda_library.SOURCE_FOLDER, "matmul_staged.cu"): 30,
    (cuda_library.SOURCE_FOLDER, "dequantize.cu"): 18 + 3 + 3,
    (solver_cuda_library.SOURCE_FOLDER, "sweep.cu"): 3,
    (solver_cuda_library.SOURCE_FOLDER, "descent.cu"): 2 * 3 + 1,
    (solver_cuda_library.SOURCE_FOLDER, "blocks.cu"): 3 + 1,
    (solver_cuda_library.SOURCE_FOLDER, "joint.cu"): 1,
    (solver_cuda_library.SOURCE_FOLDER, "gram.cu"): 3 + 1,
    (solver_cuda_library.SOURCE_FOLDER, "levels.cu"): 2 + 2,
    (solver_cuda_library.SOURCE_FOLDER, "kmeans.cu"): 2,
}
DEFAULT = {"matmul_small.cu", "sweep.cu"}  # on the first architecture


@pytest.mark.parametrize(
    ("folder", "source", "architecture"),
    [
        pytest.param(
            *pair,
            architecture,
            marks=[] if pair[1] in DEFAULT and architecture == ARCHITECTURES[0] else [pytest.mark.slow],
            id=f"{pair[1]}-{architecture}",
        )
        for pair, architecture in itertools.product(SOURCES, ARCHITECTURES)
    ],
)
def test_kernels_stay_within_their_budget(folder, source, architecture, resources):
    check(resources(folder, source, architecture), SOURCES[folder, source])


def test_every_source_with_kernels_has_a_budget():
    sources = {
        (folder, path.name) for folder in FOLDERS for path in folder.glob("*.cu") if "__global__" in path.read_text()
    }
    assert sources == SOURCES.keys()


def test_spill_or_excess_is_noticed():
    name = "matmul_small<__half, 4, (quantlab::Codebook)0, 8>("
    with pytest.raises(AssertionError, match="keeps 8 bytes"):
        check([(name, 8, 64, 0)], 1)
    with pytest.raises(AssertionError, match="takes 97 registers"):
        check([(name, 0, 97, 0)], 1)
    with pytest.raises(AssertionError, match="takes 129 registers, more than 128"):
        check([("sweep_rows<quantlab::GridRounder>(", 0, 129, 0)], 1)
