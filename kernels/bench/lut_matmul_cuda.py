"""Measure the CUDA kernels against float16 cuBLAS and the speed of the memory. Not yet run: no device has been at hand.

    python kernels/bench/lut_matmul_cuda.py run cuda.json      measure on the current device
    python kernels/bench/lut_matmul_cuda.py table cuda.json    print what was measured

Weights are cold: a captured graph calls every one of several copies once, which together are far larger than the
L2 cache, so launches cost nothing and nothing is found in a cache. cuBLAS, the kernels and a copy of memory are timed
in one process. A time is the median over replays, per call; the spread is from the 10th to the 90th percentile.

Kernels of other projects (Any-Precision, SqueezeLLM, FLUTE) are measured where they are installed. Some of them work on
the default stream and cannot be captured, so they and a row of ours beside them are timed call by call.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cuda_peers
import torch
from cuda_device import describe_device, headline, require
from torch import Tensor

from quantlab_kernels import cuda, cuda_common, cuda_library
from quantlab_kernels.cuda_layout import TILE_COLUMNS, TILE_ROWS, byte_planes, pad_rows
from quantlab_kernels.cuda_library import Codebook

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
BITS = (4, 3, 2)
GROUP = 128
OUTLIERS = 0.0045  # share of the weights
WARPS = (4, 8, 16)  # tried at one token, beside the choice of the library
COLD_CACHES = 4  # the copies of a weight fill the L2 cache this many times
REPLAYS = 50
# Speed over cuBLAS on an H200 at one token, for 11008 x 4096 and larger.
TARGETS = {4: 2.3, 3: 3.3}
TARGET_WEIGHTS = 11008 * 4096


@dataclass(frozen=True)
class Row:
    """One measured variant."""

    out_features: int
    in_features: int
    tokens: int
    variant: str  # "cublas", or bits and codebook
    bits: int | None
    warps: int | None  # None: the choice of the library
    nbytes: int  # of one weight
    us: float
    us_low: float
    us_high: float


@dataclass(frozen=True)
class Prepared:
    """A random weight as the kernels read it."""

    codes: Tensor
    tables: Tensor
    layout: list[int]
    outliers: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.codes, self.tables, *self.outliers))


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("file", type=Path, help="the record")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    if arguments.command == "run":
        require(cuda_library.LIBRARY)
        dtype = getattr(torch, arguments.dtype)
        record = measure(dtype)
        arguments.file.write_text(json.dumps(record, indent=1) + "\n")
        # Kernels of others last, and our record first: a wrong access of theirs would end the process.
        add_peers(record, dtype)
        arguments.file.write_text(json.dumps(record, indent=1) + "\n")
    print(render(json.loads(arguments.file.read_text())))


def measure(dtype: torch.dtype) -> dict[str, Any]:
    """The record of a complete run on the current device."""
    rows: list[Row] = []
    for out_features, in_features in SHAPES:
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda").to(dtype)
            rows.append(measure_cublas(x, out_features))
            for bits in BITS:
                for codebook in ("row", f"uniform {GROUP}", "row, outliers"):
                    rows.append(measure_kernel(x, out_features, bits, codebook))
                for warps in WARPS if tokens == 1 else ():
                    rows.append(measure_kernel(x, out_features, bits, "row", warps))
    return {
        "device": describe_device(cuda_library.LIBRARY, cuda_library.SOURCE_FOLDER),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_per_s": copy_speed(),
        "refusals": [],
        "rows": [asdict(row) for row in rows],
    }


def add_peers(record: dict[str, Any], dtype: torch.dtype) -> None:
    """Add what other projects take to a record."""
    for out_features, in_features in SHAPES if any(cuda_peers.installed()) else ():
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda").to(dtype)
            for bits in BITS:
                rows = measure_peers(x, out_features, bits, record["refusals"])
                record["rows"] += [asdict(row) for row in rows]


def copy_speed() -> float:
    """GB read and written per second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us, *_ = time_calls([lambda: target.copy_(source)])
    return 2 * source.nbytes / us / 1e3


def measure_cublas(x: Tensor, out_features: int) -> Row:
    """The dense product in the type of x."""
    in_features = x.shape[1]
    nbytes = out_features * in_features * x.element_size()
    weights = [torch.randn(out_features, in_features, device="cuda").to(x.dtype) for _ in range(copies(nbytes))]
    calls = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
    return Row(out_features, in_features, len(x), "cublas", None, None, nbytes, *time_calls(calls))


def measure_kernel(
    x: Tensor, out_features: int, bits: int, codebook: str, warps: int | None = None, *, captured: bool = True
) -> Row:
    """The product by the kernels, checked once against the dense one."""
    first = random_weight(x, out_features, bits, codebook)
    check(x, first)
    others = [random_weight(x, out_features, bits, codebook) for _ in range(copies(first.nbytes) - 1)]
    calls = [lambda weight=weight: multiply(x, weight, warps) for weight in (first, *others)]
    variant = f"{bits} bits, {codebook}" if captured else f"{bits} bits, {codebook}, call by call"
    times = time_calls(calls, captured=captured)
    return Row(out_features, x.shape[1], len(x), variant, bits, warps, first.nbytes, *times)


def measure_peers(x: Tensor, out_features: int, bits: int, refusals: list[str]) -> list[Row]:
    """Every other project that takes these operands, and ours timed alike; what one refuses goes to `refusals`."""
    rows: list[Row] = []
    for peer in cuda_peers.installed():
        if bits not in peer.bits or len(x) > peer.most_tokens or x.dtype not in peer.dtypes:
            continue
        variant = f"{bits} bits, {peer.name}, call by call"
        try:
            call, nbytes = peer.prepare(x, out_features, bits)
            others = [peer.prepare(x, out_features, bits)[0] for _ in range(copies(nbytes) - 1)]
            times = time_calls([call, *others], captured=False)
        except Exception as error:  # not our code: anything may be wrong with it, and our rows still matter
            refusals.append(f"{variant}, {out_features} x {x.shape[1]}, {len(x)} tokens: {error}")
        else:
            rows.append(Row(out_features, x.shape[1], len(x), variant, bits, None, nbytes, *times))
    if rows:
        rows.append(measure_kernel(x, out_features, bits, "row", captured=False))
    return rows


def random_weight(x: Tensor, out_features: int, bits: int, codebook: str) -> Prepared:
    """Any words are valid codes, so nothing needs packing."""
    in_features = x.shape[1]
    row_blocks, tiles = -(-out_features // TILE_ROWS), -(-in_features // TILE_COLUMNS)
    codes = torch.randint(-(2**31), 2**31, (row_blocks, tiles, 32 * bits), device="cuda", dtype=torch.int32)
    if codebook.startswith("uniform"):
        groups, kind = in_features // GROUP, Codebook.UNIFORM
        grid = torch.rand(out_features, groups, 2, device="cuda") * torch.tensor([0.02, 2.0**bits], device="cuda")
        tables = pad_rows(grid.half())
    else:
        groups, kind = 1, Codebook.PER_ROW
        tables = byte_planes((0.02 * torch.randn(out_features, 1, 1 << bits, device="cuda")).to(x.dtype))
    outliers: tuple[Tensor, ...] = ()
    if codebook.endswith("outliers"):
        per_row = round(OUTLIERS * in_features)
        offsets = torch.arange(0, per_row * out_features + 1, per_row, device="cuda", dtype=torch.int32)
        columns = torch.randint(0, in_features, (per_row * out_features,), device="cuda", dtype=torch.int32)
        outliers = (offsets, columns, torch.randn(len(columns), device="cuda").half())
    return Prepared(codes, tables, [out_features, in_features, bits, groups, int(kind)], outliers)


def multiply(x: Tensor, weight: Prepared, warps: int | None = None) -> Tensor:
    """By the way that models take, or with a given number of warps."""
    if warps is None:
        return cuda.lut_matmul_prepared(x, weight.codes, weight.tables, None, weight.layout, None, *weight.outliers)
    y = x.new_empty(len(x), weight.layout[0])
    described, stream = describe(x, weight), cuda_common.current_stream(x.device)
    cuda_library.multiply(cuda_library.LIBRARY.get(), described, x, None, y, warps=warps, stream=stream)
    return y


def check(x: Tensor, weight: Prepared) -> None:
    """Compare with the product of the dequantized weight.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    out_features, in_features, *_ = weight.layout
    dense = x.new_empty(out_features, in_features)
    described, stream = describe(x, weight), cuda_common.current_stream(x.device)
    cuda_library.dequantize_rows(
        cuda_library.LIBRARY.get(), described, dense, first_row=0, rows=out_features, stream=stream
    )
    expected = torch.nn.functional.linear(x.float(), dense.float())
    error = ((multiply(x, weight).float() - expected).norm() / expected.norm()).item()
    if not error < 0.01:
        raise RuntimeError(f"{weight.layout} at {len(x)} tokens is {error:.2%} away from the dequantized weight")


def describe(x: Tensor, weight: Prepared) -> cuda_library.Weight:
    """The weight as the library wants it."""
    out_features, in_features, bits, groups, kind = weight.layout
    offsets, columns, values = weight.outliers or (None, None, None)
    outliers = None if offsets is None or columns is None or values is None else (offsets, columns, values)
    return cuda_library.describe_weight(
        weight.codes,
        weight.tables,
        outliers,
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        groups=groups,
        codebook=Codebook(kind),
        dtype=x.dtype,
    )


def copies(nbytes: int) -> int:
    """How many weights are cold when their turn comes again."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-COLD_CACHES * cache // nbytes))


def time_calls(calls: list[Callable[[], object]], *, captured: bool = True) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the time of one call, in µs, over replays of a graph of all calls."""

    def call_all() -> None:
        for call in calls:
            call()

    call_all()
    torch.cuda.synchronize()
    replay = call_all
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call_all()
        replay = graph.replay
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    quantiles = torch.quantile(torch.tensor(times), torch.tensor([0.5, 0.1, 0.9])).tolist()
    return quantiles[0], quantiles[1], quantiles[2]


def render(record: dict[str, Any]) -> str:
    """The record as Markdown: every variant by tokens, then the warps that were tried, then the targets."""
    lines = [
        f"{headline(record['device'])}, {record['dtype']}, copy {record['copy_gb_per_s']:.0f} GB/s",
        "",
        "Cells: µs, times as fast as cuBLAS, share of the speed of the copy that reading the weight once comes to.",
    ]
    rows = [Row(**row) for row in record["rows"]]
    for shape in dict.fromkeys((row.out_features, row.in_features) for row in rows):
        of_shape = [row for row in rows if (row.out_features, row.in_features) == shape]
        lines += ["", f"### {shape[0]} x {shape[1]}", "", *_shape_table(of_shape, record["copy_gb_per_s"])]
    lines += ["", "### Targets at one token", "", *_targets(rows)]
    if record["refusals"]:
        lines += ["", "### Refused by other projects", "", *(f"- {refusal}" for refusal in record["refusals"])]
    return "\n".join([*lines, ""])


def _shape_table(rows: list[Row], copy_gb_per_s: float) -> list[str]:
    tokens = list(dict.fromkeys(row.tokens for row in rows))
    dense = {row.tokens: row.us for row in rows if row.variant == "cublas"}
    variants = dict.fromkeys((row.variant, row.warps) for row in rows)
    lines = ["| variant | " + " | ".join(f"m={count}" for count in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
    for variant, warps in variants:
        cells = {
            row.tokens: f"{row.us:.1f}, {dense[row.tokens] / row.us:.2f}x, "
            f"{row.nbytes / row.us / 1e3 / copy_gb_per_s:.0%}"
            for row in rows
            if (row.variant, row.warps) == (variant, warps)
        }
        name = variant if warps is None else f"{variant}, {warps} warps"
        lines.append(f"| {name} | " + " | ".join(cells.get(count, "") for count in tokens) + " |")
    return lines


def _targets(rows: list[Row]) -> list[str]:
    lines = []
    single = [row for row in rows if row.tokens == 1 and row.out_features * row.in_features >= TARGET_WEIGHTS]
    dense = {(row.out_features, row.in_features): row.us for row in single if row.variant == "cublas"}
    for row in single:
        if row.variant == f"{row.bits} bits, row" and row.warps is None and row.bits in TARGETS:
            shape = (row.out_features, row.in_features)
            speed, target = dense[shape] / row.us, TARGETS[row.bits]
            word = "met" if speed >= target else "missed"
            lines.append(f"- {shape[0]} x {shape[1]}, {row.bits} bits: {speed:.2f}x cuBLAS, target {target}x: {word}")
    return lines or ["- no shape of the targets was measured"]


if __name__ == "__main__":
    main()
