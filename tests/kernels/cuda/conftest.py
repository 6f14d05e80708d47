"""Weights for the CUDA kernels with their products in float64, and the kernels compiled for the host."""

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quantlab_kernels import (
    cuda,
    cuda_common,
    cuda_library,
    pack_codes,
    solver,
    solver_cuda,
    solver_cuda_library,
    solver_library,
    uniform_levels,
)
from quantlab_kernels.build import Recipe, build_library

EMULATION = Path(__file__).parent / "emulation"
WARNINGS = "-Wall,-Wextra,-Wno-unknown-pragmas"

# Of one product and sum in float32, times a margin for sums of a few thousand in any order; relative to Σ|w||x|.
SUM_TOLERANCE = 2.0**-20
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass
class Case:
    """A random weight in canonical form."""

    codes: torch.Tensor  # (out_features, in_features)
    bits: int
    codebook: torch.Tensor  # levels, or the scale of a uniform grid
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    outliers: tuple[torch.Tensor, ...]  # offsets, columns, values; or nothing

    @property
    def packed_codes(self):
        return pack_codes(self.codes, self.bits)

    def prepare(self, dtype):
        return cuda.prepare(self.packed_codes, self.codebook, self.zero, self.codes.shape[1], dtype)

    def multiply(self, x, prepared=None):
        """By the kernels, from tiles."""
        p = prepared or self.prepare(x.dtype)
        return cuda.lut_matmul_prepared(x, p.codes, p.codebook, p.zero, p.layout, self.bias, *self.outliers)

    def multiply_planes(self, x):
        """By the kernels, from the canonical planes."""
        outliers = self.outliers or (None, None, None)
        return cuda.lut_matmul(x, self.packed_codes, self.codebook, self.bias, *outliers, self.zero)

    def check(self, y, x, *, dense):
        """Compare with float64.

        A dense weight has levels, and levels plus outliers, rounded to the type of x; otherwise only levels of
        tables are, and those of a uniform codebook with several groups stay exact.
        """
        rows, columns = self.codes.shape
        groups = self.codebook.shape[1]
        levels = self.codebook if self.zero is None else uniform_levels(self.codebook, self.zero, self.bits)
        if dense or self.zero is None or groups == 1:
            levels = levels.to(x.dtype)
        weight = levels.double().gather(2, self.codes.view(rows, groups, -1).long()).view(rows, columns)
        if self.outliers:
            offsets, outlier_columns, values = self.outliers
            for row in range(rows):
                for entry in range(int(offsets[row]), int(offsets[row + 1])):
                    place = (row, int(outlier_columns[entry]))
                    total = weight[place] + values[entry].double()
                    weight[place] = total.float().to(x.dtype).double() if dense else total
        flat = x.reshape(-1, columns).double()
        exact, size = flat @ weight.T, flat.abs() @ weight.abs().T
        if self.bias is not None:
            bias = self.bias.to(x.dtype).double()
            exact, size = exact + bias, size + bias.abs()
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], rows)
        tolerance = UNIT_ROUNDOFF[x.dtype] * exact.abs() + SUM_TOLERANCE * size
        error = (y.reshape(-1, rows).double() - exact).abs() / tolerance.clamp(min=2.0**-25)
        if error.numel():
            worst = int(error.nan_to_num(torch.inf).argmax())
            place = f"token {worst // rows}, row {worst % rows} of {tuple(y.shape)}"
            assert error.view(-1)[worst] <= 1, f"{place} is {error.view(-1)[worst]:.3g} tolerances off"


@pytest.fixture
def make_case():
    """A random weight; the same arguments give the same one."""

    def make(rows, columns, *, bits=4, group=None, uniform=False, bias=False, outliers=0, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        groups = 1 if group is None else columns // group
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        if uniform:
            codebook = (0.5 + torch.rand(rows, groups, generator=generator)).half()
            zero = ((1 << bits) * torch.rand(rows, groups, generator=generator)).half()
        else:
            codebook, zero = torch.randn(rows, groups, 1 << bits, generator=generator).half(), None
        sparse = ()
        if outliers:
            # Anywhere, so that rows without entries and entries that meet occur; the last column always has one.
            places = torch.randint(0, rows * columns, (outliers,), generator=generator).sort().values
            places[-1] = rows * columns - 1
            per_row = torch.bincount(places // columns, minlength=rows)
            offsets = torch.nn.functional.pad(per_row.cumsum(0), (1, 0)).int()
            sparse = (offsets, (places % columns).int(), torch.randn(outliers, generator=generator).half())
        case = Case(
            codes=codes.to(device),
            bits=bits,
            codebook=codebook.to(device),
            zero=None if zero is None else zero.to(device),
            bias=torch.randn(rows, generator=generator).half().to(device) if bias else None,
            outliers=tuple(tensor.to(device) for tensor in sparse),
        )
        # Small weights apart, every code occurs.
        assert rows * columns < 16 << bits or case.codes.unique().numel() == 1 << bits
        return case

    return make


@pytest.fixture(scope="session")
def host_library():
    """The sources of the kernels, compiled for the host against the emulation; and faulty kernels beside them."""
    if shutil.which("nvcc") is None:
        pytest.skip("the headers of the CUDA toolkit, found by nvcc, are needed")
    folders = (cuda_library.SOURCE_FOLDER, solver_cuda_library.SOURCE_FOLDER)
    kernels = [cuda_common.cuda_recipe("any", folder, ["80"]) for folder in folders]
    recipe = Recipe(
        name="cuda-on-host",
        sources=(
            *(source for recipe in kernels for source in recipe.sources),
            *sorted(EMULATION.glob("*.cu")),
            *sorted(EMULATION.glob("*.cpp")),
        ),
        headers=(*(header for recipe in kernels for header in recipe.headers), *sorted(EMULATION.glob("*.*h"))),
        # Little optimization: compiling takes most of the time of these tests.
        command=(
            *("nvcc", "-std=c++20", "-O1", "-shared", "-cudart", "none", "-x", "c++", "--threads", "0"),
            *("-I", str(EMULATION)),
            *("-Xcompiler", f"-fPIC,-fvisibility=hidden,-fno-strict-aliasing,-ffp-contract=off,-Werror,{WARNINGS}"),
            *("-Xcompiler", "-fsanitize=alignment,-fsanitize-undefined-trap-on-error"),
        ),
    )
    library = ctypes.CDLL(str(build_library(recipe)))
    cuda_library.declare(library)
    solver_cuda_library.declare(library)
    library.emulation_set_order.argtypes = (ctypes.c_int, ctypes.c_uint)
    library.emulation_allocate.argtypes = (ctypes.c_size_t,)
    library.emulation_allocate.restype = ctypes.c_void_p
    library.emulation_free.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


@pytest.fixture
def emulation(host_library, monkeypatch):
    """Lets the CUDA kernels run on the CPU for the length of a test; the solvers take them for all operands."""
    monkeypatch.setattr(cuda_library.LIBRARY, "get", lambda: host_library)
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: host_library)
    monkeypatch.setattr(solver_library.LIBRARY, "get", lambda: None)
    monkeypatch.setattr(solver, "_on_cuda", lambda operand: True)
    monkeypatch.setattr(cuda_common, "current_stream", lambda device: 0)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: 4)
    host_library.emulation_set_order(0, 0)
    return host_library


@pytest.fixture(
    params=[
        "emulated",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request):
    """Where the kernels of the solvers run, and where their operands are."""
    if request.param == "emulated":
        request.getfixturevalue("emulation")
        return torch.device("cpu")
    return torch.device(request.param)


@pytest.fixture
def kernels_run(monkeypatch):
    """The names of the kernels in the order of their launches."""
    names, run = [], solver_cuda._run

    def record(name, *arguments):
        names.append(name)
        run(name, *arguments)

    monkeypatch.setattr(solver_cuda, "_run", record)
    return names
