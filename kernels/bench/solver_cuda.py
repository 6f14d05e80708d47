"""Measure the CUDA stages of the solvers against PyTorch's loops. Not yet run: no device has been at hand.

    python kernels/bench/solver_cuda.py run solver.json      measure on the current device
    python kernels/bench/solver_cuda.py table solver.json    print what was measured

A stage runs as the methods call it, by the kernels and by the same stage in PyTorch, in one process. PyTorch takes
thousands of launches for most of them, so it is measured once, and only on the smallest layer unless --pytorch asks for
more. The unit of comparison between devices is one float32 product of the layer's size, weight times Hessian, by
cuBLAS. Times are medians, of everything that a stage puts on the device and of the waits of the host in between.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_device import describe_device, headline, milliseconds, require
from torch import Tensor

from quantlab.api import CodebookSpec, Lut
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.codebook import CodebookFit
from quantlab.solvers.descent import descend
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import GridRounder, LutRounder
from quantlab.solvers.sweep import factor_for_sweep, sweep
from quantlab_kernels.solver_cuda_library import LIBRARY, SOURCE_FOLDER

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336))
BITS = (4, 3, 2)
GROUP = 128
ITERATIONS = 30  # of k-means
REPETITIONS = 5
# The loss may differ from PyTorch's by the codes that rounding decides.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """One stage on one layer."""

    out_features: int
    in_features: int
    bits: int
    stage: str
    ms: float
    product_ms: float  # of one float32 product of the layer's size
    pytorch_ms: float | None


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("file", type=Path, help="the record")
    parser.add_argument("--pytorch", choices=("smallest", "all", "none"), default="smallest", help="layers to compare")
    arguments = parser.parse_args()
    if arguments.command == "run":
        require(LIBRARY)
        record = measure(SHAPES, arguments.pytorch)
        arguments.file.write_text(json.dumps(record, indent=1) + "\n")
    print(render(json.loads(arguments.file.read_text())))


def measure(shapes: tuple[tuple[int, int], ...], pytorch: str) -> dict[str, Any]:
    """The record of a complete run on the current device."""
    rows: list[Row] = []
    for index, shape in enumerate(shapes):
        compared = pytorch == "all" or (pytorch == "smallest" and index == 0)
        weight, hessian = layer(*shape, device="cuda")
        product_ms = milliseconds(lambda weight=weight, hessian=hessian: weight @ hessian, REPETITIONS)
        for bits in BITS:
            for stage, call in stages(weight, hessian, bits).items():
                ms = milliseconds(call, REPETITIONS)
                rows.append(Row(*shape, bits, stage, ms, product_ms, pytorch_ms(call) if compared else None))
    return {"device": describe_device(LIBRARY, SOURCE_FOLDER), "rows": [asdict(row) for row in rows]}


def layer(out_features: int, in_features: int, *, device: str) -> tuple[Tensor, Tensor]:
    """A random weight and the Hessian of correlated inputs of unequal strength, in float32."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    strength = normal(in_features).mul(0.7).exp()
    directions = normal(max(1, in_features // 16), in_features) / in_features**0.5
    hessian = strength[:, None] * (torch.eye(in_features, device=device) + directions.T @ directions) * strength
    return 0.02 * normal(out_features, in_features), hessian


def stages(weight: Tensor, hessian: Tensor, bits: int) -> dict[str, Callable[[], Tensor]]:
    """Every stage as a function; it returns what says how well it did: a loss of every row, or sums."""
    inputs, levels = len(hessian), 1 << bits
    order = hessian.diagonal().argsort(descending=True)
    factor = factor_for_sweep(hessian, order, 0.01, torch.float32)
    table = kmeans_levels(weight, levels, 3)
    nearest = LutRounder(Lut(values=table[:, None]), inputs)
    grouped = inputs % GROUP == 0
    spec = CodebookSpec(bits=bits, group_size=GROUP if grouped else None)
    on_grid = GridRounder(minmax_grid(weight, spec), inputs)
    start = sweep(weight, factor, nearest)

    def descend_over_blocks() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return loss_of(descend_in_blocks(weight, start, table, hessian, order, passes=1, generator=generator))

    return {
        "sweep, tables": lambda: loss_of(sweep(weight, factor, nearest)),
        f"sweep, grids of {GROUP}": lambda: loss_of(sweep(weight, factor, on_grid)),
        "coordinate descent, one pass": lambda: loss_of(descend(weight, start, hessian, order, nearest, sweeps=1)),
        "block descent, one pass": descend_over_blocks,
        "codebook step, with weight times Hessian": lambda: CodebookFit(weight, hessian).refit(table, start)[1],
        "k-means": lambda: kmeans_levels(weight, levels, ITERATIONS),
    }


def loss_of(assignment: Any) -> Tensor:
    """The losses that a stage reports: (out_features,)."""
    return assignment.loss


def pytorch_ms(call: Callable[[], Tensor]) -> float:
    """The time of the same stage in PyTorch, whose result must be as good.

    Raises:
        RuntimeError: the results differ by more than rounding explains.
    """
    native = call().double().sum().item()
    with without_kernels():
        expected = call().double().sum().item()
        ms = milliseconds(call, 1)
    if not abs(native - expected) <= TOLERANCE * abs(expected):
        raise RuntimeError(f"the kernels come to {native:g}, PyTorch to {expected:g}")
    return ms


@contextmanager
def without_kernels():
    """Solvers take their loops in PyTorch."""
    library = LIBRARY.get
    LIBRARY.get = lambda: None
    try:
        yield
    finally:
        LIBRARY.get = library


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [Row(**row) for row in record["rows"]]
    lines = [
        headline(record["device"]),
        "",
        "Cells: ms, float32 products of the layer's size that take as long, times as fast as PyTorch where measured.",
    ]
    for shape in dict.fromkeys((row.out_features, row.in_features) for row in rows):
        of_shape = [row for row in rows if (row.out_features, row.in_features) == shape]
        bits = list(dict.fromkeys(row.bits for row in of_shape))
        lines += ["", f"### {shape[0]} x {shape[1]}, one product {of_shape[0].product_ms:.2f} ms", ""]
        lines += ["| stage | " + " | ".join(f"{count} bits" for count in bits) + " |", "|---" * (len(bits) + 1) + "|"]
        for stage in dict.fromkeys(row.stage for row in of_shape):
            cells = {row.bits: _cell(row) for row in of_shape if row.stage == stage}
            lines.append(f"| {stage} | " + " | ".join(cells.get(count, "") for count in bits) + " |")
    return "\n".join([*lines, ""])


def _cell(row: Row) -> str:
    cell = f"{row.ms:.2f}, {row.ms / row.product_ms:.1f}"
    return cell if row.pytorch_ms is None else f"{cell}, {row.pytorch_ms / row.ms:.0f}x"


if __name__ == "__main__":
    main()
