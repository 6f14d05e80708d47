import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.evaluate import perplexity as module
from quantlab.evaluate.perplexity import in_memory, measure, measure_pair
from quantlab.evaluate.protocols import EvaluationWindows
from quantlab.progress import NoProgress


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def windows_of(ids, first_target=1):
    return EvaluationWindows(
        protocol="test",
        version=1,
        bos="none",
        stride=ids.shape[1],
        ids=ids,
        first_target=torch.full((len(ids),), first_target),
    )


def perplexity(model, ids):
    return measure(windows_of(ids), in_memory(model), NoProgress())["perplexity"]


@torch.no_grad()
def test_it_equals_a_straightforward_loop_over_windows_and_positions(model):
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for window in ids:
        for position in range(1, len(window)):
            log_probabilities = model(input_ids=window[None, :position]).logits[0, -1].double().log_softmax(0)
            losses.append(-log_probabilities[window[position]].item())
    assert len(losses) == 5 * 8
    assert perplexity(model, ids) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    late = measure(windows_of(ids, first_target=7), in_memory(model), NoProgress())
    scored = [loss for index, loss in enumerate(losses) if index % 8 >= 6]
    assert late["perplexity"] == pytest.approx(math.exp(sum(scored) / len(scored)), rel=1e-5)


def test_batching_does_not_change_it(model, monkeypatch):
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    together = perplexity(model, ids)
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 9)
    assert perplexity(model, ids) == pytest.approx(together, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model):
    uniform = AutoModelForCausalLM.from_config(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, torch.zeros(2, 7, dtype=torch.int64)) == pytest.approx(50)


def test_a_pair_gets_the_perplexities_of_each_and_a_divergence_that_is_zero_only_for_equals(model):
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    other = AutoModelForCausalLM.from_config(model.config).eval()
    pair = measure_pair(windows_of(ids), in_memory(model), in_memory(other), NoProgress())
    assert pair["float"] == pytest.approx(perplexity(model, ids))
    assert pair["quantized"] == pytest.approx(perplexity(other, ids))
    assert pair["kl"] > 0.1
    assert pair["top1_agreement"] < 1
    same = measure_pair(windows_of(ids), in_memory(model), in_memory(model), NoProgress())
    assert (same["kl"], same["top1_agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    assert same["windows"] == 5
