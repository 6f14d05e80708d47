import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.evaluate import perplexity as module
from quantlab.evaluate.perplexity import perplexity
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


@torch.no_grad()
def test_it_equals_a_straightforward_loop_over_windows_and_positions(model):
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for window in ids:
        for position in range(1, len(window)):
            log_probabilities = model(input_ids=window[None, :position]).logits[0, -1].double().log_softmax(0)
            losses.append(-log_probabilities[window[position]].item())
    assert len(losses) == 5 * 8
    assert perplexity(model, ids, NoProgress()) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_batching_does_not_change_it(model, monkeypatch):
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    together = perplexity(model, ids, NoProgress())
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 9)
    assert perplexity(model, ids, NoProgress()) == pytest.approx(together, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model):
    uniform = AutoModelForCausalLM.from_config(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, torch.zeros(2, 7, dtype=torch.int64), NoProgress()) == pytest.approx(50)
