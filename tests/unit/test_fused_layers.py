"""Layers that read the same input, prepared as one weight and multiplied in one call."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from quantlab.api import CodebookSpec, Lut, Outliers, QuantizedLayer, UniformGrid
from quantlab.runtime import MOST_LOSSES, LutLinear, fuse
from quantlab_kernels import cpu, prepare

COLUMNS, ROWS = 160, (64, 32, 96)


def make_layer(rows, kind="lut", *, columns=COLUMNS, bits=4, bias=False):
    groups = 5 if kind == "uniform" else 1
    if kind == "uniform":
        zero = torch.randint(0, 8, (rows, groups)).float()
        codebook = UniformGrid(scale=torch.rand(rows, groups) + 0.1, zero=zero, bits=bits)
    else:
        codebook = Lut(values=torch.randn(rows, groups, 2**bits))
    outliers = None
    if kind == "outliers":
        at = torch.arange(rows // 2)
        outliers = Outliers(rows=at * 2, columns=at % columns, values=torch.randn(len(at)))
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    spec = CodebookSpec(bits=bits, group_size=columns // groups)
    layer = QuantizedLayer(codes=codes, codebook=codebook, outliers=outliers)
    return LutLinear.from_layer(layer, spec, torch.randn(rows) if bias else None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The rows of every call of the kernel."""
    if prepare(torch.zeros(4, 8, 1, dtype=torch.int32), torch.zeros(8, 1, 16), None, 32, torch.float32) is None:
        pytest.skip("this machine reads the stored bit planes")
    rows, multiply = [], cpu._multiply

    def counted(library, tiled, x, codes, bits, out_features, *rest):
        rows.append(out_features)
        return multiply(library, tiled, x, codes, bits, out_features, *rest)

    monkeypatch.setattr(cpu, "_multiply", counted)
    return rows


@pytest.fixture
def layers(calls):
    return [make_layer(rows) for rows in ROWS]


def alone(layers):
    """Copies that are not fused."""
    copies = copy.deepcopy(layers)
    for layer in copies:
        layer.separate()
    return copies


def fused(layers):
    fuse(layers)
    return layers


def outputs(layers, x, order=None):
    results = {index: layers[index](x) for index in order or range(len(layers))}
    return [results[index] for index in sorted(results)]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lut", "uniform", "outliers"])
def test_one_call_gives_every_layer_the_result_of_its_own_call(calls, kind, bias, dtype):
    layers = [make_layer(rows, kind, bias=bias) for rows in ROWS]
    weights = [layer.dequantize() for layer in layers]
    x = torch.randn(1, 1, COLUMNS).to(dtype)
    expected = outputs(alone(layers), x)
    fuse(layers)
    for order in ((0, 1, 2), (2, 0, 1)):
        calls.clear()
        results = outputs(layers, x, order)
        assert calls == [sum(ROWS)]
        assert equal(results, expected)
        assert all(result.is_contiguous() for result in results)
    assert equal([layer.dequantize() for layer in layers], weights)
    batch = torch.randn(3, COLUMNS).to(dtype)
    assert equal(outputs(layers, batch), outputs(alone(layers), batch))


def test_an_input_that_was_changed_in_place_is_multiplied_again(layers, calls):
    separate, x = alone(layers), torch.randn(1, COLUMNS)
    fuse(layers)
    first = layers[0](x)
    assert torch.equal(first, separate[0](x))
    x.mul_(2)
    calls.clear()
    assert torch.equal(layers[1](x), separate[1](x))
    assert calls[0] == sum(ROWS)
    assert torch.equal(layers[2](x), separate[2](x))


def test_an_equal_tensor_is_another_input(layers, calls):
    separate, x = alone(layers), torch.randn(1, COLUMNS)
    fuse(layers)
    layers[0](x)
    calls.clear()
    assert torch.equal(layers[1](x.clone()), separate[1](x))
    assert calls[0] == sum(ROWS)


def test_an_output_is_handed_out_once_and_belongs_to_the_caller(layers):
    separate, x = alone(layers), torch.randn(1, COLUMNS)
    fuse(layers)
    first, second, _ = outputs(layers, x)
    first.zero_()
    assert second._version == 0
    assert torch.equal(second, separate[1](x))
    assert torch.equal(layers[0](x), separate[0](x))


def test_batches_and_tensors_of_the_inference_mode_are_multiplied_layer_by_layer(layers, calls):
    separate = alone(layers)
    fuse(layers)
    with torch.inference_mode():
        x = torch.randn(1, COLUMNS)
        result = layers[0](x)
        x.mul_(2)  # leaves no trace
        assert torch.equal(layers[1](x), separate[1](x))
    assert torch.equal(result * 2, separate[0](x))
    batch = torch.randn(2, COLUMNS)
    calls.clear()
    outputs(layers, batch)
    assert calls == list(ROWS)


def test_inputs_under_autocast_are_multiplied_layer_by_layer(layers, calls):
    expected = outputs(alone(layers), x := torch.randn(1, COLUMNS))
    narrow = outputs(alone(layers), x.bfloat16())
    fuse(layers)
    layers[0](x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2 * MOST_LOSSES):
            assert equal(outputs(layers, x), narrow)
    assert calls == [*ROWS] * 2 * MOST_LOSSES
    assert equal(outputs(layers, x), expected)
    assert calls[-1] == sum(ROWS)


def test_layers_that_get_different_inputs_are_separated(layers, calls):
    separate, inputs = alone(layers), torch.randn(20, 3, 1, COLUMNS)
    fuse(layers)
    for each in inputs:
        results = [layer(x) for layer, x in zip(layers, each, strict=True)]
        assert equal(results, [layer(x) for layer, x in zip(separate, each, strict=True)])
    assert calls.count(sum(ROWS)) == MOST_LOSSES


def test_layers_that_get_the_same_input_stay_fused_though_some_outputs_are_lost(layers, calls):
    fuse(layers)
    for _ in range(10):
        layers[0](torch.randn(1, COLUMNS))
        outputs(layers, torch.randn(1, COLUMNS))
    assert calls == [sum(ROWS)] * 20


def storages(layers):
    """Bytes by storage."""
    buffers = [buffer.untyped_storage() for layer in layers for buffer in layer.buffers()]
    return {storage.data_ptr(): storage.nbytes() for storage in buffers}


@pytest.mark.parametrize("kind", ["lut", "outliers"])
def test_nothing_is_stored_twice_and_the_state_stays_what_it_was(calls, kind):
    layers, x = nn.ModuleList(make_layer(rows, kind, bias=True) for rows in ROWS), torch.randn(1, COLUMNS)
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    separate = alone(layers)
    outputs(separate, x)
    fuse(layers)
    outputs(layers, x)
    assert all(layer.packed_codes is None for layer in layers)
    assert len({layer.prepared_codes.untyped_storage().data_ptr() for layer in layers}) == 1
    assert sum(storages(layers).values()) == sum(storages(separate).values())
    after = layers.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_fused_layers_can_be_cast_moved_and_filled(layers, calls):
    layers, x = nn.ModuleList(layers), torch.randn(1, COLUMNS)
    separate = alone(layers)
    fuse(layers)
    expected = outputs(layers, x)
    layers.to(torch.bfloat16)
    assert all(layer.packed_codes is not None for layer in layers)
    calls.clear()
    assert equal(outputs(layers, x), expected)
    assert calls == [sum(ROWS)]
    layers[1].to(torch.float32)  # one of them alone
    assert equal(outputs(layers, x), expected)
    state = {name: tensor * 2 if "codebook" in name else tensor for name, tensor in separate.state_dict().items()}
    with torch.inference_mode():
        layers.to(torch.float32)
        outputs(layers, x)
    layers.load_state_dict(state)
    calls.clear()
    assert equal(outputs(layers, x), [each * 2 for each in expected])
    assert calls == [sum(ROWS)]


def test_a_copy_is_fused_with_itself(layers, calls):
    layers, x = nn.ModuleList(layers), torch.randn(1, COLUMNS)
    fuse(layers)
    expected = outputs(layers, x)
    layers[0](x)
    twins = copy.deepcopy(layers)
    with torch.no_grad():
        for twin in twins:
            twin.codebook.mul_(2)
    calls.clear()
    assert equal(outputs(twins, x, (1, 0, 2)), [each * 2 for each in expected])
    assert calls == [sum(ROWS)]
    assert equal(outputs(layers, x), expected)
    assert torch.equal(copy.deepcopy(layers[1])(x), expected[1])


def test_what_is_prepared_apart_is_not_fused(calls):
    x = torch.randn(1, COLUMNS)
    for odd in (make_layer(32, bits=3), make_layer(32, "outliers"), make_layer(32, bias=True), make_layer(40)):
        layers = fused([make_layer(64), odd, make_layer(96)])
        calls.clear()
        outputs(layers, x)
        assert calls == [160, odd.out_features]
    layers = fused([make_layer(64), make_layer(32, columns=32)])
    calls.clear()
    layers[0](x), layers[1](x[:, :32])
    assert calls == [64, 32]


def test_layers_in_different_places_or_types_are_separated(layers, calls):
    expected, x = outputs(alone(layers), x := torch.randn(1, COLUMNS)), x
    fuse(layers)
    layers[1].to("meta")
    calls.clear()
    assert torch.equal(layers[0](x), expected[0])
    assert torch.equal(layers[2](x), expected[2])
    assert calls == [ROWS[0], ROWS[2]]
    layers = [make_layer(rows, bias=True) for rows in ROWS]
    expected = outputs(alone(layers), x)
    fuse(layers)
    layers[1].to(torch.float16)
    assert torch.equal(layers[0](x), expected[0])
    assert layers[0].bias.dtype == torch.float32
    assert layers[1].bias.dtype == torch.float16


def test_a_backend_that_prepares_nothing_separates_the_layers(monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    layers, x = [make_layer(rows) for rows in ROWS], torch.randn(1, COLUMNS)
    expected = outputs(alone(layers), x)
    fuse(layers)
    assert equal(outputs(layers, x), expected)
    assert all(layer.packed_codes is not None for layer in layers)


def test_fused_layers_compile_into_one_graph_and_are_called_one_by_one_there(layers, calls):
    fuse(layers)
    x = torch.randn(1, COLUMNS)
    expected = outputs(layers, x)

    def run(x):
        return [layer(x) for layer in layers]

    calls.clear()
    with torch.no_grad():
        assert equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)
    assert calls == list(ROWS)


def test_inputs_that_require_gradients_get_those_of_every_layer(layers, calls):
    weights = [layer.dequantize() for layer in layers]
    fuse(layers)
    x = torch.randn(1, COLUMNS, requires_grad=True)
    gradients = [torch.randn(1, rows) for rows in ROWS]
    results = outputs(layers, x)
    assert equal(results, outputs(alone(layers), x.detach()))
    torch.autograd.backward(results, gradients)
    exact = sum(gradient @ weight for gradient, weight in zip(gradients, weights, strict=True))
    torch.testing.assert_close(x.grad, exact)


def test_threads_that_meet_in_fused_layers_agree(layers):
    samples = torch.randn(40, 1, COLUMNS).unbind()
    expected = [outputs(alone(layers), x) for x in samples]
    fuse(layers)
    layers = nn.ModuleList(layers)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            layers.to(torch.float32)
            results = pool.map(lambda x: outputs(layers, x), samples)
            assert all(map(equal, results, expected))
            shared = pool.map(lambda _: outputs(layers, samples[0]), range(20))
            assert all(equal(result, expected[0]) for result in shared)
