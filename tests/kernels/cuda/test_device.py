"""The CUDA kernels on a device. Not yet run: no device has been at hand.

    python -m pytest tests/kernels/cuda -m gpu

also runs the kernels under compute-sanitizer where it is installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlab_kernels import cuda_library, prepare
from quantlab_kernels.cuda_library import Codebook

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16]
KINDS = {
    "row": {},
    "table of 32": {"group": 32},
    "table of 128": {"group": 128},
    "uniform of 32": {"group": 32, "uniform": True},
    "uniform of 128": {"group": 128, "uniform": True},
}
TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 513)


def is_dense(prepared, tokens):
    return tokens > (32 if prepared.layout[4] == Codebook.UNIFORM else 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_every_number_of_tokens_agrees_with_float64(arguments, bits, dtype, make_case):
    case = make_case(1000, 2304, bits=bits, bias=True, outliers=400, device="cuda", **arguments)
    prepared = case.prepare(dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, 2304, device="cuda").to(dtype)
        case.check(case.multiply(x, prepared), x, dense=is_dense(prepared, tokens))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (7, 31), (15, 33), (17, 65), (127, 129), (896, 1000), (4096, 4096), (11008, 4096), (4096, 14336)],
)
def test_any_shape_works(rows, columns, bits, make_case):
    case = make_case(rows, columns, bits=bits, device="cuda")
    for tokens in (1, 16, 40, 100):
        x = torch.randn(tokens, columns, device="cuda").half()
        case.check(case.multiply(x), x, dense=tokens > 64)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_planes_are_multiplied(bits, dtype, make_case):
    case = make_case(200, 264, bits=bits, group=66, bias=True, outliers=50, device="cuda")
    x = torch.randn(5, 264, device="cuda").to(dtype)
    case.check(case.multiply_planes(x), x, dense=True)


@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
def test_repeated_calls_give_the_same_bits(tokens, make_case):
    case, x = make_case(4096, 4096, bits=3, outliers=5000, device="cuda"), torch.randn(tokens, 4096).half().cuda()
    prepared = case.prepare(torch.float16)
    first = case.multiply(x, prepared)
    assert all(torch.equal(case.multiply(x, prepared), first) for _ in range(20))


@pytest.fixture
def layer(make_case):
    """A weight and a function that multiplies by it through the registered operation."""
    case = make_case(1024, 1024, bits=4, bias=True, outliers=300, device="cuda")
    weight = prepare(case.packed_codes, case.codebook, case.zero, 1024, torch.float16)

    def multiply(x):
        return torch.ops.quantlab.lut_matmul_prepared(
            x, weight.codes, weight.codebook, weight.zero, weight.layout, case.bias, *case.outliers
        )

    return case, multiply


@pytest.mark.parametrize("tokens", [1, 20, 128])
def test_captured_graph_follows_a_changed_input(tokens, layer):
    case, multiply = layer
    x = torch.randn(tokens, 1024, device="cuda").half()
    multiply(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x)
    for _ in range(3):
        x.copy_(torch.randn(tokens, 1024))
        graph.replay()
        case.check(y, x, dense=tokens > 64)


def test_operation_compiles_to_one_graph(layer):
    case, multiply = layer
    compiled = torch.compile(multiply, fullgraph=True, mode="reduce-overhead")
    for tokens in (1, 1, 24, 200):
        x = torch.randn(tokens, 1024, device="cuda").half()
        case.check(compiled(x).clone(), x, dense=tokens > 64)


def test_work_goes_to_the_current_stream(layer):
    case, multiply = layer
    stream = torch.cuda.Stream()
    x = torch.zeros(4, 1024, device="cuda").half()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Behind a long wait, x is still zero for any other stream.
        torch.cuda._sleep(200_000_000)
        x.copy_(torch.randn(4, 1024))
        y = multiply(x)
    stream.synchronize()
    case.check(y, x, dense=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_device_of_the_input_is_used(make_case):
    case = make_case(64, 128, device="cuda:1")
    x = torch.randn(3, 128, device="cuda:1").half()
    case.check(case.multiply(x), x, dense=False)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("tokens", [3, 40, 80])
def test_operation_passes_the_checks_of_torch(tokens, layer):
    case, _ = layer
    weight = prepare(case.packed_codes, case.codebook, case.zero, 1024, torch.float16)
    x = torch.randn(tokens, 1024, device="cuda").half()
    torch.library.opcheck(
        torch.ops.quantlab.lut_matmul_prepared,
        (x, weight.codes, weight.codebook, weight.zero, weight.layout, case.bias, *case.outliers),
    )


def test_failed_launch_has_a_message(make_case):
    case = make_case(64, 128, device="cuda")
    weight = case.prepare(torch.float16)
    described = cuda_library.describe_weight(
        weight.codes, weight.codebook, None, out_features=64, in_features=128, bits=4, groups=1,
        codebook=Codebook.PER_ROW, dtype=torch.float16,
    )  # fmt: skip
    x, y = torch.zeros(1, 128, device="cuda").half(), torch.zeros(1, 64, device="cuda").half()
    with pytest.raises(RuntimeError, match=r"64 rows, 128 columns, 4 bits .* not implemented"):
        cuda_library.multiply(cuda_library.LIBRARY.get(), described, x, None, y, warps=17, stream=0)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is needed")
    script = Path(__file__).parent / "sanitized.py"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, str(script)]
    # Tensors that share an allocation hide accesses beyond their end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
