"""Devices: what is refused, what is planned, and the engine on one that is not the CPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantlab.api import CodebookSpec
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine import device as devices
from quantlab.engine.journal import Journal
from quantlab.engine.memory import DEVICE_RUNTIME_BYTES, RUNTIME_BYTES, plan_memory
from quantlab.engine.options import EngineOptions
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import StatisticsOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.engine.survey import survey_model
from quantlab.errors import RecipeError, UsageError
from quantlab.evaluate.evaluation import must_stream
from quantlab.evaluate.subject import Subject
from quantlab.executors import LocalExecutor
from quantlab.progress import NoProgress
from quantlab.registry import configure
from quantlab.skeleton import read_config


def test_on_a_device_with_a_memory_of_its_own_everything_is_where_it_belongs():
    suite = Path(__file__).with_name("faraway.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("cpu", "cuda", "cuda:0"):
        devices.require_device(torch.device(name))
    with pytest.raises(UsageError, match=r"no device cuda:1: .* finds 1 CUDA devices"):
        devices.require_device(torch.device("cuda:1"))


def test_models_that_a_gpu_cannot_hold_are_evaluated_block_by_block(model_folder, monkeypatch):
    device = torch.device("cuda")
    subject = Subject(name="model", folder=model_folder("llama"), is_quantized=False, device=device)
    for capacity, streamed in ((2 * subject.bytes_on_disk, False), (subject.bytes_on_disk, True)):
        properties = SimpleNamespace(total_memory=capacity)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert must_stream([subject], torch.float32, None) is streamed


def test_the_nodes_of_a_cluster_have_no_such_device(model_folder, token_ids, tmp_path):
    executor = LocalExecutor()
    executor.remote = True
    options = SolveOptions(quantizer=configure("rtn", preset=None, options={}), spec=CodebookSpec(bits=4))
    request = StreamRequest(
        source=model_folder("llama"),
        calibration_ids=token_ids,
        dtype=torch.float32,
        options_of=lambda layer: options,
        engine=EngineOptions(device=torch.device("cuda")),
    )
    writer = CheckpointWriter(tmp_path / "model")
    with pytest.raises(RecipeError, match="--gpus-per-task"), Journal.opened(tmp_path) as journal:
        quantize_model(request, writer, journal, tmp_path, NoProgress(), executor=executor)


def plan(model_folder, **options):
    sizes = survey_model(read_config(model_folder("llama")), torch.float32).sizes
    return plan_memory(sizes, 64, 4096, EngineOptions(device=torch.device("cuda"), **options), StatisticsOptions())


def test_each_memory_has_a_budget_of_its_own(model_folder):
    free = plan(model_folder)
    hidden = 2 * 64 * 4096 * 32 * 4
    assert free.parts["hidden states"] == hidden
    assert RUNTIME_BYTES + hidden < free.peak_bytes < RUNTIME_BYTES + 1.1 * hidden
    assert DEVICE_RUNTIME_BYTES < free.device_peak_bytes < DEVICE_RUNTIME_BYTES + hidden

    on_disk = plan(model_folder, memory_budget_bytes=RUNTIME_BYTES + hidden // 2)
    assert not on_disk.activations_in_memory
    assert on_disk.device_peak_bytes == free.device_peak_bytes
    small = DEVICE_RUNTIME_BYTES + (free.device_peak_bytes - DEVICE_RUNTIME_BYTES) * 2
    cut = plan(model_folder, device_memory_budget_bytes=small)
    assert cut.device_peak_bytes <= small
    assert cut.activations_in_memory

    with pytest.raises(RecipeError, match=r"engine\.device_memory_budget=513 MiB is too small"):
        plan(model_folder, device_memory_budget_bytes=DEVICE_RUNTIME_BYTES + 2**20)
    with pytest.raises(RecipeError, match=r"engine\.memory_budget=513 MiB is too small"):
        plan(model_folder, memory_budget_bytes=RUNTIME_BYTES + 2**20, activations="ram")
