"""The benchmarks on CUDA: their tables from made-up records, and their stages by emulation. Times need a device."""

import importlib.util
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "kernels" / "bench"


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the benchmarks, which import each other as scripts do."""

    def load_script(name):
        monkeypatch.syspath_prepend(FOLDER)
        specification = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
        return module

    return load_script


@pytest.fixture
def bench(load):
    return load("lut_matmul_cuda")


@pytest.fixture
def record(bench):
    def row(shape, tokens, variant, bits, us, nbytes, warps=None):
        return asdict(bench.Row(*shape, tokens, variant, bits, warps, nbytes, us, us, us))

    small, large = (1024, 1024), (11008, 4096)
    return {
        "device": {"name": "Invented 1", "capability": "9.0", "torch": "2.13.0", "cuda": "13.0"},
        "dtype": "float16",
        "copy_gb_per_s": 2000.0,
        "refusals": [],
        "rows": [
            row(small, 1, "cublas", None, 10.0, 2 << 20),
            row(small, 1, "4 bits, row", 4, 4.0, 1 << 19),
            row(small, 8, "cublas", None, 12.0, 2 << 20),
            row(large, 1, "cublas", None, 50.0, 90_000_000),
            row(large, 1, "4 bits, row", 4, 20.0, 22_000_000),
            row(large, 1, "4 bits, row", 4, 16.0, 22_000_000, warps=16),
            row(large, 1, "3 bits, row", 3, 16.0, 17_000_000),
            row(large, 1, "3 bits, uniform 128", 3, 5.0, 17_000_000),
        ],
    }


def test_cells_hold_time_speed_and_share_of_the_memory(bench, record):
    lines = bench.render(record).splitlines()
    assert "| variant | m=1 | m=8 |" in lines
    # 524288 bytes in 4 µs are 131 GB/s.
    assert "| 4 bits, row | 4.0, 2.50x, 7% |  |" in lines
    assert "| 4 bits, row | 20.0, 2.50x, 55% |" in lines
    assert "| 4 bits, row, 16 warps | 16.0, 3.12x, 69% |" in lines


def test_targets_count_large_weights_and_the_choice_of_the_library(bench, record):
    lines = bench.render(record).splitlines()
    targets = [line for line in lines if line.startswith("- ")]
    assert targets == [
        "- 11008 x 4096, 4 bits: 2.50x cuBLAS, target 2.3x: met",
        "- 11008 x 4096, 3 bits: 3.12x cuBLAS, target 3.3x: missed",
    ]


def test_missing_shapes_of_the_targets_are_said_to_be_missing(bench, record):
    record["rows"] = record["rows"][:3]
    assert "no shape of the targets was measured" in bench.render(record)


def test_first_line_names_device_and_versions(bench, record):
    assert bench.render(record).splitlines()[0] == (
        "Invented 1 (compute capability 9.0), torch 2.13.0, CUDA 13.0, float16, copy 2000 GB/s"
    )


def test_other_projects_are_measured_where_they_are_installed(load, bench, monkeypatch):
    def matmul_kbit(x, planes, table, bits):
        assert (planes.shape, table.shape, bits) == ((3, 64, 4), (64, 8), 3)
        if len(x) == 2:
            raise RuntimeError("no two tokens")

    monkeypatch.setitem(sys.modules, "any_precision_ext", SimpleNamespace(matmul_kbit=matmul_kbit))
    monkeypatch.setattr(bench.cuda_peers, "_random_words", lambda *shape: torch.zeros(shape, dtype=torch.int32))
    monkeypatch.setattr(bench, "copies", lambda nbytes: 2)
    monkeypatch.setattr(bench, "time_calls", lambda calls, captured: [call() for call in calls] and (3.0, 2.0, 4.0))
    monkeypatch.setattr(bench, "measure_kernel", lambda *arguments, captured: "ours")
    refusals = []
    (row, ours) = bench.measure_peers(torch.zeros(1, 128).half(), 64, 3, refusals)
    assert (row.variant, row.us, ours) == ("3 bits, Any-Precision, call by call", 3.0, "ours")
    assert bench.measure_peers(torch.zeros(9, 128).half(), 64, 3, refusals) == []
    assert bench.measure_peers(torch.zeros(2, 128).half(), 64, 3, refusals) == []
    assert refusals == ["3 bits, Any-Precision, call by call, 64 x 128, 2 tokens: no two tokens"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("script", ["lut_matmul_cuda", "solver_cuda"])
def test_nothing_is_measured_without_a_device(script, tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(FOLDER / f"{script}.py"), "run", str(record)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("nothing to measure: PyTorch")
    assert len(result.stderr.splitlines()) == 1
    assert not record.exists()


def test_every_stage_of_the_solvers_is_as_good_as_in_pytorch(load, emulation, monkeypatch):
    bench = load("solver_cuda")
    monkeypatch.setattr(bench, "milliseconds", lambda call, repetitions: float(repetitions))
    weight, hessian = bench.layer(9, 128, device="cpu")
    for call in bench.stages(weight, hessian, 2).values():
        assert bench.pytorch_ms(call) == 1.0


def test_stages_are_compared_with_a_product_and_with_pytorch(load, record):
    bench = load("solver_cuda")
    rows = [
        bench.Row(4096, 4096, 4, "sweep, tables", 3.0, 2.0, 600.0),
        bench.Row(4096, 4096, 3, "sweep, tables", 2.0, 2.0, None),
        bench.Row(4096, 4096, 4, "k-means", 1.0, 2.0, 10.0),
    ]
    lines = bench.render({"device": record["device"], "rows": [asdict(row) for row in rows]}).splitlines()
    assert lines[0] == "Invented 1 (compute capability 9.0), torch 2.13.0, CUDA 13.0"
    assert "### 4096 x 4096, one product 2.00 ms" in lines
    assert "| stage | 4 bits | 3 bits |" in lines
    assert "| sweep, tables | 3.00, 1.5, 200x | 2.00, 1.0 |" in lines
    assert "| k-means | 1.00, 0.5, 10x |  |" in lines
