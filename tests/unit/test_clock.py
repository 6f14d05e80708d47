import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import quantlab.evaluate.clock as module
from quantlab.evaluate.clock import Clock, KernelClock, kernel_s


@pytest.fixture
def on_cpu(monkeypatch):
    """The profiler records what the CPU does."""
    monkeypatch.setattr(module, "ACTIVITIES", (ProfilerActivity.CPU,))


def test_intervals_lie_between_ticks():
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        clock.tick()
    assert len(clock.intervals_s()) == 3
    assert min(clock.intervals_s()) >= 0


def test_kernels_and_copies_of_the_device_count_and_nothing_else():
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("a part of the program"):
        product = torch.ones(8, 8) @ torch.ones(8, 8)
        product.sum()
    events = list(profiler.events())
    assert kernel_s(events) == 0  # all of them the CPU's
    kernels = [event for event in events if event.name in ("aten::mm", "aten::sum")]
    (part,) = [event for event in events if event.name == "a part of the program"]
    assert len(kernels) == 2
    for event in (*kernels, part):
        event.device_type, event.use_device = DeviceType.CUDA, "cuda"
    assert part.is_user_annotation
    assert kernel_s(events) == pytest.approx(sum(event.time_range.elapsed_us() for event in kernels) / 1e6)


@pytest.mark.parametrize("ticks", [0, 3, 4, 9])
def test_sections_of_the_profiler_together_see_every_step_once(on_cpu, monkeypatch, ticks):
    monkeypatch.setattr(module, "SECTION_TICKS", 4)
    monkeypatch.setattr(module, "kernel_s", lambda events: sum(event.name == "aten::mm" for event in events))
    with KernelClock() as clock:
        for _ in range(ticks):
            torch.ones(2, 2) @ torch.ones(2, 2)
            clock.tick()
    assert clock.total_s == ticks
