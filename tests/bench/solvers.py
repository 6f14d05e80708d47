"""Time, memory and objective of the solvers on synthetic layers, in one run: `python tests/bench/solvers.py`.

For every layer three kinds of rows: the stages that methods are made of, one float32 product of the layer's size as the
unit of time, and whole methods beside the textbook implementation of GANQ (`tests/oracles/textbook_ganq.py`). GANQ and
the textbook are compared with the same Hessian, first tables and number of iterations, which is small for large layers.
For these, a second ratio compares GANQ's ten iterations with as many of the textbook, whose further iterations take the
time of its first ones: it is marked as extrapolated. The last table holds the targets. Wide layers take long: a quarter
of an hour and more for 4096x11008.
"""

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, Lut, layer_loss
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.codebook import CodebookFit
from quantlab.solvers.descent import descend
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.order import processing_order
from quantlab.solvers.sweep import Assignment, factor_for_sweep, sweep
from quantlab_ganq import GanqQuantizer
from quantlab_gptq import GptqQuantizer
from quantlab_kernels.native import status
from quantlab_quantease import QuanteaseQuantizer

sys.path.append(str(Path(__file__).parents[1] / "oracles"))
from textbook_ganq import textbook_ganq

METHODS = ["textbook", "paper", "best", "gptq", "quantease"]
SHAPES = ["1024x1024", "2048x2048", "4096x4096", "4096x11008"]
DAMPING = 0.01
PAPER = GanqQuantizer.info.presets["paper"]
KMEANS_ITERATIONS, KMEANS_CELLS = 50, 256
MOST_FACTORS = 1024
REPEATED = 1 << 22  # weights up to which time is measured in runs of its own
MMAP_THRESHOLD, SMALL_BUFFER, LARGE_BUFFER = -3, 1 << 17, 1 << 25  # M_MMAP_THRESHOLD of malloc.h, and bytes
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; memory is what the peak was above the level before, loss None for what has none.

    `fixed_seconds` is the part of the textbook's time that does not grow with its iterations.
    """

    shape: str
    bits: int
    what: str
    iterations: int | None
    seconds: float
    products: float
    peak_bytes: int | None
    loss: float | None
    fixed_seconds: float | None = None


def synthetic_layer(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and the Hessian of inputs with few strong factors and unequal strengths."""
    generator = torch.Generator().manual_seed(0)
    factors = min(in_features, MOST_FACTORS)
    spectrum = torch.arange(1, factors + 1).rsqrt()
    mixing = torch.randn(in_features, factors, generator=generator) * spectrum
    strength = (0.5 * torch.randn(in_features, generator=generator)).exp()
    strength[torch.randperm(in_features, generator=generator)[:4]] *= 10
    hessian = mixing @ mixing.T / spectrum.square().sum()
    hessian.diagonal().add_(0.1)
    hessian *= strength[:, None] * strength
    spread = torch.randn(5, out_features, in_features, generator=generator).square_().mean(dim=0).sqrt_()
    return torch.randn(out_features, in_features, generator=generator) / spread, hessian


class Bench:
    """Measures one layer at one code width.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features).
        bits: code width.
        repeat: every stage is run so many times, and the fastest run counts.
        warm: everything is run once before, so that memory that the process keeps does not count as its peak.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, bits: int, repeat: int, *, warm: bool) -> None:
        self.weight, self.hessian, self.bits, self.repeat, self.warm = weight, hessian, bits, repeat, warm
        self.problem = LayerProblem(
            name="layer",
            weight=weight,
            spec=CodebookSpec(bits=bits),
            statistics=InputStatistics(hessian=hessian, num_tokens=64 * len(hessian)),
        )
        self.product_s = min(timed(lambda: weight @ hessian)[1] for _ in range(max(3, repeat)))

    def row(
        self, what: str, run: Callable[[], Tensor | None], *, iterations: int | None = None, repeat: int = 1
    ) -> Row:
        """Run something that returns a dequantized weight, or None."""
        if self.warm:
            run()
        runs = [timed(run) for _ in range(repeat)]
        found, peak = runs[0][0], runs[0][2]
        seconds = min(seconds for _, seconds, _ in runs)
        loss = None if found is None else layer_loss(self.weight, found, self.hessian).sum().item()
        return Row(
            shape="x".join(map(str, self.weight.shape)),
            bits=self.bits,
            what=what,
            iterations=iterations,
            seconds=seconds,
            products=seconds / self.product_s,
            peak_bytes=peak,
            loss=loss,
        )

    def stages(self) -> Iterator[Row]:
        """The parts of a GANQ run, each by itself."""
        weight, hessian, repeat = self.weight, self.hessian, self.repeat
        yield self.row("one float32 product", lambda: discard(weight @ hessian), repeat=repeat)
        yield self.row("first tables", lambda: discard(self.first_tables()), repeat=repeat)
        tables = self.first_tables()
        order = processing_order(hessian, "natural", backwards=True)
        yield self.row("factorisation", lambda: discard(factor_for_sweep(hessian, order, DAMPING, torch.float32)))
        factor = factor_for_sweep(hessian, order, DAMPING, torch.float32)
        rounder = LutRounder(Lut(values=tables[:, None]), weight.shape[1])
        start = sweep(weight, factor, rounder)
        yield self.row("sweep", lambda: discard(sweep(weight, factor, rounder)), repeat=repeat)
        yield self.row("weight times Hessian", lambda: discard(CodebookFit(weight, hessian)), repeat=repeat)
        fit = CodebookFit(weight, hessian)
        yield self.row("codebook step", lambda: discard(fit.refit(tables, start)), repeat=repeat)
        operands = (weight, start, hessian, order, rounder)
        yield self.row("descent, one pass", lambda: discard(descend(*operands, sweeps=1)), repeat=repeat)
        yield self.row("block descent, one pass", lambda: discard(self.block_pass(start, tables, order)), repeat=repeat)

        def iterate() -> None:
            fit.refit(tables, sweep(weight, factor, rounder))

        yield self.row("one iteration of GANQ", iterate, repeat=repeat)

    def methods(self, chosen: Sequence[str], textbook_iterations: int) -> Iterator[Row]:
        """Whole methods; the textbook and GANQ with as few iterations first."""

        def textbook() -> Tensor:
            return textbook_ganq(self.weight, self.hessian, self.first_tables(), textbook_iterations, DAMPING)[0]

        same = GanqQuantizer(**{**PAPER, "iterations": textbook_iterations})
        paper, best, quantease = GanqQuantizer(**PAPER), GanqQuantizer(), QuanteaseQuantizer()
        repeat = self.repeat if self.weight.numel() <= REPEATED else 1
        if "textbook" in chosen:
            fixed = timed(self.first_tables)[1] + timed(lambda: torch.linalg.cholesky(self.damped()))[1]
            yield replace(self.row("textbook GANQ", textbook, iterations=textbook_iterations), fixed_seconds=fixed)
            yield self.row("ganq, paper", self.solved_by(same), iterations=textbook_iterations, repeat=repeat)
        if "paper" in chosen and not ("textbook" in chosen and paper == same):
            yield self.row("ganq, paper", self.solved_by(paper), iterations=paper.iterations, repeat=repeat)
        if "best" in chosen:
            yield self.row("ganq, best", self.solved_by(best), iterations=best.iterations, repeat=repeat)
        if "gptq" in chosen:
            yield self.row("gptq", self.solved_by(GptqQuantizer()), repeat=repeat)
        if "quantease" in chosen:
            yield self.row("quantease", self.solved_by(quantease), iterations=quantease.iterations, repeat=repeat)

    def first_tables(self) -> Tensor:
        """The tables that the paper preset starts with: (out_features, levels)."""
        return kmeans_levels(self.weight, 1 << self.bits, KMEANS_ITERATIONS, cells=KMEANS_CELLS)

    def damped(self) -> Tensor:
        """What the textbook factors."""
        return self.hessian.double() + DAMPING * self.hessian.diagonal().double().mean() * torch.eye(len(self.hessian))

    def block_pass(self, start: Assignment, tables: Tensor, order: Tensor) -> Assignment:
        """One pass of block descent."""
        generator = torch.Generator().manual_seed(0)
        return descend_in_blocks(self.weight, start, tables, self.hessian, order, passes=1, generator=generator)

    def solved_by(self, method: GanqQuantizer | GptqQuantizer | QuanteaseQuantizer) -> Callable[[], Tensor]:
        """What runs a method on the layer and dequantizes its answer."""
        return lambda: method.quantize(self.problem).dequantize()


def discard(_: object) -> None:
    """For stages whose result has no loss to report."""


def timed(run: Callable[[], Tensor | None]) -> tuple[Tensor | None, float, int | None]:
    """The result, the seconds, and how far the memory of this process rose above its level before (Linux).

    With one thread, the seconds are those that it had the processor.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    before = restart_peak()
    begin = clock()
    result = run()
    seconds = clock() - begin
    return result, seconds, None if before is None else memory("VmHWM") - before


def set_mmap_threshold(size: int) -> None:
    """Let the allocator give buffers of this size back as soon as they are freed (glibc).

    Small, and the peak is what is in use and not what the allocator keeps; large, and programs are faster. Once freed
    buffers have been kept, later ones come from them whatever the threshold is: so memory has to be measured first.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(MMAP_THRESHOLD, size)


def restart_peak() -> int | None:
    """Let the recorded peak of memory begin at the present level; None where the system cannot."""
    # Freed memory that the allocator still holds would hide what is allocated next.
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory("VmRSS")


def memory(field: str) -> int:
    """A memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def few_iterations(in_features: int) -> int:
    """How many iterations the textbook gets: as many as take a minute or so."""
    return next(count for limit, count in ((1024, 10), (2048, 5), (4096, 2), (sys.maxsize, 1)) if in_features <= limit)


def render(rows: list[Row], title: str) -> Table:
    """The rows of one layer and code width."""
    table = Table(title=title)
    for column in ("", "iterations", "seconds", "products", "x textbook", "peak / weight", "loss", "/ textbook"):
        table.add_column(column, justify="left" if not column else "right")
    textbook = find(rows, "textbook GANQ")
    for row in rows:
        ratio = speedup(rows, row)
        table.add_row(
            row.what,
            str(row.iterations or ""),
            f"{row.seconds:.3f}",
            f"{row.products:.2f}",
            ratio,
            "" if row.peak_bytes is None else f"{row.peak_bytes / weight_bytes(row):.2f}",
            "" if row.loss is None else f"{row.loss:.5g}",
            f"{row.loss / textbook.loss:.4f}" if textbook and textbook.loss and row.loss else "",
        )
    return table


def find(rows: list[Row], what: str, iterations: int | None = None) -> Row | None:
    """The row of a method, with so many iterations if they are given."""
    return next((row for row in rows if row.what == what and iterations in (None, row.iterations)), None)


def speedup(rows: list[Row], row: Row) -> str:
    """How many times faster than the textbook; in brackets if its time for so many iterations is extrapolated."""
    textbook = find(rows, "textbook GANQ")
    if textbook is None or row.what not in ("textbook GANQ", "ganq, paper"):
        return ""
    assert textbook.iterations
    assert row.iterations
    assert textbook.fixed_seconds is not None
    if row.iterations == textbook.iterations:
        return f"{textbook.seconds / row.seconds:.1f}"
    each = (textbook.seconds - textbook.fixed_seconds) / textbook.iterations
    return f"({(textbook.fixed_seconds + row.iterations * each) / row.seconds:.1f})"


def weight_count(shape: str) -> int:
    """How many weights a layer has."""
    return math.prod(map(int, shape.split("x")))


def weight_bytes(row: Row) -> int:
    """The size of the layer's float32 weight."""
    return 4 * weight_count(row.shape)


def targets(rows: list[Row]) -> list[str]:
    """The lines of a Markdown table: every layer and code width against the targets of SOLVERS.md."""
    lines = [
        "| layer | bits | paper, x textbook (at least 15) | loss / textbook (at most 1.0005) | products per iteration "
        "(at most 2) | peak, paper (at most 4) | peak, best (at most 4) | best / paper, time (at most 4) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, bits in dict.fromkeys((row.shape, row.bits) for row in rows):
        own = [row for row in rows if (row.shape, row.bits) == (shape, bits)]
        textbook, best = find(own, "textbook GANQ"), find(own, "ganq, best")
        iteration = find(own, "one iteration of GANQ")
        same = find(own, "ganq, paper", textbook.iterations) if textbook else None
        paper = find(own, "ganq, paper", GanqQuantizer(**PAPER).iterations)
        compared = dict.fromkeys(row for row in (same, paper) if row and textbook)
        ratios = [f"{speedup(own, row)}, {row.iterations} iterations" for row in compared]
        peaks = [f"{row.peak_bytes / weight_bytes(row):.1f}" if row and row.peak_bytes else "" for row in (paper, best)]
        cells = [
            "; ".join(ratios),
            f"{same.loss / textbook.loss:.4f}" if same and same.loss and textbook and textbook.loss else "",
            f"{iteration.products:.1f}" if iteration else "",
            *peaks,
            f"{best.seconds / paper.seconds:.1f}" if best and paper else "",
        ]
        lines.append("| " + " | ".join([shape, str(bits), *cells]) + " |")
    return lines


def measure(options: argparse.Namespace, shape: str, bits: int, *, repeat: int, warm: bool) -> list[Row]:
    """All rows of one layer and code width."""
    out_features, in_features = map(int, shape.split("x"))
    bench = Bench(*synthetic_layer(out_features, in_features), bits, repeat, warm=warm)
    rows = [] if options.no_stages else list(bench.stages())
    return rows + list(bench.methods(options.methods, options.textbook_iterations or few_iterations(in_features)))


def main() -> None:
    """Read the command line, measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out_features x in_features, such as 4096x11008")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--repeat", type=int, default=3, help="runs of a stage, of which the fastest counts")
    parser.add_argument("--textbook-iterations", type=int, help="default: 10 for small layers, fewer for large ones")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="whole methods; none for stages")
    parser.add_argument("--no-stages", action="store_true", help="whole methods only")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its own time, for busy machines")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    console, everything = Console(width=110), {}
    layers = [(shape, bits) for shape in options.shapes for bits in options.bits]
    small = [layer for layer in layers if weight_count(layer[0]) <= REPEATED]
    set_mmap_threshold(SMALL_BUFFER)
    for layer in layers:
        console.print(f"{layer[0]}, {layer[1]} bits: memory" + ("" if layer in small else " and time"))
        everything[layer] = measure(options, *layer, repeat=1, warm=layer in small)
        if layer not in small:
            console.print(render(everything[layer], title(*layer)))
    set_mmap_threshold(LARGE_BUFFER)
    for layer in small:
        console.print(f"{layer[0]}, {layer[1]} bits: time")
        times = measure(options, *layer, repeat=options.repeat, warm=False)
        everything[layer] = [
            replace(time, peak_bytes=row.peak_bytes) for row, time in zip(everything[layer], times, strict=True)
        ]
        console.print(render(everything[layer], title(*layer)))
    rows = [row for found in everything.values() for row in found]
    print(*targets(rows), sep="\n")
    environment = {"threads": torch.get_num_threads(), "torch": torch.__version__, "kernels": status()}
    console.print(environment)
    if options.json:
        options.json.write_text(json.dumps({**environment, "rows": [asdict(row) for row in rows]}, indent=1))


def title(shape: str, bits: int) -> str:
    """Of a table."""
    return f"{shape} (out x in), {bits} bits"


if __name__ == "__main__":
    main()
