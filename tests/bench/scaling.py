"""From one worker to two on this machine, and what that says about larger ones: `python tests/bench/scaling.py`.

`compare` measures a comparison, `layer` one large layer, each in this process and on Ray with one and with two workers
of one core. Workers are warm: what starting Ray and its processes takes is told apart. `model` estimates what cannot be
measured here, from stated assumptions.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantlab.api import CodebookSpec
from quantlab.compare import common_recipe, parse_variants, plan_cells, run_cells
from quantlab.engine.moments import Moments
from quantlab.engine.solve import LayerSolver, SolveOptions
from quantlab.engine.statistics import GroupStatistics
from quantlab.executors import Executor, ExecutorOptions, LocalExecutor, open_executor
from quantlab.progress import NoProgress
from quantlab.registry import configure

WORKERS = (1, 2)
METHODS = ["gptq", "quantease", "kmeans", "lnq", "leanquant", "ganq@paper"]
NUM_TOKENS = 1 << 16


def warm() -> int:
    """A unit that takes what a process needs to begin."""
    import quantlab.pipeline  # noqa: F401

    time.sleep(1)  # so that no process gets two
    return os.getpid()


@contextmanager
def ray_workers(count: int) -> Iterator[tuple[Executor, float]]:
    """Ray on this machine with so many workers of one core, and the seconds until they were ready."""
    from ray.cluster_utils import Cluster

    began = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": count, "include_dashboard": False})
    try:
        with open_executor(ExecutorOptions(name="ray", address=cluster.address, cpus_per_task=1)) as executor:
            while len(set(executor.map(warm, [()] * count))) < count:
                pass
            yield executor, time.monotonic() - began
    finally:
        cluster.shutdown()


def measure(work: Callable[[Executor], object]) -> list[dict[str, float | str]]:
    """Seconds of the same work in this process and on workers; every result must be the same."""
    began = time.monotonic()
    expected = work(LocalExecutor())
    rows: list[dict[str, float | str]] = [{"where": "this process", "seconds": time.monotonic() - began, "start": 0.0}]
    for count in WORKERS:
        with ray_workers(count) as (executor, start_s):
            began = time.monotonic()
            result = work(executor)
            seconds = time.monotonic() - began
        if result != expected:
            raise AssertionError(f"{count} workers give another result")
        rows.append({"where": f"Ray, workers: {count}", "seconds": seconds, "start": start_s})
    return rows


def comparison(executor: Executor) -> object:
    """Twelve runs on the demo model; returns what was measured of each."""
    with tempfile.TemporaryDirectory() as folder:
        common = common_recipe(
            model="demo",
            dtype="float32",
            calibration="stdlib",
            num_samples=32,
            sequence_length=256,
            group_size=None,
            texts=("stdlib",),
            num_windows=16,
        )
        overrides = ["engine.deterministic=true"]
        cells = plan_cells(parse_variants(METHODS, []), [4, 3], 1, common, overrides, Path(folder))
        run_cells(cells, "tests/bench/scaling.py", NoProgress(), lambda: False, lambda *_: None, executor)
        return [json.loads((cell.folder / "eval.json").read_text())["perplexity"] for cell in cells]


def layer(rows: int, columns: int, rows_per_unit: int) -> Callable[[Executor], object]:
    """A layer to be solved by GANQ in pieces; returns its codes and losses."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    linear = torch.nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator))
    moments = Moments(hessian=inputs.T @ inputs / len(inputs))
    statistics = GroupStatistics(moments={"layer": (moments,)}, num_tokens=NUM_TOKENS)
    method = configure("ganq", preset="paper", options={"iterations": 4})
    options = SolveOptions(quantizer=method, spec=CodebookSpec(bits=4))

    @torch.no_grad()
    def solve(executor: Executor) -> object:
        solver = LayerSolver({"layer": linear}, statistics, {"layer": options}, rows_per_unit, executor)
        module, result = solver.finish()["layer"]
        return module.dequantize().sum().item(), result

    return solve


def show(title: str, rows: Sequence[dict[str, float | str]]) -> None:
    """Print a table."""
    table = Table("where", "seconds", "of this process", "of one worker", "to start", title=title)
    here, one = (float(rows[position]["seconds"]) for position in (0, 1))
    for row in rows:
        seconds = float(row["seconds"])
        table.add_row(
            str(row["where"]), f"{seconds:.1f}", f"{here / seconds:.2f}", f"{one / seconds:.2f}", f"{row['start']:.1f}"
        )
    Console(width=120).print(table)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the estimates rest on; only the rate of the object store was measured, the others are to be replaced.

    Attributes:
        sweep_overhead: of a run on a worker over one in the process that it was measured in.
        start_s: until a worker is ready.
        store_bytes_per_s: to put a tensor into the object store and take it out again, per process.
        forward_flops: of one worker's forward, on the cores beside each GPU; the engine computes it there.
        solve_flops: of one GPU's float32 products in the solvers.
        factor_flops: of one GPU's float64 factorisation.
        products_per_layer: cost of a method in products of a layer's size; GANQ's paper preset takes about 18.
        passes: forwards of a block per calibration token: four captures that end early, and one propagation.
    """

    sweep_overhead: float = 0.05
    start_s: float = 30.0
    store_bytes_per_s: float = 0.4e9
    forward_flops: float = 1e12
    solve_flops: float = 10e12
    factor_flops: float = 10e12
    products_per_layer: float = 18.0
    passes: float = 2.2


def sweep_s(cells: int, nodes: int, cell_s: float, given: Assumptions) -> float:
    """Runs of equal length, one at a time per node: the last round may leave nodes idle."""
    return given.start_s + math.ceil(cells / nodes) * cell_s * (1 + given.sweep_overhead)


def large_model_s(gpus: int, given: Assumptions, tokens: int = 128 * 2048) -> dict[str, float]:
    """Seconds by part for the 80 blocks of a 70B Llama, every shard and every piece of rows on a GPU of its own."""
    hidden, inner, key_value, blocks = 8192, 28672, 1024, 80
    groups = {  # in_features: rows of the layers that share the input, one entry per group
        "attention": (hidden, hidden + 2 * key_value),
        "output": (hidden, hidden),
        "gate and up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    weights = sum(columns * rows for columns, rows in groups.values())
    squares = [columns**2 for columns, _ in groups.values()]
    parts = {
        "forward": given.passes * 2 * weights * tokens / given.forward_flops / gpus,
        "moments": sum(squares) * tokens / given.forward_flops / gpus,
        # Partial sums come to the driver one after the other; Hessian and factor go to every GPU at the same time.
        "partial sums": gpus * 4 * sum(squares) / given.store_bytes_per_s,
        "factor": sum(columns**3 for columns, _ in groups.values()) / 3 / given.factor_flops,
        "ship factor": 2 * 4 * sum(squares) / given.store_bytes_per_s,
        "solve": given.products_per_layer
        * sum(2 * rows * columns**2 for columns, rows in groups.values())
        / given.solve_flops
        / gpus,
    }
    return {name: blocks * seconds for name, seconds in parts.items()}


def show_model() -> None:
    """Print both estimates."""
    given = Assumptions()
    print(given)
    cell_s = 3600.0
    for nodes in (1, 16):
        print(f"100 runs of {cell_s:.0f} s on {nodes} nodes: {sweep_s(100, nodes, cell_s, given) / 3600:.1f} h")
    for gpus in (1, 8):
        parts = large_model_s(gpus, given)
        shares = ", ".join(f"{name} {seconds / 3600:.2f}" for name, seconds in parts.items())
        print(f"70B on {gpus} GPUs: {sum(parts.values()) / 3600:.1f} h ({shares})")


def main() -> None:
    """Measure or estimate what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["compare", "layer", "model"])
    parser.add_argument("--shape", default="4096x2048", help="of the layer: out_features x in_features")
    parser.add_argument("--rows-per-unit", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "compare" in arguments.what:
        show("12 runs on the demo model", measure(comparison))
    if "layer" in arguments.what:
        rows, columns = map(int, arguments.shape.split("x"))
        title = f"{arguments.shape}, GANQ paper preset, 4 iterations, {arguments.rows_per_unit} rows per unit"
        show(title, measure(layer(rows, columns, arguments.rows_per_unit)))
    if "model" in arguments.what:
        show_model()


if __name__ == "__main__":
    main()
