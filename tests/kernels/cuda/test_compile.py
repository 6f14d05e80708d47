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

from quantlab_kernels.cuda_library import SOURCE_FOLDER, compile_flags

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
KERNEL = re.compile(
    r"(?P<kernel>\w+)<(?P<element>\w+)(?:, (?P<bits>\d), \(quantlab::Codebook\)(?P<codebook>\d)"
    r"(?:, (?P<tokens>\d+)(?:, \d+)?)?)?>\("
)


@pytest.fixture
def resources(tmp_path, request):
    """Compiles a source and returns, for every kernel, its demangled name and what it takes."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is needed")

    def compile_source(source, architecture):
        command = ["nvcc", *compile_flags([architecture]), "-cubin", "-Xptxas", "-v"]
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        files = [path for path in sorted(SOURCE_FOLDER.rglob("*")) if path.is_file()]
        content = b"\0".join(path.read_bytes() for path in files)
        key = hashlib.sha256(f"{command}{version}{source}".encode() + content).hexdigest()
        output = request.config.cache.get(f"quantlab/ptxas-{key}", None)
        if output is None:
            command += [str(SOURCE_FOLDER / source), "-o", str(tmp_path / "kernels.cubin")]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            output = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True, check=True).stdout
            request.config.cache.set(f"quantlab/ptxas-{key}", output)
        return parse(output)

    return compile_source


def parse(output):
    found = []
    for block in output.split("Compiling entry function")[1:]:
        name = KERNEL.search(block)
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", block))
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        found.append((name.groupdict(), stack + stores + loads, registers, int(shared[1]) if shared else 0))
    return found


def check(found, count):
    assert len(found) == count
    for name, spilled, registers, shared in found:
        tokens, codebook = (name[key] and int(name[key]) for key in ("tokens", "codebook"))
        budget = BUDGETS[name["kernel"], tokens, codebook][int(name["bits"] or 2) - 2]
        assert spilled == 0, f"{name} keeps {spilled} bytes in local memory"
        assert registers <= budget, f"{name} takes {registers} registers, more than {budget}"
        assert shared <= 48 << 10, f"{name} takes {shared} bytes of shared memory"


# Numbers of kernels: elements times bits times codebooks times sizes. The staged kernel has one size less for uniform
# codebooks; planes and outliers come in three elements.
SOURCES = {"matmul_small.cu": 36, "matmul_staged.cu": 30, "dequantize.cu": 18 + 3 + 3}
DEFAULT = ("matmul_small.cu", ARCHITECTURES[0])


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(*pair, marks=[] if pair == DEFAULT else [pytest.mark.slow])
        for pair in itertools.product(SOURCES, ARCHITECTURES)
    ],
)
def test_kernels_stay_within_their_budget(source, architecture, resources):
    check(resources(source, architecture), SOURCES[source])


def test_spill_or_excess_is_noticed():
    name = {"kernel": "matmul_small", "tokens": "8", "codebook": "0", "bits": "4", "element": "__half"}
    with pytest.raises(AssertionError, match="keeps 8 bytes"):
        check([(name, 8, 64, 0)], 1)
    with pytest.raises(AssertionError, match="takes 97 registers"):
        check([(name, 0, 97, 0)], 1)
