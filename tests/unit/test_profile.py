import pytest
import torch
from torch.profiler import ProfilerActivity

import quantlab.evaluate.clock as clock
import quantlab.evaluate.profile as module
from quantlab.evaluate.subject import find_subject
from quantlab.progress import NoProgress

PROMPT = torch.tensor([1, 2, 3])


@pytest.fixture(scope="module")
def model():
    return find_subject("demo").load()


@pytest.fixture
def pretended_cuda(monkeypatch):
    """A CPU that says of itself what a CUDA device would: 1000 bytes are occupied, and 1300 at the peak."""
    monkeypatch.setattr(clock, "ACTIVITIES", (ProfilerActivity.CPU,))
    monkeypatch.setattr(clock, "kernel_s", lambda events: sum(event.name == "aten::argmax" for event in events))
    monkeypatch.setattr(module, "_cuda_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1300)


def test_profiled_turn_is_a_whole_generation_and_its_peak_that_of_one_model(model, pretended_cuda):
    result = module._profile_kernels(model, PROMPT, 6, occupied_bytes=400)
    assert result == {"cuda_s": 6, "device_peak_bytes": 700}  # 6 tokens chosen; 600 bytes are of other models


def test_warm_up_tells_what_the_model_occupies_with_what_it_prepared(model, monkeypatch):
    occupied = iter([5000, 5400])
    monkeypatch.setattr(module, "_cuda_bytes", lambda device: next(occupied))
    assert module._warm_up(model, PROMPT) == module._weight_bytes(model) + 400


def test_no_turn_is_profiled_on_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "_profile_kernels", None)
    options = module.ProfileOptions(new_tokens=2, repeats=1)
    results = module.profile_subjects([find_subject("demo")], options, NoProgress())
    assert not {"cuda_s", "device_peak_bytes"} & results["models"]["demo"].keys()
    assert "device_name" not in results
