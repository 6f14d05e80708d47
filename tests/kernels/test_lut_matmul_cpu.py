"""The native kernels of the CPU, every instruction set this machine runs, against float64."""

import ctypes
import functools
import mmap
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlab_kernels import cpu, dequantize, native, pack_codes, prepare, split, uniform_levels
from quantlab_kernels.isa import Isa, detected_isa

lut_matmul = torch.ops.quantlab.lut_matmul
lut_matmul_prepared = torch.ops.quantlab.lut_matmul_prepared

# Relative to the largest output: rounding of float32 sums, and of the output to its type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
# Rows and columns around the sizes of tiles, blocks and words; columns divide into the groups.
SHAPES = [(1, 1, 1), (7, 31, 1), (8, 32, 1), (9, 33, 1), (15, 63, 3), (16, 127, 1), (17, 129, 1), (5, 511, 1)]
SHAPES += [(3, 513, 1), (2, 896, 7), (6, 1000, 5), (3, 1000, 1), (4, 2304, 1), (2, 4096, 32), (1, 11008, 1)]
SHAPES += [(127, 64, 1), (8, 65, 1), (16, 128, 2), (4, 512, 4), (4096, 33, 1), (1, 14336, 1)]
GROUPED = [(9, 96, 3), (8, 256, 4), (7, 384, 3), (10, 480, 5), (5, 1536, 12), (3, 1024, 2), (2, 640, 20)]


@functools.cache
def library_of(isa):
    library = native.NativeLibrary("tested", lambda: cpu.recipe_for(isa), cpu._declare)
    native._LIBRARIES.remove(library)
    return library


def every_isa():
    """The default run compiles what this machine uses, and the kernel of all others."""
    default = (Isa.PORTABLE, detected_isa())
    return [
        pytest.param(isa, id=isa.name.lower(), marks=() if isa in default else pytest.mark.slow)
        for isa in Isa
        if isa <= detected_isa()
    ]


@pytest.fixture(params=every_isa())
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", library_of(request.param))
    torch.manual_seed(0)
    return request.param


def make_weight(bits, rows, columns, groups, grid=False):
    """Packed codes, codebook or scale, zero or None."""
    packed_codes = pack_codes(torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), bits)
    if grid:
        zero = torch.rand(rows, groups) * 2**bits
        return packed_codes, (torch.rand(rows, groups) + 0.1).half(), zero.half()
    return packed_codes, torch.randn(rows, groups, 2**bits).half(), None


def dense(weight, columns, outliers=()):
    packed_codes, codebook, zero = weight
    levels = codebook if zero is None else uniform_levels(codebook, zero, packed_codes.shape[0])
    return dequantize(packed_codes, levels, columns, *outliers)


def multiply(weight, x, bias=None, outliers=(None, None, None)):
    """Both operations, which must agree bit for bit."""
    packed_codes, codebook, zero = weight
    result = lut_matmul(x, packed_codes, codebook, bias, *outliers, zero)
    prepared = prepare(packed_codes, codebook, zero, x.shape[-1], x.dtype)
    if prepared is not None:
        operands = (prepared.codes, prepared.codebook, prepared.zero, prepared.layout, bias, *outliers)
        torch.testing.assert_close(lut_matmul_prepared(x, *operands), result, rtol=0, atol=0, equal_nan=True)
    return result


def assert_close_to_float64(result, x, weight, bias=None):
    """`weight` as x sees it: rounded to the type of x."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    error = (result.double() - exact).abs().max()
    assert error <= TOLERANCE[x.dtype] * exact.abs().max().clamp_min(1e-3), (x.shape, error)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_shapes_agree_with_float64(isa, bits):
    for rows, columns, groups in SHAPES if bits in (2, 3, 4, 5) else SHAPES[3::4]:
        weight = make_weight(bits, rows, columns, groups)
        x, bias = torch.randn(3, columns), torch.randn(rows)
        assert_close_to_float64(multiply(weight, x, bias), x, dense(weight, columns), bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", [False, True], ids=["lut", "grid"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_groups_agree_with_float64(isa, bits, grid, dtype):
    for rows, columns, groups in GROUPED:
        weight = make_weight(bits, rows, columns, groups, grid)
        x = torch.randn(5, columns).to(dtype)
        assert_close_to_float64(multiply(weight, x), x, dense(weight, columns).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_every_batch_agrees_with_float64_and_each_sample_with_itself_alone(isa, bits, dtype):
    weight = make_weight(bits, 20, 300, 1)
    x = torch.randn(cpu.DENSE_SAMPLES - 1, 300).to(dtype)
    alone = torch.cat([multiply(weight, sample) for sample in x.split(1)])
    assert_close_to_float64(alone, x, dense(weight, 300).to(dtype))
    for batch in (*range(10), 15, 16, 17, 31, 32, 33, len(x)):
        assert torch.equal(multiply(weight, x[:batch]), alone[:batch])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("grid", [False, True], ids=["lut", "grid"])
def test_one_hot_inputs_reproduce_the_weight_exactly(isa, bits, grid, dtype):
    for columns, groups in ((96, 3), (130, 1)):
        weight = make_weight(bits, 11, columns, groups, grid)
        assert torch.equal(multiply(weight, torch.eye(columns, dtype=dtype)), dense(weight, columns).to(dtype).T)


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codebooks_of_other_types_are_taken_exactly(isa, codebook_dtype):
    for bits, groups in ((4, 1), (3, 3), (5, 1)):
        packed_codes, codebook, _ = make_weight(bits, 9, 96, groups)
        weight = packed_codes, torch.randn(codebook.shape).to(codebook_dtype), None
        assert torch.equal(multiply(weight, torch.eye(96)), dense(weight, 96).float().T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_may_be_unsorted_repeated_signed_zeros_and_denormal(isa, bits, dtype):
    packed_codes, codebook, _ = make_weight(bits, 9, 96, 1)
    codebook[:, 0, :4] = torch.tensor([3.0, -0.0, 3.0, 2.0**-24])  # the last is the smallest number of float16
    weight = packed_codes, codebook, None
    assert torch.equal(multiply(weight, torch.eye(96, dtype=dtype)), dense(weight, 96).to(dtype).T)


def test_inference_tensors_give_the_same_result(isa):
    weight, x = make_weight(4, 20, 300, 1), torch.randn(3, 300)
    expected = multiply(weight, x)
    with torch.inference_mode():
        assert torch.equal(multiply(weight, x.clone()), expected)


def sparse(rows, columns, *entries):
    """Compressed rows of (row, column, value)."""
    counts = torch.bincount(torch.tensor([entry[0] for entry in entries], dtype=torch.int64), minlength=rows)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    assert all(entry[1] < columns for entry in entries)
    return offsets, torch.tensor([e[1] for e in entries]).int(), torch.tensor([e[2] for e in entries]).half()


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_outliers_are_added_wherever_they_are(isa, bits):
    rows, columns = 10, 70_000
    weight = make_weight(bits, rows, columns, 1)
    cases = [
        sparse(rows, columns),
        sparse(rows, columns, (0, 0, 2.0), (9, columns - 1, -3.0), (9, columns - 1, 1.5)),
        sparse(rows, columns, *((4, column, 1.0) for column in range(0, 66_000, 1000))),
    ]
    x, bias = torch.randn(7, columns), torch.randn(rows)
    for outliers in cases:
        result = multiply(weight, x, bias, outliers)
        assert_close_to_float64(result, x, dense(weight, columns, outliers), bias)
        assert torch.equal(multiply(weight, x[:1], bias, outliers), result[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outliers_of_narrow_inputs_are_within_their_rounding(isa, dtype):
    weight, outliers = make_weight(4, 6, 200, 1), sparse(6, 200, (0, 7, 2.5), (5, 199, -4.0))
    x = torch.randn(4, 200).to(dtype)
    exact = x.double() @ (dense(weight, 200).to(dtype).double() + dense(weight, 200, outliers) - dense(weight, 200)).T
    assert (multiply(weight, x, None, outliers) - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_level_that_is_not_finite_affects_only_rows_that_use_it(isa, bits, value):
    columns = 100  # every layout pads this with code 0
    codes = torch.randint(1, 2**bits, (4, columns), dtype=torch.uint8)
    codes[1, 50] = 0
    codebook = torch.randn(4, 1, 2**bits)
    weight = pack_codes(codes, bits), codebook.clone(), None
    weight[1][:, :, 0] = value
    for batch in (1, 9):
        x = torch.rand(batch, columns) + 0.1
        result = multiply(weight, x)
        assert torch.equal(result[:, 1].isnan(), torch.full((batch,), value != value))
        assert not result[:, 1].isfinite().any()
        rest = [0, 2, 3]
        assert_close_to_float64(result[:, rest], x, dense((weight[0], codebook, None), columns)[rest])


def test_an_input_that_is_not_finite_affects_only_its_sample(isa):
    weight = make_weight(4, 10, 100, 1)
    x = torch.randn(8, 100)
    x[2, 99], x[5, 0] = torch.nan, torch.inf
    result = multiply(weight, x)
    assert [sample for sample in range(8) if not result[sample].isfinite().all()] == [2, 5]
    assert result[2].isnan().all()


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_shifted_and_expanded_inputs_give_the_result_of_their_copy(isa, bits, dtype):
    weight = make_weight(bits, 9, 66, 1)
    inputs = [
        torch.randn(66, 4).T,
        torch.randn(2, 3, 66).transpose(0, 1),
        torch.randn(5, 140)[:, 1:133:2],
        torch.randn(1 + 3 * 66)[1:].view(3, 66),
        torch.randn(1, 66).expand(3, -1),
        torch.randn(66),
    ]
    for x in (tensor.to(dtype) for tensor in inputs):
        assert torch.equal(multiply(weight, x), multiply(weight, x.clone(memory_format=torch.contiguous_format)))


def test_operands_that_are_slices_give_the_result_of_their_copies(isa):
    for bits in (4, 5):
        packed_codes, codebook, _ = make_weight(bits, 20, 64, 2)
        weight = packed_codes[:, 3:12], codebook[3:12], None
        x, bias = torch.randn(2, 64), torch.randn(18)[::2]
        expected = multiply((weight[0].clone(), weight[1].clone(), None), x, bias.clone())
        assert torch.equal(multiply(weight, x, bias), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tiles_give_back_the_bit_planes(isa, bits):
    if isa is Isa.PORTABLE:
        pytest.skip("it reads bit planes")
    for rows, columns in ((1, 1), (8, 512), (13, 700)):
        packed_codes = make_weight(bits, rows, columns, 1)[0]
        assert torch.equal(cpu.untile(cpu.tile(packed_codes, columns), bits, rows, columns), packed_codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", [False, True], ids=["lut", "grid"])
def test_parts_of_a_prepared_weight_are_weights(isa, bits, grid):
    if isa is Isa.PORTABLE:
        pytest.skip("it reads bit planes")
    packed_codes, codebook, zero = weight = make_weight(bits, 48, 640, 20, grid)
    x, whole = torch.randn(3, 640), prepare(packed_codes, codebook, zero, 640, torch.float32)
    parts = split(whole, [24, 8, 16])
    results = [lut_matmul_prepared(x, part.codes, part.codebook, part.zero, part.layout) for part in parts]
    assert torch.equal(torch.cat(results, dim=1), multiply(weight, x))
    assert torch.equal(torch.cat([part.restore(part) for part in parts], dim=1), packed_codes)
    assert {part.codes.untyped_storage().data_ptr() for part in parts} == {whole.codes.untyped_storage().data_ptr()}
    assert split(whole, [20, 28]) is None


def test_large_tiles_start_with_a_large_page(isa):
    if isa is Isa.PORTABLE:
        pytest.skip("it reads bit planes")
    packed_codes = torch.randint(-(2**31), 2**31, (4, 1025, 128), dtype=torch.int32)
    tiles = [cpu.tile(packed_codes, 4096) for _ in range(3)]
    assert all(each.data_ptr() % cpu.LARGE_PAGE_BYTES == 0 for each in tiles)
    assert all(torch.equal(cpu.untile(each, 4, 1025, 4096), packed_codes) for each in tiles)


def test_results_do_not_depend_on_the_number_of_threads(isa):
    threads = torch.get_num_threads()
    try:
        for bits, batch in ((4, 2), (3, 33), (5, 3)):
            weight, x = make_weight(bits, 512, 2048, 1), torch.randn(batch, 2048)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(multiply(weight, x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_do_not_meet(isa):
    cases = [(make_weight(bits, 40, 520, 1), torch.randn(batch, 520)) for bits in (3, 4, 5) for batch in (1, 3, 9)]
    expected = [multiply(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = list(pool.map(lambda case: multiply(*case), cases))
            assert all(map(torch.equal, results, expected))


def test_a_process_that_was_forked_gets_the_same_result():
    code = """
import os, signal, torch, quantlab_kernels
torch.manual_seed(0)
torch.set_num_threads(2)
codes, codebook, x = torch.randint(9999, (4, 64, 64), dtype=torch.int32), torch.randn(64, 1, 16), torch.randn(9, 2048)
weight = quantlab_kernels.prepare(codes, codebook, None, 2048, torch.float32)
plain = torch.ops.quantlab.lut_matmul(x, codes, codebook)
child = os.fork()
if not child:
    signal.alarm(60)  # a child that waits for threads that are gone does so for ever
    assert torch.equal(torch.ops.quantlab.lut_matmul(x, codes, codebook), plain)
    if weight:
        assert torch.equal(weight.restore(weight), codes)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def guarded(tensor):
    """A copy whose last byte is the last one before memory that must not be touched."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_behind_an_operand_is_read(isa, bits, dtype):
    for columns, groups, grid, batch in ((97, 1, False, 1), (96, 3, False, 2), (96, 3, True, 7), (513, 1, True, 1)):
        weight = make_weight(bits, 9, columns, groups, grid)
        outliers = sparse(9, columns, (8, columns - 1, 1.0))
        x, bias = torch.randn(batch, columns).to(dtype), torch.randn(9).to(dtype)
        expected = multiply(weight, x, bias, outliers)
        packed_codes, codebook, zero = (None if operand is None else guarded(operand) for operand in weight)
        additions = guarded(bias), *map(guarded, outliers)
        assert torch.equal(lut_matmul(guarded(x), packed_codes, codebook, *additions, zero), expected)
        if prepared := prepare(packed_codes, codebook, zero, columns, dtype):
            operands = (guarded(prepared.codes), codebook, zero, prepared.layout, *additions)
            assert torch.equal(lut_matmul_prepared(guarded(x), *operands), expected)


@pytest.fixture
def dense_path(isa, monkeypatch):
    """Every batch in bfloat16 is multiplied with dequantized weights, in blocks of eight rows."""
    if not cpu.LIBRARY.get().quantlab_lut_dequantizes():
        pytest.skip("it never dequantizes")
    monkeypatch.setattr(cpu, "DENSE_SAMPLES", 1)
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 1)


@pytest.mark.parametrize("grid", [False, True], ids=["lut", "grid"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantized_blocks_agree_with_float64(dense_path, bits, grid):
    for rows, columns, groups in [*SHAPES, *GROUPED]:
        weight = make_weight(bits, rows, columns, groups, grid)
        x, bias = torch.randn(4, columns).bfloat16(), torch.randn(rows).bfloat16()
        result = multiply(weight, x, bias)
        assert_close_to_float64(result, x, dense(weight, columns).bfloat16(), bias)
        assert torch.equal(multiply(weight, x, bias), result)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantized_weights_hold_their_outliers_rounded_to_bfloat16(dense_path, bits):
    weight, outliers = make_weight(bits, 19, 130, 1), sparse(19, 130, (0, 7, 2.5), (18, 129, -4.0))
    zeros = torch.zeros_like(dense(weight, 130))
    expected = dense(weight, 130).bfloat16().float() + dense_outliers(zeros, outliers)
    assert torch.equal(multiply(weight, torch.eye(130).bfloat16(), None, outliers), expected.bfloat16().T)


def dense_outliers(weight, outliers):
    offsets, columns, values = outliers
    rows = torch.repeat_interleave(offsets.diff().long())
    return weight.index_put((rows, columns.long()), values.float(), accumulate=True)


def test_nothing_behind_an_operand_is_read_when_it_is_dequantized(dense_path):
    for bits, columns, groups, grid in ((2, 97, 1, False), (3, 96, 3, False), (4, 96, 3, True), (3, 513, 1, True)):
        weight, outliers = make_weight(bits, 9, columns, groups, grid), sparse(9, columns, (8, columns - 1, 1.0))
        x, bias = torch.randn(3, columns).bfloat16(), torch.randn(9).bfloat16()
        expected = multiply(weight, x, bias, outliers)
        prepared = prepare(*weight, columns, x.dtype)
        operands = (
            *(None if each is None else guarded(each) for each in (prepared.codes, *weight[1:])),
            prepared.layout,
        )
        additions = guarded(bias), *map(guarded, outliers)
        assert torch.equal(lut_matmul_prepared(guarded(x), *operands, *additions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_of_other_types_than_bfloat16_do_not_depend_on_the_batch_however_large(isa, dtype):
    weight, x = make_weight(4, 9, 130, 1), torch.randn(513, 130).to(dtype)
    assert torch.equal(torch.cat([multiply(weight, sample) for sample in x.split(1)]), multiply(weight, x))


def test_bfloat16_is_dequantized_from_the_documented_size_of_the_batch_on(isa, monkeypatch):
    calls = []
    inner = cpu._multiply_dense
    monkeypatch.setattr(cpu, "_multiply_dense", lambda *arguments: calls.append(arguments) or inner(*arguments))
    weight, x = make_weight(4, 9, 130, 1), torch.randn(cpu.DENSE_SAMPLES, 130).bfloat16()
    multiply(weight, x[1:])
    assert not calls
    assert_close_to_float64(multiply(weight, x), x, dense(weight, 130).bfloat16())
    assert bool(calls) == bool(cpu.LIBRARY.get().quantlab_lut_dequantizes())


def test_each_call_returns_memory_of_its_own(isa):
    weight, x = make_weight(4, 8, 64, 1), torch.randn(1, 64)
    first = multiply(weight, x)
    kept = first.clone()
    multiply(weight, -x)
    assert torch.equal(first, kept)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_weights_than_an_int32_can_count(isa, dtype):
    rows, columns = 2**15 + 24, 2**16  # 2 ** 31 and 24 rows
    packed_codes = torch.randint(-(2**31), 2**31, (2, rows, columns // 32), dtype=torch.int32)
    codebook, x = torch.randn(rows, 1, 4).half(), torch.randn(1, columns).to(dtype)
    result = multiply((packed_codes, codebook, None), x)
    for some in (slice(0, 8), slice(2**14 - 4, 2**14 + 4), slice(2**15 - 8, rows)):
        part = packed_codes[:, some].contiguous(), codebook[some], None
        assert torch.equal(result[:, some], multiply(part, x))
    if cpu.reads_tiles(2, columns, 1):
        assert torch.equal(cpu.untile(cpu.tile(packed_codes, columns), 2, rows, columns), packed_codes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_outputs_than_an_int32_can_count(isa, dtype):
    rows, batch = 2**12 + 8, 2**19
    weight, x = make_weight(4, rows, 1, 1), torch.randn(batch, 1).to(dtype)
    result = lut_matmul(x, *weight[:2])
    for some in (slice(0, 3), slice(2**31 // rows - 2, 2**31 // rows + 2), slice(batch - 3, batch)):
        assert torch.equal(result[some], lut_matmul(x[some], *weight[:2]))
