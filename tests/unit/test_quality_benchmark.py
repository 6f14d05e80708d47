import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "bench" / "quality.py"


def test_the_quality_benchmark_ranks_methods_on_synthetic_layers(tmp_path):
    target = tmp_path / "quality.json"
    command = [sys.executable, BENCHMARK, "--bits", "3", "--methods", "ganq@paper", "lnq", "--seeds", "1"]
    done = subprocess.run([*command, "--model", "none", "--json", target], check=True, capture_output=True, text=True)
    assert "ganq@paper" in done.stdout
    rows = {row["method"]: row for row in json.loads(target.read_text())["rows"]}
    assert rows["gptq"]["calibration"] == rows["gptq"]["held_out"] == rows["rtn"]["worst_against_rtn"] == 1
    assert rows["ganq@paper"]["held_out"] < 1 < rows["rtn"]["held_out"]
    assert rows["ganq@paper"]["worst_against_rtn"] < 1


@pytest.mark.slow
def test_the_quality_benchmark_takes_the_layers_of_a_model(tmp_path):
    target = tmp_path / "quality.json"
    command = [sys.executable, BENCHMARK, "--bits", "4", "--methods", "kmeans", "--seeds", "0", "--samples", "2"]
    subprocess.run([*command, "--sequence-length", "128", "--json", target], check=True, capture_output=True)
    record = json.loads(target.read_text())
    assert {row["kind"] for row in record["rows"]} == {"model"}
    assert len({loss["layer"] for loss in record["layers"]}) == record["rows"][0]["layers"] > 20
