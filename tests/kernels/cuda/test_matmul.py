"""The source of the CUDA kernels, executed on the host, against products in float64."""

import ctypes
from dataclasses import replace

import pytest
import torch

from quantlab_kernels import cuda, cuda_library, reference, split
from quantlab_kernels.cuda_library import Codebook

DTYPES = [torch.float16, torch.bfloat16]
KINDS = {
    "row": {},
    "table of 32": {"group": 32},
    "table of 64": {"group": 64},
    "uniform of 32": {"group": 32, "uniform": True},
    "uniform of 64": {"group": 64, "uniform": True},
}
# Both sides of every border between kernels and between their variants.
TOKENS = (1, 8, 9, 16, 17, 32, 33, 64, 65)
FORWARD, BACKWARD, RANDOM = range(3)


def is_dense(prepared, tokens):
    return tokens > (32 if prepared.layout[4] == Codebook.UNIFORM else 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_every_number_of_tokens_agrees_with_float64(arguments, bits, dtype, make_case, emulation):
    # Two row blocks, the second almost empty; three tiles of columns; a column tile that is half full.
    case = make_case(17, 160 if arguments.get("group") == 32 else 192, bits=bits, bias=True, outliers=9, **arguments)
    prepared = case.prepare(dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, case.codes.shape[1]).to(dtype)
        case.check(case.multiply(x, prepared), x, dense=is_dense(prepared, tokens))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [2, 18, 66])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (7, 31), (8, 32), (15, 33), (16, 63), (17, 64), (33, 65), (31, 127), (48, 129), (16, 896), (5, 1000)],
)
def test_any_shape_works(rows, columns, tokens, bits, make_case, emulation):
    case, x = make_case(rows, columns, bits=bits), torch.randn(tokens, columns).half()
    case.check(case.multiply(x), x, dense=tokens > 64)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_parts_of_a_prepared_weight_are_weights(arguments, bits, make_case, emulation):
    case, x = make_case(80, 192, bits=bits, **arguments), torch.randn(3, 192).half()
    prepared = case.prepare(x.dtype)
    whole, planes = case.multiply(x, prepared), case.packed_codes
    parts = split(prepared, [32, 16, 32])
    assert torch.equal(torch.cat([case.multiply(x, part) for part in parts], dim=1), whole)
    assert torch.equal(torch.cat([part.restore(part) for part in parts], dim=1), planes)
    assert split(prepared, [40, 40]) is None


@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("uniform", [False, True])
def test_groups_may_span_tiles(group, uniform, make_case, emulation):
    case = make_case(16, 512, bits=3, group=group, uniform=uniform)
    for tokens in (3, 20):
        x = torch.randn(tokens, 512).half()
        case.check(case.multiply(x), x, dense=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 96])
def test_unit_vectors_reproduce_the_levels_exactly(tokens, bits, dtype, make_case, emulation):
    case = make_case(16, 96, bits=bits)
    prepared = case.prepare(dtype)
    levels = case.codebook.to(dtype)[:, 0].gather(1, case.codes.long())
    for units in torch.eye(96, dtype=dtype).split(tokens):
        assert torch.equal(case.multiply(units, prepared), (units.double() @ levels.double().T).to(dtype))


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [9, 33, 70])
def test_order_of_threads_does_not_change_a_bit(tokens, arguments, make_case, emulation):
    case, x = make_case(20, 192, bits=3, outliers=30, **arguments), torch.randn(tokens, 192).half()
    prepared = case.prepare(torch.float16)
    first = case.multiply(x, prepared)
    for order, seed in ((BACKWARD, 0), (RANDOM, 1), (RANDOM, 2)):
        emulation.emulation_set_order(order, seed)
        assert torch.equal(case.multiply(x, prepared), first)


@pytest.mark.parametrize("warps", [1, 3, 8, 16])
def test_number_of_warps_changes_the_order_of_sums_only(warps, make_case, emulation, monkeypatch):
    monkeypatch.setattr(cuda, "warps_per_block", lambda *_: warps)
    case, x = make_case(16, 600, outliers=40), torch.randn(5, 600).half()
    case.check(case.multiply(x), x, dense=False)


@pytest.fixture
def guarded(emulation):
    """Copies a tensor to memory whose neighbouring pages nobody may touch."""
    buffers = []

    def copy(tensor):
        address = emulation.emulation_allocate(tensor.nbytes)
        buffers.append((address, tensor.nbytes))
        memory = (ctypes.c_uint8 * tensor.nbytes).from_address(address)
        result = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return result.copy_(tensor)

    yield copy
    for address, size in buffers:
        emulation.emulation_free(address, size)


@pytest.fixture
def run_guarded(guarded, emulation):
    """Calls a kernel with every operand, the result included, between guard pages."""

    def run(case, x, *, x_features=None):
        prepared = case.prepare(x.dtype)
        rows, columns, bits, groups, kind = prepared.layout
        operands = [guarded(prepared.codes), guarded(prepared.codebook), tuple(map(guarded, case.outliers)) or None]
        weight = cuda_library.describe_weight(
            *operands,
            out_features=rows,
            in_features=x_features or columns,
            bits=bits,
            groups=groups,
            codebook=Codebook(kind),
            dtype=x.dtype,
        )
        if is_dense(prepared, len(x)):
            dense = guarded(torch.full((rows, columns + -columns % 8), torch.nan, dtype=x.dtype))
            cuda_library.dequantize_rows(emulation, weight, dense, first_row=0, rows=rows, stream=0)
            return (x.double() @ dense[:, :columns].double().T).to(x.dtype)
        y = guarded(torch.full((len(x), rows), torch.nan, dtype=x.dtype))
        padded = guarded(torch.nn.functional.pad(x, (0, -columns % 8)))
        cuda_library.multiply(emulation, weight, padded, None, y, warps=8, stream=0)
        return y

    return run


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_access_leaves_a_buffer(bits, arguments, make_case, run_guarded):
    for rows, columns in ((17, 192), (16, 224 if arguments.get("group") == 32 else 320)):
        case = make_case(rows, columns, bits=bits, outliers=25, **arguments)
        for tokens in (5, 16, 31, 64, 65):
            x = torch.randn(tokens, columns).bfloat16()
            case.check(run_guarded(case, x), x, dense=tokens > (32 if arguments.get("uniform") else 64))


def test_no_access_leaves_a_buffer_at_ragged_columns(make_case, run_guarded):
    case = make_case(23, 107, bits=3, outliers=25)
    for tokens in (1, 30, 64, 65):
        x = torch.randn(tokens, 107).half()
        case.check(run_guarded(case, x), x, dense=tokens > 64)


@pytest.mark.parametrize("tokens", [4, 20, 65])
def test_access_outside_of_a_buffer_is_noticed(tokens, make_case, run_guarded):
    case = make_case(16, 1024)
    with pytest.raises(RuntimeError, match=r"16 rows, 4096 columns, 4 bits .* outside of a guarded buffer"):
        run_guarded(case, torch.randn(tokens, 1024).half(), x_features=4096)


@pytest.mark.parametrize("tokens", [1, 20, 65])
def test_level_that_no_code_selects_has_no_effect(tokens, make_case, emulation):
    # 70 columns: the padded ones must not select it either.
    case, x = make_case(16, 70), torch.randn(tokens, 70).half()
    case.codes.clamp_(min=1)
    reference_result = case.multiply(x)
    case.codebook[:, :, 0] = torch.inf
    assert torch.equal(case.multiply(x), reference_result)


@pytest.mark.parametrize("tokens", [1, 20, 65])
def test_level_that_is_not_finite_stays_in_its_row(tokens, make_case, emulation):
    case, x = make_case(16, 64), torch.randn(tokens, 64).half()
    before = case.multiply(x)
    case.codebook[3] = torch.nan
    after = case.multiply(x)
    assert after[:, 3].isnan().all()
    others = torch.arange(16) != 3
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("tokens", [2, 16, 40, 65])
def test_outliers_may_meet_and_fill_a_row(tokens, make_case, emulation):
    case, x = make_case(18, 128, bits=2), torch.randn(tokens, 128).half()
    columns = torch.cat([torch.arange(128), torch.tensor([5, 5, 127])]).int()
    offsets = torch.tensor([0] * 17 + [130, 131], dtype=torch.int32)
    case.outliers = (offsets, columns, torch.randn(131).half())
    case.check(case.multiply(x), x, dense=tokens > 64)


def test_outliers_in_another_type_are_taken_in_float32(make_case, emulation):
    case, x = make_case(16, 64, outliers=9), torch.randn(3, 64).half()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case.outliers = (*case.outliers[:2], case.outliers[2].to(dtype))
        case.check(case.multiply(x), x, dense=False)


def test_empty_list_of_outliers_changes_nothing(make_case, emulation):
    case, x = make_case(16, 64), torch.randn(3, 64).half()
    plain = case.multiply(x)
    case.outliers = (torch.zeros(17, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0).half())
    assert torch.equal(case.multiply(x), plain)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 64), (2, 3, 64), (2, 2, 17, 64)])
def test_leading_dimensions_are_kept(shape, make_case, emulation):
    case, x = make_case(17, 64), torch.randn(shape).half()
    case.check(case.multiply(x), x, dense=x.numel() > 64 * 64)


@pytest.mark.parametrize("tokens", [3, 20, 65])
@pytest.mark.parametrize(
    "view",
    [
        lambda tokens: torch.randn(64, tokens).half().T,
        lambda tokens: torch.randn(tokens, 128).half()[:, ::2],
        lambda tokens: torch.randn(tokens, 65).half()[:, 1:],
        lambda tokens: torch.randn(tokens * 64 + 1).half()[1:].view(tokens, 64),
        lambda tokens: torch.randn(1, 64).half().expand(tokens, 64),
    ],
    ids=["transposed", "every second column", "odd stride", "odd address", "expanded"],
)
def test_any_view_of_the_input_works(view, tokens, make_case, emulation):
    case, x = make_case(16, 64), view(tokens)
    case.check(case.multiply(x), x, dense=tokens > 64)


def test_wide_weight_is_dequantized_in_pieces(make_case, emulation, monkeypatch):
    case, x = make_case(50, 64, bits=3, bias=True, outliers=60), torch.randn(70, 64).half()
    whole = case.multiply(x)
    monkeypatch.setattr(cuda, "_WORKSPACE_BYTES", 20 * 64 * 2)
    case.check(case.multiply(x), x, dense=True)
    torch.testing.assert_close(case.multiply(x), whole)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group"), [(66, 22), (65, None), (256, 32)])
def test_planes_of_any_width_and_group_are_multiplied(bits, columns, group, make_case, emulation):
    case = make_case(19, columns, bits=bits, group=group, bias=True, outliers=7, uniform=bits % 2 == 0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(3, columns).to(dtype)
        case.check(case.multiply_planes(x), x, dense=True)


def test_float64_takes_the_reference(make_case, emulation):
    case, x = make_case(8, 64), torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(case.multiply_planes(x), reference.lut_matmul(x, case.packed_codes, case.codebook))


def test_input_of_another_type_than_prepared_for_is_rejected(make_case, emulation):
    case = make_case(16, 64)
    with pytest.raises(ValueError, match=r"x is torch\.float32; .* float16 and bfloat16 only"):
        case.multiply(torch.ones(2, 64), case.prepare(torch.float16))


def test_result_is_a_new_tensor_every_time(make_case, emulation):
    case, x = make_case(16, 64), torch.randn(2, 64).half()
    first = case.multiply(x)
    kept = first.clone()
    case.multiply(-x)
    assert torch.equal(first, kept)


def test_combination_without_a_kernel_has_a_message(make_case, emulation):
    case, x = make_case(16, 64), torch.randn(2, 64).half()
    prepared = case.prepare(torch.float16)
    wrong = replace(prepared, layout=[16, 64, 5, 1, int(Codebook.PER_ROW)])
    with pytest.raises(RuntimeError, match=r"5 bits and 1 groups .* not implemented"):
        case.multiply(x, wrong)


def test_prepared_weight_needs_the_library(make_case, emulation, monkeypatch):
    case = make_case(16, 64)
    prepared = case.prepare(torch.float16)
    monkeypatch.setattr(cuda_library.LIBRARY, "get", lambda: None)
    with pytest.raises(RuntimeError, match="QUANTLAB_KERNELS"):
        case.multiply(torch.ones(1, 64).half(), prepared)
