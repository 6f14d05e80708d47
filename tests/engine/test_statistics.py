import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma3n import Gemma3nTextConfig

from quantlab.engine import moments as moments_module
from quantlab.engine import statistics as statistics_module
from quantlab.engine.linears import find_linears
from quantlab.engine.statistics import (
    Gradients,
    StatisticsCollector,
    StatisticsOptions,
    capture_inputs,
    require_collectable,
    row_groups,
    statistics_bytes,
)
from quantlab.errors import ModelError
from quantlab.skeleton import find_blocks

PLAIN = StatisticsOptions()
DRIFT = StatisticsOptions(target_alpha=0.5)


@pytest.fixture
def linears():
    return {"a": nn.Linear(6, 4), "b": nn.Linear(6, 3)}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sequences, 5, 6, generator=generator) for sequences in (2, 3)]


@pytest.fixture(params=["one piece", "ragged pieces"])
def piece_sizes(request, monkeypatch):
    if request.param == "ragged pieces":
        monkeypatch.setattr(statistics_module, "TOKENS_PER_PIECE", 7)
        monkeypatch.setattr(moments_module, "_ROWS_PER_MIRROR", 4)


def collect(linears, options, batches, references=None, gradients=None):
    collector = StatisticsCollector(linears, options, gradients)
    for batch, reference in zip(batches, references or [None] * len(batches), strict=True):
        collector.add(batch, reference)
    return collector.finish()


def tokens_of(batches):
    return torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches]).double()


@pytest.mark.usefixtures("piece_sizes")
def test_the_hessian_is_the_mean_over_tokens_without_a_factor_of_two(linears, batches):
    statistics = collect(linears, PLAIN, batches)
    tokens = tokens_of(batches)
    (moments,) = statistics.moments["a"]
    assert statistics.num_tokens == 25
    assert torch.equal(moments.hessian, moments.hessian.T)
    torch.testing.assert_close(moments.hessian.double(), tokens.T @ tokens / 25, rtol=1e-5, atol=1e-6)
    assert moments.drift is None


def test_layers_with_the_same_input_hold_the_same_moments(linears, batches):
    statistics = collect(linears, PLAIN, batches)
    assert statistics.moments["a"][0] is statistics.moments["b"][0]


def test_half_precision_inputs_are_accumulated_in_float32():
    collector = StatisticsCollector({"a": nn.Linear(1, 1)}, PLAIN)
    for _ in range(2):
        collector.add(torch.full((4096, 1), 1.0, dtype=torch.bfloat16))  # a bfloat16 sum would stall at 256
    assert collector.finish().moments["a"][0].hessian.item() == 1.0


def test_equal_batches_have_equal_statistics_bit_for_bit(linears, batches):
    first, second = (collect(linears, DRIFT, batches, [2 * batch for batch in batches]) for _ in range(2))
    assert torch.equal(first.moments["a"][0].hessian, second.moments["a"][0].hessian)
    assert torch.equal(first.moments["a"][0].drift, second.moments["a"][0].drift)


def test_the_activations_are_left_as_they_are(linears, batches):
    before = [batch.clone() for batch in batches]
    gradients = Gradients(saliency={name: torch.rand(2, 25) for name in linears})
    collect(linears, StatisticsOptions(saliency_groups=2), batches, gradients=gradients)
    assert all(torch.equal(batch, original) for batch, original in zip(batches, before, strict=True))


def test_float_inputs_replace_the_quantized_ones(linears, batches):
    references = [batch + 1 for batch in batches]
    options = StatisticsOptions(inputs="float")
    statistics = collect(linears, options, [None, None], references)
    expected = collect(linears, PLAIN, references)
    assert torch.equal(statistics.moments["a"][0].hessian, expected.moments["a"][0].hessian)


@pytest.mark.usefixtures("piece_sizes")
def test_the_drift_is_the_mean_of_float_minus_quantized_times_quantized(linears, batches):
    references = [batch + 0.1 * torch.randn(batch.shape) for batch in batches]
    (moments,) = collect(linears, DRIFT, batches, references).moments["a"]
    tokens, float_tokens = tokens_of(batches), tokens_of(references)
    expected = (float_tokens - tokens).T @ tokens / 25
    torch.testing.assert_close(moments.drift.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.hessian.double(), tokens.T @ tokens / 25, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("piece_sizes")
def test_saliency_weighs_every_token_for_each_group_of_rows(linears, batches):
    options = StatisticsOptions(saliency_groups=2, target_alpha=1.0)
    gradients = Gradients(saliency={name: torch.rand(2, 25) for name in linears})
    references = [batch.roll(1, -1) for batch in batches]
    statistics = collect(linears, options, batches, references, gradients)
    tokens, float_tokens = tokens_of(batches), tokens_of(references)
    for name in linears:
        assert len(statistics.moments[name]) == 2
        for moments, saliency in zip(statistics.moments[name], gradients.saliency[name], strict=True):
            weighted = saliency[:, None].double() * tokens
            torch.testing.assert_close(moments.hessian.double(), tokens.T @ weighted / 25, rtol=1e-4, atol=1e-6)
            drift = (float_tokens - tokens).T @ weighted / 25
            torch.testing.assert_close(moments.drift.double(), drift, rtol=1e-4, atol=1e-6)


def test_the_fisher_diagonal_is_passed_on_if_it_is_asked_for(linears, batches):
    gradients = Gradients(fisher={"a": torch.rand(4, 6), "b": torch.rand(3, 6), "other": torch.rand(1, 1)})
    asked = collect(linears, StatisticsOptions(fisher=True), batches, gradients=gradients)
    assert dict(asked.fisher) == {name: gradients.fisher[name] for name in linears}
    assert not collect(linears, PLAIN, batches, gradients=gradients).fisher


def test_layers_that_no_token_reaches_have_a_hessian_of_zeros(linears):
    statistics = collect(linears, PLAIN, [None, None])
    assert statistics.num_tokens == 0
    assert not statistics.moments["a"][0].hessian.any()


def test_a_batch_that_misses_an_expert_is_passed_over(linears, batches):
    statistics = collect(linears, PLAIN, [batches[0], None, batches[1]])
    expected = collect(linears, PLAIN, batches)
    assert torch.equal(statistics.moments["a"][0].hessian, expected.moments["a"][0].hessian)


def test_drift_between_different_tokens_is_refused(linears, batches):
    for reference in (None, batches[0][:1]):
        with pytest.raises(ModelError, match="a: the quantized and the float model send different tokens"):
            collect(linears, DRIFT, batches[:1], [reference])


@pytest.mark.parametrize("known", [24, 26])
def test_saliency_of_other_tokens_is_refused(linears, batches, known):
    gradients = Gradients(saliency={name: torch.rand(1, known) for name in linears})
    with pytest.raises(ModelError, match=rf"a: received 25 tokens, but saliency is known for {known}"):
        collect(linears, StatisticsOptions(saliency_groups=1), batches, gradients=gradients)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": "both"}, "inputs='both'"),
        ({"target_alpha": 1.5}, "target_alpha=1.5"),
        ({"saliency_groups": -1}, "saliency_groups=-1"),
        ({"inputs": "float", "target_alpha": 0.5}, "set one of the two"),
    ],
    ids=["inputs", "alpha", "groups", "together"],
)
def test_options_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StatisticsOptions(**values)


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, (True, False, False)),
        ({"inputs": "float"}, (False, True, False)),
        ({"target_alpha": 0.5}, (True, True, False)),
        ({"saliency_groups": 1}, (True, False, True)),
        ({"fisher": True}, (True, False, True)),
    ],
    ids=["plain", "float", "drift", "saliency", "fisher"],
)
def test_options_say_what_the_engine_must_provide(values, needed):
    options = StatisticsOptions(**values)
    assert (options.quantized_inputs, options.float_inputs, options.gradients) == needed


def test_memory_is_counted_as_it_is_allocated(linears, batches):
    gradients = Gradients(saliency={name: torch.rand(3, 25) for name in linears})
    for options in (
        PLAIN,
        DRIFT,
        StatisticsOptions(saliency_groups=3),
        StatisticsOptions(saliency_groups=3, target_alpha=1.0),
    ):
        statistics = collect(linears, options, batches, batches, gradients)
        tensors = {
            id(tensor): tensor.nbytes
            for moments in statistics.moments.values()
            for own in moments
            for tensor in vars(own).values()
            if tensor is not None
        }
        assert statistics_bytes(6, 2, options) == sum(tensors.values())


def test_rows_are_cut_into_nearly_equal_groups():
    assert row_groups(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert row_groups(2, 5) == [slice(0, 1), slice(1, 2)]


def test_captured_inputs_are_those_of_the_forward_pass(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    block = find_blocks(model)[1][0]
    linears = find_linears(block)
    seen = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=token_ids)
        for handle in handles:
            handle.remove()
        expected = dict(seen)
        captured = capture_inputs(list(linears.values()), lambda: model(input_ids=token_ids))
    for tensor, name in zip(captured, linears, strict=True):
        assert torch.equal(tensor, expected[name])
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_a_forward_pass_is_left_when_everything_is_known(linears):
    after = []

    def forward():
        linears["a"](torch.ones(1, 6))
        after.append("a")
        linears["b"](torch.ones(1, 6))
        after.append("b")

    assert capture_inputs(list(linears.values()), forward)[1].shape == (1, 6)
    assert after == ["a"]


def test_a_layer_that_is_not_called_has_no_input(linears):
    captured = capture_inputs(list(linears.values()), lambda: linears["b"](torch.ones(1, 6)))
    assert captured[0] is None
    assert captured[1].shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "config", "experts", "message"),
    [
        (DRIFT, LlamaConfig(), ["model.layers.0.mlp.experts"], "layers.0.mlp.experts is a mixture .* target_alpha=0.5"),
        (StatisticsOptions(saliency_groups=2), LlamaConfig(), ["experts"], "saliency_groups=2 compares"),
        (
            StatisticsOptions(fisher=True),
            Gemma3nTextConfig(num_kv_shared_layers=3),
            [],
            "3 blocks take keys and values",
        ),
    ],
    ids=["drift", "saliency", "shared"],
)
def test_statistics_that_a_model_cannot_give_are_refused_with_the_reason(options, config, experts, message):
    with pytest.raises(ModelError, match=message):
        require_collectable(options, config, experts)
    require_collectable(PLAIN, config, experts)
    require_collectable(options, LlamaConfig(), [])
