import pytest
import torch
from torch.nn.functional import linear

from quantlab_kernels import dequantize, pack_codes, prepare, reference, uniform_levels

lut_matmul = torch.ops.quantlab.lut_matmul
lut_matmul_prepared = torch.ops.quantlab.lut_matmul_prepared

ROWS, COLUMNS, GROUPS, BITS = 6, 66, 3, 3


@pytest.fixture
def operands():
    torch.manual_seed(0)
    codes = torch.randint(0, 2**BITS, (ROWS, COLUMNS), dtype=torch.uint8)
    return pack_codes(codes, BITS), torch.randn(ROWS, GROUPS, 2**BITS).half()


@pytest.fixture
def outliers():
    # Row 0 and the last row own entries, the rows between are empty; the last column is used.
    offsets = torch.tensor([0, 2, 2, 2, 2, 2, 3], dtype=torch.int32)
    columns = torch.tensor([1, COLUMNS - 1, 0], dtype=torch.int32)
    return offsets, columns, torch.tensor([0.5, -3.0, 7.0]).half()


def dense(packed_codes, codebook, outliers=()):
    return dequantize(packed_codes, codebook, COLUMNS, *outliers)


def test_every_weight_is_the_level_its_code_selects_in_its_group():
    codes = torch.randint(0, 8, (ROWS, COLUMNS), dtype=torch.uint8)
    codebook = torch.randn(ROWS, GROUPS, 8)
    weight = dequantize(pack_codes(codes, 3), codebook, COLUMNS)
    for row in range(ROWS):
        for column in range(COLUMNS):
            assert weight[row, column] == codebook[row, column // (COLUMNS // GROUPS), int(codes[row, column])]


def test_dequantizing_in_pieces_gives_the_same_weight(operands, monkeypatch):
    whole = dense(*operands)
    monkeypatch.setattr(reference, "_WEIGHTS_PER_PIECE", 4 * COLUMNS + 1)
    assert torch.equal(dense(*operands), whole)


def test_outliers_are_added_to_the_selected_levels(operands, outliers):
    difference = dense(*operands, outliers) - dense(*operands)
    assert difference.count_nonzero() == 3
    torch.testing.assert_close(difference[[0, 0, 5], [1, COLUMNS - 1, 0]], outliers[2].float())


TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("shape", [(COLUMNS,), (0, COLUMNS), (1, COLUMNS), (17, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("with_outliers", [False, True])
def test_result_is_that_of_the_dequantized_layer(operands, outliers, dtype, shape, with_outliers):
    sparse = outliers if with_outliers else ()
    x, bias = torch.randn(shape).to(dtype), torch.randn(ROWS).to(dtype)
    result = lut_matmul(x, *operands, bias, *sparse)
    assert result.shape == (*shape[:-1], ROWS)
    assert result.dtype == dtype
    expected = linear(x.double(), dense(*operands, sparse).to(dtype).double(), bias.double())
    if dtype == torch.float64:
        assert torch.equal(result, expected)
    elif expected.numel():
        assert (result - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_the_reference_is_bit_identical_to_the_dequantized_layer(operands, outliers, dtype, monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    x, bias = torch.randn(5, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    expected = linear(x, dense(*operands, outliers).to(dtype), bias)
    assert torch.equal(lut_matmul(x, *operands, bias, *outliers), expected)


def test_a_bias_of_another_dtype_is_taken_in_the_type_of_x(operands):
    x, bias = torch.randn(2, COLUMNS).bfloat16(), torch.randn(ROWS)
    assert torch.equal(lut_matmul(x, *operands, bias), lut_matmul(x, *operands, bias.bfloat16()))


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_autocast_changes_nothing(operands, dtype, kernels, monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", kernels)
    x = torch.randn(3, COLUMNS).to(dtype)
    expected = lut_matmul(x, *operands)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lut_matmul(x, *operands), expected)


def test_one_hot_inputs_reproduce_the_weight(operands):
    assert torch.equal(lut_matmul(torch.eye(COLUMNS), *operands), dense(*operands).T)


def test_strided_inputs_give_the_result_of_their_copy(operands):
    for x in (torch.randn(COLUMNS, 4).T, torch.randn(5, 2, COLUMNS).mT.mT[::2], torch.randn(1, COLUMNS).expand(3, -1)):
        torch.testing.assert_close(lut_matmul(x, *operands), lut_matmul(x.clone(), *operands))


def test_a_level_that_is_not_finite_affects_only_the_row_that_has_it(operands):
    packed_codes, codebook = operands
    codebook[2] = torch.inf
    result = lut_matmul(torch.rand(4, COLUMNS), packed_codes, codebook)
    assert torch.isinf(result).nonzero()[:, 1].unique().tolist() == [2]


@pytest.mark.parametrize("shape", [(2, 3, COLUMNS), (0, COLUMNS)])
def test_the_operation_passes_the_checks_of_pytorch(operands, shape):
    torch.library.opcheck(lut_matmul.default, (torch.randn(shape), *operands))


def test_the_operation_with_every_operand_passes_the_checks_of_pytorch(operands, outliers):
    x = torch.randn(3, 2, COLUMNS).transpose(0, 1)
    torch.library.opcheck(lut_matmul.default, (x, *operands, torch.randn(ROWS), *outliers))


def test_the_operation_compiles_into_one_graph_for_any_batch(operands):
    compiled = torch.compile(lambda x: lut_matmul(x, *operands) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, COLUMNS)
            assert torch.equal(compiled(x), lut_matmul(x, *operands) + 1)


def test_meta_tensors_give_the_shape_without_computing(operands):
    packed_codes, codebook = (operand.to("meta") for operand in operands)
    result = lut_matmul(torch.empty(2, 7, COLUMNS, device="meta"), packed_codes, codebook)
    assert result.is_meta
    assert result.shape == (2, 7, ROWS)


def test_a_grid_is_a_codebook_of_equal_steps(operands):
    scale, zero = torch.rand(ROWS, GROUPS) + 0.1, torch.rand(ROWS, GROUPS) * 7
    levels = (torch.arange(8) - zero[..., None]) * scale[..., None]
    assert torch.equal(uniform_levels(scale, zero, BITS), levels)
    x = torch.randn(3, COLUMNS)
    assert torch.equal(lut_matmul(x, operands[0], scale, zero=zero), lut_matmul(x, operands[0], levels))


def test_an_input_that_requires_a_gradient_is_refused(operands):
    x = torch.randn(2, COLUMNS, requires_grad=True)
    with pytest.raises(ValueError, match=r"x requires a gradient.*torch\.no_grad"):
        lut_matmul(x, *operands)
    with torch.no_grad():
        assert torch.equal(lut_matmul(x, *operands), lut_matmul(x.detach(), *operands))


def prepared_operands():
    packed_codes = pack_codes(torch.randint(0, 16, (ROWS, 128), dtype=torch.uint8), 4)
    prepared = prepare(packed_codes, torch.randn(ROWS, 1, 16).half(), None, 128, torch.float32)
    if prepared is None:
        pytest.skip("this machine reads bit planes")
    return prepared.codes, prepared.codebook, prepared.zero, prepared.layout


def test_the_prepared_operation_passes_the_checks_of_pytorch(outliers):
    operands = prepared_operands()
    torch.library.opcheck(
        lut_matmul_prepared.default, (torch.randn(2, 3, 128), *operands, torch.randn(ROWS), *outliers)
    )
    torch.library.opcheck(lut_matmul_prepared.default, (torch.randn(0, 128).bfloat16(), *operands))


def test_the_prepared_operation_takes_float64_to_the_reference():
    codes, codebook, zero, layout = prepared_operands()
    eye = torch.eye(128)
    weight = lut_matmul_prepared(eye, codes, codebook, zero, layout)
    assert torch.equal(lut_matmul_prepared(eye.double(), codes, codebook, zero, layout), weight.double())


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 96), "x has 96 features; the weight was prepared for 128"),
        (1, torch.zeros(3, dtype=torch.int32), r"codes are torch.int32 of shape \(3,\); expected tiles"),
        (2, torch.zeros(ROWS, 1, 8), r"codebook.*\(6, groups, 16\)"),
        (3, torch.zeros(ROWS, 1), r"codebook.*expected floating point \(6, groups\)"),
        (5, torch.zeros(ROWS + 1), r"bias.*\(6,\)"),
        (2, torch.zeros(ROWS, 1, 16, device="meta"), "x is on cpu, but .* on meta"),
    ],
)
def test_prepared_operands_that_do_not_fit_are_refused_by_name(position, value, message):
    operands = [torch.zeros(1, 128), *prepared_operands(), torch.zeros(ROWS)]
    lut_matmul_prepared(*operands)
    operands[position] = value
    with pytest.raises(ValueError, match=message):
        lut_matmul_prepared(*operands)


def change(position, value):
    return lambda operands: (*operands[:position], value, *operands[position + 1 :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(0, torch.tensor(1.0)), r"x is torch.float32 of shape \(\)"),
        (change(0, torch.zeros(2, COLUMNS, dtype=torch.int64)), "x is torch.int64"),
        (change(0, torch.zeros(2, COLUMNS + 32)), "in_features=98 needs int32"),
        (change(1, torch.zeros(BITS, ROWS, 3)), "packed_codes are torch.float32"),
        (change(2, torch.zeros(ROWS, GROUPS, 16)), r"codebook.*\(6, groups, 8\)"),
        (change(2, torch.zeros(ROWS + 1, GROUPS, 8)), r"codebook.*\(6, groups, 8\)"),
        (change(2, torch.zeros(ROWS, 4, 8)), "4 groups; in_features=66"),
        (change(3, torch.zeros(ROWS + 1)), r"bias.*expected floating point \(6,\)"),
        (change(4, None), "given together"),
        (change(4, torch.zeros(ROWS, dtype=torch.int32)), r"outlier_offsets.*int32 \(7,\)"),
        (change(5, torch.zeros(3)), "outlier_columns are torch.float32"),
        (change(6, torch.zeros(2)), "outlier_values.*like outlier_columns"),
        (lambda operands: (*operands, torch.zeros(ROWS, GROUPS)), r"codebook.*expected floating point \(6, groups\)"),
        (change(2, torch.zeros(ROWS, GROUPS, 8, device="meta")), "x is on cpu, but .* on meta"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(operands, outliers, damage, message):
    good = (torch.zeros(2, COLUMNS), *operands, torch.zeros(ROWS), *outliers)
    lut_matmul(*good)
    with pytest.raises(ValueError, match=message):
        lut_matmul(*damage(good))
