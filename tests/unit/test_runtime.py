import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import linear

import quantlab_kernels
from quantlab.api import CodebookSpec, Lut, Outliers, QuantizedLayer, UniformGrid
from quantlab.errors import NumericalError
from quantlab.runtime import LutLinear, ModuleSpec, storage_layout

ROWS, COLUMNS, BITS, GROUP = 5, 40, 3, 20
SPEC = CodebookSpec(bits=BITS, group_size=GROUP)


def lut_layer(outliers=None):
    torch.manual_seed(0)
    codes = torch.randint(0, 8, (ROWS, COLUMNS), dtype=torch.uint8)
    return QuantizedLayer(codes=codes, codebook=Lut(values=torch.randn(ROWS, 2, 8)), outliers=outliers)


def uniform_layer():
    grid = UniformGrid(scale=torch.rand(ROWS, 2) + 0.1, zero=torch.randint(0, 8, (ROWS, 2)).float(), bits=BITS)
    return QuantizedLayer(codes=lut_layer().codes, codebook=grid)


def some_outliers():
    return Outliers(
        rows=torch.tensor([0, 0, 4]), columns=torch.tensor([1, 39, 0]), values=torch.tensor([0.5, -2.0, 4.0])
    )


def rounded(layer):
    """The layer whose codebook already has float16 values, so that storing it loses nothing."""
    book = layer.codebook
    if isinstance(book, Lut):
        book = Lut(values=book.values.half().float())
    else:
        book = UniformGrid(scale=book.scale.half().float(), zero=book.zero.half().float(), bits=book.bits)
    return QuantizedLayer(codes=layer.codes, codebook=book, outliers=layer.outliers)


LAYERS = {"lut": lut_layer, "uniform": uniform_layer, "outliers": lambda: lut_layer(some_outliers())}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def test_stored_weight_is_the_dequantized_layer_up_to_float16(layer):
    module = LutLinear.from_layer(layer, SPEC, None)
    assert torch.equal(module.dequantize(), rounded(layer).dequantize())
    torch.testing.assert_close(module.dequantize(), layer.dequantize(), rtol=2e-3, atol=2e-3)


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_multiplies_with_the_dequantized_weight(layer, dtype):
    bias = torch.randn(ROWS, dtype=dtype)
    module = LutLinear.from_layer(layer, SPEC, bias)
    x = torch.randn(2, 3, COLUMNS, dtype=dtype)
    expected = linear(x.double(), module.dequantize().to(dtype).double(), bias.double())
    assert module(x).dtype == dtype
    assert (module(x) - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kind", ["lut", "uniform", "outliers"])
def test_one_hot_inputs_show_exactly_the_dequantized_weight(kind):
    module = LutLinear.from_layer(LAYERS[kind](), SPEC, None)
    assert torch.equal(module(torch.eye(COLUMNS)), module.dequantize().T)


def test_a_placeholder_filled_from_a_state_dict_is_the_same_layer(layer):
    module = LutLinear.from_layer(layer, SPEC, torch.randn(ROWS))
    placeholder = LutLinear.empty(module.spec)
    assert all(tensor.is_meta for tensor in placeholder.state_dict().values())
    placeholder.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(4, COLUMNS)
    assert torch.equal(placeholder(x), module(x))


def test_casting_the_module_keeps_the_stored_weight_and_casts_the_bias(layer):
    module = LutLinear.from_layer(layer, SPEC, torch.randn(ROWS))
    stored = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        cast = copy.deepcopy(module).to(dtype)
        assert {name: tensor.dtype for name, tensor in cast.state_dict().items()} == stored | {"bias": dtype}
        assert torch.equal(cast.dequantize(), module.dequantize())


def test_moving_the_module_moves_everything(layer):
    module = LutLinear.from_layer(layer, SPEC, torch.randn(ROWS)).to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_storage_counts_words_codebook_and_outliers_but_not_the_bias():
    words = 32 * BITS * ROWS * 2  # 40 columns take two words per row and plane
    bias = torch.zeros(ROWS)
    assert LutLinear.from_layer(lut_layer(), SPEC, bias).storage_bits == words + 16 * ROWS * 2 * 8
    assert LutLinear.from_layer(uniform_layer(), SPEC, bias).storage_bits == words + 2 * 16 * ROWS * 2
    with_outliers = LutLinear.from_layer(lut_layer(some_outliers()), SPEC, bias)
    assert with_outliers.storage_bits == words + 16 * ROWS * 2 * 8 + 32 * (ROWS + 1) + 3 * (32 + 16)


def test_an_empty_list_of_outliers_is_stored_as_none():
    nothing = torch.zeros(0, dtype=torch.int64)
    module = LutLinear.from_layer(lut_layer(Outliers(rows=nothing, columns=nothing, values=torch.zeros(0))), SPEC, None)
    assert module.spec.outliers == 0
    assert set(module.state_dict()) == {"packed_codes", "codebook"}


def test_the_spec_describes_the_layer():
    module = LutLinear.from_layer(lut_layer(some_outliers()), SPEC, torch.zeros(ROWS))
    assert module.spec == ModuleSpec(ROWS, COLUMNS, BITS, GROUP, "lut", 3, True)
    assert (module.in_features, module.out_features) == (COLUMNS, ROWS)


def test_one_codebook_per_row_is_one_group():
    layer = QuantizedLayer(codes=lut_layer().codes, codebook=Lut(values=torch.randn(ROWS, 1, 8)))
    module = LutLinear.from_layer(layer, CodebookSpec(bits=BITS), None)
    assert torch.equal(module.dequantize(), rounded(layer).dequantize())


@pytest.mark.parametrize("value", [7e4, float("nan"), float("-inf")])
def test_values_that_float16_cannot_hold_are_refused(value):
    layer = lut_layer()
    layer.codebook.values[1, 0, 2] = value
    with pytest.raises(NumericalError, match=r"codebook .*float16, which ends at 65504"):
        LutLinear.from_layer(layer, SPEC, None)


def test_a_layer_of_another_budget_is_refused():
    with pytest.raises(ValueError, match=r"codebook is torch.float16 of shape \(5, 2, 8\); expected .*\(5, 1, 8\)"):
        LutLinear.from_layer(lut_layer(), CodebookSpec(bits=BITS), None)
    with pytest.raises(ValueError, match="codes of 2 bits end at 3"):
        LutLinear.from_layer(lut_layer(), CodebookSpec(bits=2, group_size=GROUP), None)


def test_tensors_that_are_missing_or_unexpected_are_refused():
    spec = ModuleSpec(ROWS, COLUMNS, BITS, None, "lut", 0, False)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in storage_layout(spec).items()}
    with pytest.raises(ValueError, match=r"stores \['codebook', 'packed_codes'\]"):
        LutLinear(spec, tensors | {"scale": torch.zeros(1)}, None)
    with pytest.raises(ValueError, match="bias has shape"):
        LutLinear(spec, tensors, torch.zeros(ROWS))


def test_the_bias_is_a_copy():
    bias = torch.zeros(ROWS)
    module = LutLinear.from_layer(lut_layer(), SPEC, bias)
    bias += 1
    assert not module.bias.any()


def test_the_module_compiles_into_one_graph(layer):
    module = LutLinear.from_layer(layer, SPEC, torch.randn(ROWS))
    x = torch.randn(3, COLUMNS)
    with torch.inference_mode():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


WIDE = CodebookSpec(bits=4, group_size=64)


@pytest.fixture
def wide(monkeypatch):
    """A layer that the CPU prepares, with its input and result before anything is prepared."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (9, 128), dtype=torch.uint8)
    module = LutLinear.from_layer(QuantizedLayer(codes=codes, codebook=Lut(values=torch.randn(9, 2, 16))), WIDE, None)
    if quantlab_kernels.prepare(*stored(module).values(), None, 128, torch.float32) is None:
        pytest.skip("this machine reads the stored bit planes")
    return module


def stored(module):
    return {name: module.state_dict()[name].clone() for name in ("packed_codes", "codebook")}


def is_stored(module):
    return module.packed_codes is not None and module.prepared_codes is None


def test_the_first_use_frees_the_bit_planes_and_whoever_asks_gets_them_back(wide):
    before, weight, bits = stored(wide), wide.dequantize(), wide.storage_bits
    assert is_stored(wide)
    result = wide(torch.eye(128))
    assert wide.packed_codes is None
    assert {name for name, _ in wide.named_buffers()} == {"codebook", "prepared_codes"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.state_dict().items())
    assert set(wide.state_dict()) == set(before)
    assert torch.equal(wide.get_buffer("packed_codes"), before["packed_codes"])
    assert torch.equal(wide.dequantize(), weight)
    assert torch.equal(result, weight.T)
    assert wide.storage_bits == bits


def test_a_prepared_layer_can_be_copied_cast_moved_and_filled(wide):
    x = torch.randn(3, 128)
    result, before = wide(x), stored(wide)
    twin = copy.deepcopy(wide)
    assert twin.prepared_codes is twin._prepared.codes
    assert twin.prepared_codes is not wide.prepared_codes
    assert torch.equal(twin(x), result)
    assert is_stored(twin.to(torch.bfloat16))
    assert torch.equal(twin(x), result)
    assert all(tensor.is_meta for tensor in copy.deepcopy(wide).to("meta").state_dict().values())
    twin.load_state_dict(before | {"codebook": before["codebook"] * 2})
    assert is_stored(twin)
    assert torch.equal(twin(x), result * 2)


def test_a_prepared_layer_compiles_into_one_graph_with_the_same_result(wide):
    x = torch.randn(3, 128)
    with torch.inference_mode():
        unprepared = torch.compile(wide, fullgraph=True, backend="aot_eager")(x)
        assert is_stored(wide)
        wide.prepare(x.dtype)
        assert not is_stored(wide)
        assert torch.equal(torch.compile(wide, fullgraph=True, backend="aot_eager")(x), unprepared)
        assert torch.equal(wide(x), unprepared)


def test_threads_that_meet_in_the_first_use_agree(wide):
    x = torch.randn(3, 128)
    expected = copy.deepcopy(wide)(x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            wide.to(torch.float32)
            assert all(torch.equal(result, expected) for result in pool.map(wide, [x] * 8))


def test_inputs_that_require_gradients_get_the_result_of_the_kernel_and_the_derivative_of_the_weight(wide):
    x = torch.randn(3, 128, requires_grad=True)
    result = wide(x)
    assert torch.equal(result, wide(x.detach()))
    gradient = torch.randn(3, 9)
    result.backward(gradient)
    assert torch.equal(x.grad, gradient @ wide.dequantize())


def test_one_sample_has_the_same_result_alone_and_among_others(wide):
    x = torch.randn(9, 128)
    assert torch.equal(torch.cat([wide(sample) for sample in x.split(1)]), wide(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_decides_the_type_as_it_does_for_dense_layers(layer, dtype):
    module = LutLinear.from_layer(layer, SPEC, torch.randn(ROWS))
    dense, x = torch.nn.Linear(COLUMNS, ROWS, dtype=dtype), torch.randn(3, COLUMNS).to(dtype)
    expected = module(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x)
        assert result.dtype == dense(x).dtype
        if dtype != torch.float64:
            assert torch.equal(result, expected)
        with torch.autocast("cpu", enabled=False):
            assert module(x).dtype == dtype


def test_autocast_compiles_into_one_graph(wide):
    torch._dynamo.reset()  # one function compiles for so many modules
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(torch.compile(wide, fullgraph=True, backend="aot_eager")(x), wide(x.bfloat16()))


def test_the_derivative_passes_through_autocast(wide):
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = wide(x)
    assert result.dtype == torch.bfloat16
    gradient = torch.randn(3, 9).bfloat16()
    result.backward(gradient)
    assert torch.equal(x.grad, (gradient @ wide.dequantize().bfloat16()).float())
