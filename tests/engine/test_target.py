"""The error-propagating target against its definition, on problems small enough to enumerate."""

from itertools import product

import pytest
import torch
from torch import nn

from quantlab.api import layer_loss
from quantlab.engine import target as target_module
from quantlab.engine.moments import Moments
from quantlab.engine.statistics import GroupStatistics, StatisticsCollector, StatisticsOptions
from quantlab.engine.target import targets_of
from quantlab.errors import NumericalError


@pytest.fixture
def chains():
    """Inputs of a layer in the float model and behind quantized layers: (tokens, in_features) each."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return inputs, inputs + 0.3 * torch.randn(40, 5, generator=generator) - 0.1 * inputs.roll(1, 1)


def statistics_of(chains, alpha, names=("a",)):
    inputs, quantized = chains
    collector = StatisticsCollector(
        {name: nn.Linear(inputs.shape[1], 1) for name in names}, StatisticsOptions(target_alpha=alpha)
    )
    collector.add(quantized, inputs)
    return collector.finish()


def target_of(weight, chains, alpha):
    return targets_of({"a": weight}, statistics_of(chains, alpha))["a"]


def test_the_layer_loss_at_the_target_is_the_output_error_between_the_chains(chains, monkeypatch):
    monkeypatch.setattr(target_module, "TARGET_DAMPING", 1e-9)
    inputs, quantized = (chain.double() for chain in chains)
    weight = torch.randn(3, 5)
    target = target_of(weight, chains, 1.0)
    hessian = quantized.T @ quantized / len(quantized)

    def output_error(weight_hat):
        return (inputs @ weight.double().T - quantized @ weight_hat.double().T).square().sum() / len(inputs)

    candidates = [weight + 0.2 * torch.randn(3, 5) for _ in range(4)]
    direct = torch.stack([output_error(candidate) for candidate in candidates])
    shifted = torch.stack([layer_loss(target, candidate, hessian).sum() for candidate in candidates])
    # They differ by a constant: what no weight behind quantized layers can make up for.
    torch.testing.assert_close(shifted - shifted[0], direct - direct[0], rtol=1e-4, atol=1e-5)
    assert output_error(target) < output_error(weight)


def test_the_best_codes_for_the_target_are_the_best_codes_for_the_float_outputs(chains, monkeypatch):
    monkeypatch.setattr(target_module, "TARGET_DAMPING", 1e-9)
    inputs, quantized = (chain.double() for chain in chains)
    weight = torch.tensor([[0.9, -0.4, 0.3, 1.2, -0.7]])
    grid = torch.tensor(list(product([-1.0, 0.0, 0.5, 1.0], repeat=5)))
    direct = (inputs @ weight.double().T - quantized @ grid.double().T).square().sum(dim=0)
    hessian = quantized.T @ quantized

    def losses(target):
        return layer_loss(target.expand(len(grid), -1), grid, hessian)

    assert losses(target_of(weight, chains, 1.0)).argmin() == direct.argmin()
    assert losses(weight).argmin() != direct.argmin()


def test_alpha_scales_the_shift(chains):
    weight = torch.randn(3, 5)
    half, full = (target_of(weight, chains, alpha) - weight for alpha in (0.5, 1.0))
    torch.testing.assert_close(2 * half, full, rtol=1e-4, atol=1e-6)
    assert full.abs().max() > 0.01


def test_without_alpha_or_without_drift_the_weights_stay_as_they_are(chains):
    weight = torch.randn(3, 5)
    assert target_of(weight, chains, 0.0) is weight
    inputs, _ = chains
    torch.testing.assert_close(target_of(weight, (inputs, inputs), 1.0), weight, rtol=0, atol=0)


def test_the_weights_are_not_written_to(chains):
    weight = torch.randn(3, 5)
    before = weight.clone()
    target_of(weight, chains, 1.0)
    assert torch.equal(weight, before)


def test_damping_keeps_the_target_near_the_weight_where_the_text_says_nothing(chains):
    inputs, quantized = (chain[:2] for chain in chains)  # two tokens for five inputs: a singular Hessian
    weight = torch.randn(3, 5)
    target = target_of(weight, (inputs, quantized), 1.0)
    assert torch.isfinite(target).all()
    unseen = torch.linalg.svd(quantized).Vh[2:]
    torch.testing.assert_close(target @ unseen.T, weight @ unseen.T, rtol=1e-3, atol=1e-4)


def test_a_dead_input_keeps_its_weights(chains):
    inputs, quantized = (chain.clone() for chain in chains)
    inputs[:, 2] = quantized[:, 2] = 0
    weight = torch.randn(3, 5)
    assert torch.equal(target_of(weight, (inputs, quantized), 1.0)[:, 2], weight[:, 2])


def test_row_groups_shift_with_their_own_moments(chains):
    first, second = (statistics_of(pair, 1.0).moments["a"][0] for pair in (chains, chains[::-1]))
    weight = torch.randn(4, 5)
    statistics = GroupStatistics(moments={"a": (first, second)}, num_tokens=40, target_alpha=1.0)
    target = targets_of({"a": weight}, statistics)["a"]
    torch.testing.assert_close(target[:2], target_of(weight[:2], chains, 1.0))
    torch.testing.assert_close(target[2:], target_of(weight[2:], chains[::-1], 1.0))


def test_layers_that_share_moments_share_the_factorisation(chains, monkeypatch):
    calls = []
    factor = target_module.damped_cholesky
    monkeypatch.setattr(target_module, "damped_cholesky", lambda *args: calls.append(args) or factor(*args))
    weights = {"a": torch.randn(3, 5), "b": torch.randn(2, 5)}
    targets = targets_of(weights, statistics_of(chains, 1.0, names=("a", "b")))
    assert len(calls) == 1
    for name, weight in weights.items():
        torch.testing.assert_close(targets[name], target_of(weight, chains, 1.0))


@pytest.mark.parametrize("broken", ["hessian", "drift"])
def test_statistics_that_are_not_finite_are_refused_by_name(broken):
    matrices = {"hessian": torch.eye(5), "drift": torch.zeros(5, 5)}
    matrices[broken][0, 0] = torch.nan
    statistics = GroupStatistics(moments={"a": (Moments(**matrices),)}, num_tokens=1, target_alpha=1.0)
    with pytest.raises(NumericalError, match="a: no error-propagating target: the statistics contain NaN"):
        targets_of({"a": torch.randn(3, 5)}, statistics)
