"""The table of the benchmark, from a made-up record: the measurement itself needs a device."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "kernels" / "bench" / "lut_matmul_cuda.py"


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("bench_lut_matmul_cuda", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def record(bench):
    def row(shape, tokens, variant, bits, us, nbytes, warps=None):
        return asdict(bench.Row(*shape, tokens, variant, bits, warps, nbytes, us, us, us))

    small, large = (1024, 1024), (11008, 4096)
    return {
        "device": {"name": "Invented 1", "capability": "9.0", "torch": "2.13.0", "cuda": "13.0"},
        "dtype": "float16",
        "copy_gb_per_s": 2000.0,
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
        "Invented 1 (compute capability 9.0), float16, torch 2.13.0, CUDA 13.0, copy 2000 GB/s"
    )
