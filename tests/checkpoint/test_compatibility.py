"""Checkpoints that former versions wrote are kept in `fixtures` and must be readable for ever."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.format import FORMAT_VERSION
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.verify import verify
from quantlab.runtime import LutLinear

FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


@pytest.mark.parametrize("read", [load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_an_old_checkpoint_still_means_what_it_meant(fixture, read):
    expected = load_file(fixture / "expected.safetensors")
    model = read(fixture / "model")
    ids, logits = expected.pop("input_ids"), expected.pop("logits")
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, logits)
    assert {name for name, module in model.named_modules() if isinstance(module, LutLinear)} == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).dequantize(), weight)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_an_old_checkpoint_passes_verification(fixture):
    assert verify(fixture / "model").layers == 7


def test_every_format_so_far_has_a_fixture():
    assert [path.name for path in FIXTURES] == [f"format-{number + 1}" for number in range(FORMAT_VERSION)]
