"""Measure `quantlab::lut_matmul` on the CPU against its targets: `python kernels/bench/lut_matmul.py`.

Weights are cold: every call takes the next of several copies that together are far larger than the last cache. Code
is warm: a small multiplication of the same kind, not timed, comes before every call, as layers follow each other in a
model. All variants of a table run in turns, and the speed at which the machine reads memory is measured among them,
since on a shared machine only ratios within one run mean something. Times are the 10th percentile of all calls.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
from cpu_peers import peer_variants
from variants import COLD_BYTES, DTYPES, SMALL_ROWS, Variant, cold_copies

import quantlab_kernels
from quantlab_kernels.build import Recipe, build_library, cxx_command
from quantlab_kernels.isa import chosen_isa

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 96, 128, 256, 512)
CEILING = {"4-bit fp32": 0.65, "4-bit bf16": 0.80, "3-bit bf16": 0.70}  # one thread, share of the read speed
KERNELS = ("4-bit fp32", "4-bit bf16", "3-bit fp32", "3-bit bf16")  # with targets
OVER_TORCH = 8.0  # times torch float32
OVER_ONE_THREAD = 1.6  # with two


@dataclass(frozen=True)
class Row:
    """One measured variant; `gb_per_s` counts the bytes of its weights, `mac_per_ns` multiplications."""

    shape: str
    threads: int
    batch: int
    name: str
    ms: float
    gb_per_s: float
    mac_per_ns: float


def main() -> None:
    """Run, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peers", action="store_true", help="measure kernels of others, too; see cpu_peers.py")
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and number of threads")
    parser.add_argument("--sweep-seconds", type=float, default=1.5, help="per batch and number of threads; 0: no sweep")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    decode = [
        row
        for shape in SHAPES
        for row in measure(
            decode_variants(shape, peers=arguments.peers), shape, 1, arguments.threads, arguments.seconds
        )
    ]
    print_decode(decode)
    print_summary(decode)
    sweep: list[Row] = []
    for batch in BATCHES if arguments.sweep_seconds else ():
        sweep += measure(sweep_variants(SHAPES[0], batch), SHAPES[0], batch, arguments.threads, arguments.sweep_seconds)
    print_sweep(sweep)
    if arguments.json:
        record = {"machine": describe_machine(), "rows": [asdict(row) for row in decode + sweep]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def describe_machine() -> dict[str, str]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": str(os.cpu_count()), "torch": torch.__version__, **quantlab_kernels.status()}


def decode_variants(shape: tuple[int, int], *, peers: bool) -> list[Variant]:
    """One sample against every width, the dense layers of PyTorch, and kernels of others."""
    quantized = [quantized_variant(shape, bits, name, 1) for bits in (4, 3, 2) for name in DTYPES]
    dense = [dense_variant(shape, name, 1) for name in DTYPES]
    return [read_variant(), *quantized, *dense, *(peer_variants(shape) if peers else ())]


def sweep_variants(shape: tuple[int, int], batch: int) -> list[Variant]:
    """A batch against 4-bit weights and the dense layers of PyTorch."""
    return [
        make
        for name in DTYPES
        for make in (quantized_variant(shape, 4, name, batch), dense_variant(shape, name, batch))
    ]


def read_variant() -> Variant:
    """Reading memory and nothing else."""
    source = Path(__file__).with_name("stream.cpp")
    recipe = Recipe("stream", (source,), (), cxx_command(chosen_isa().flags))
    library = ctypes.CDLL(str(build_library(recipe)))
    library.quantlab_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    words = COLD_BYTES // 32
    buffers = [large_pages(words).fill_(1) for _ in range(4)]
    calls = [
        lambda buffer=buffer: library.quantlab_read(buffer.data_ptr(), words, torch.get_num_threads())
        for buffer in buffers
    ]
    few = torch.ones(4096, dtype=torch.int64)
    return Variant("memory read", words * 8, cycle(calls), lambda: library.quantlab_read(few.data_ptr(), 4096, 1))


def large_pages(words: int) -> torch.Tensor:
    """Memory that is read at full speed, as weights are stored: through large pages where the system has them."""
    memory = mmap.mmap(-1, 8 * words)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64)


def quantized_variant(shape: tuple[int, int], bits: int, dtype_name: str, batch: int) -> Variant:
    """Prepared weights with one codebook per row."""
    rows, columns = shape
    dtype = DTYPES[dtype_name]
    words = torch.randint(-(2**31), 2**31, (bits, rows, columns // 32), dtype=torch.int32)
    codebook = torch.randn(rows, 1, 2**bits).half()
    # Not clones of one: preparing a weight decides on the pages that it lies in.
    weights = [
        quantlab_kernels.prepare(words, codebook, None, columns, dtype) for _ in range(cold_copies(words.nbytes))
    ]
    small = quantlab_kernels.prepare(words[:, :SMALL_ROWS].contiguous(), codebook[:SMALL_ROWS], None, columns, dtype)
    x = torch.randn(batch, columns).to(dtype)
    multiply = torch.ops.quantlab.lut_matmul_prepared.default
    calls = [
        lambda weight=weight: multiply(x, weight.codes, weight.codebook, None, weight.layout)
        for weight in (small, *weights)
        if weight is not None
    ]
    if not calls:
        raise SystemExit(f"nothing to measure: {quantlab_kernels.status()}")
    return Variant(f"{bits}-bit {dtype_name}", words.nbytes + codebook.nbytes, cycle(calls[1:]), calls[0])


def dense_variant(shape: tuple[int, int], dtype_name: str, batch: int) -> Variant:
    """`torch.nn.functional.linear`."""
    weight = torch.randn(shape).to(DTYPES[dtype_name])
    x = torch.randn(batch, shape[1]).to(weight.dtype)
    weights = [weight[:SMALL_ROWS].clone(), *(weight.clone() for _ in range(cold_copies(weight.nbytes)))]
    calls = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
    return Variant(f"torch {dtype_name}", weight.nbytes, cycle(calls[1:]), calls[0])


def measure(
    variants: list[Variant], shape: tuple[int, int], batch: int, threads: list[int], seconds: float
) -> list[Row]:
    """Time all variants in turns."""
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        times: dict[str, list[float]] = {variant.name: [] for variant in variants}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[variants[0].name]) < 5:
            for variant in variants:
                call = next(variant.calls)
                variant.warm()
                start = time.perf_counter()
                call()
                times[variant.name].append((time.perf_counter() - start) / variant.products)
        for variant in variants:
            best = sorted(times[variant.name])[len(times[variant.name]) // 10]
            products = shape[0] * shape[1] * batch / best / 1e9
            speed = variant.nbytes / best / 1e9
            rows.append(Row(f"{shape[0]}x{shape[1]}", count, batch, variant.name, best * 1e3, speed, products))
    return rows


def print_decode(rows: list[Row]) -> None:
    """One sample: share of the read speed, ratios to PyTorch, targets."""
    by_key = index(rows)
    print("One sample, cold weights. ceiling: share of the speed of reading memory. Ratios are speeds.\n")
    print("| shape | threads | variant | ms | GB/s | ceiling | x torch fp32 | x torch bf16 | x one thread | targets |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        read = by_key[row.shape, row.threads, "memory read"]
        single = by_key.get((row.shape, 1, row.name))
        fp32, bf16 = (by_key[row.shape, row.threads, f"torch {name}"].ms / row.ms for name in DTYPES)
        share = row.gb_per_s / read.gb_per_s
        scaling = None if single is None or row.threads == 1 else single.ms / row.ms
        goals = targets(row, share, fp32, scaling)
        ratios = "- | -" if row is read else f"{fp32:.1f} | {bf16:.1f}"
        print(
            f"| {row.shape} | {row.threads} | {row.name} | {row.ms:.3f} | {row.gb_per_s:.1f} | {share:.0%} | {ratios} "
            f"| {'-' if scaling is None else f'{scaling:.2f}'} | {goals} |"
        )


def targets(row: Row, share: float, over_fp32: float, scaling: float | None) -> str:
    """Which targets the row meets and misses."""
    if row.name not in KERNELS:
        return ""
    goals = {f">= {OVER_TORCH:.0f}x torch fp32": over_fp32 >= OVER_TORCH}
    if row.threads == 1 and row.name in CEILING:
        goals[f">= {CEILING[row.name]:.0%} of the ceiling"] = share >= CEILING[row.name]
    if row.threads == 2 and scaling is not None:
        goals[f">= {OVER_ONE_THREAD}x one thread"] = scaling >= OVER_ONE_THREAD
    return ", ".join(f"{name}: {verdict(met)}" for name, met in goals.items())


def verdict(met: bool) -> str:
    """In a word."""
    return "met" if met else "MISSED"


def index(rows: list[Row]) -> dict[tuple[str, int, str], Row]:
    """By shape, threads and name."""
    return {(row.shape, row.threads, row.name): row for row in rows}


def print_summary(rows: list[Row]) -> None:
    """Every target with the lowest value over the shapes, and the ratio of the speeds to every kernel of others."""
    by_key = index(rows)
    cases = sorted({(row.shape, row.threads) for row in rows}, key=lambda case: (case[1], case[0]))
    print("\n| target, lowest of the shapes | value | |\n|---|---|---|")
    for threads in sorted({row.threads for row in rows}):
        shapes = [shape for shape, count in cases if count == threads]
        for name, share in CEILING.items() if threads == 1 else ():
            lowest = min(by_key[shape, 1, name].gb_per_s / by_key[shape, 1, "memory read"].gb_per_s for shape in shapes)
            print(f"| {name} >= {share:.0%} of the ceiling, 1 thread | {lowest:.0%} | {verdict(lowest >= share)} |")
        for name in KERNELS:
            lowest = min(by_key[shape, threads, "torch fp32"].ms / by_key[shape, threads, name].ms for shape in shapes)
            goal = f"{name} >= {OVER_TORCH:.0f}x torch fp32, {threads} thread{'s' * (threads > 1)}"
            print(f"| {goal} | {lowest:.1f}x | {verdict(lowest >= OVER_TORCH)} |")
            if threads == 2 and (shapes[0], 1, name) in by_key:
                lowest = min(by_key[shape, 1, name].ms / by_key[shape, 2, name].ms for shape in shapes)
                goal = f"{name}, 2 threads >= {OVER_ONE_THREAD}x 1 thread"
                print(f"| {goal} | {lowest:.2f}x | {verdict(lowest >= OVER_ONE_THREAD)} |")
    peers = [name for name in dict.fromkeys(row.name for row in rows) if "int" in name]
    if not peers:
        return
    print("\nTimes as fast as the kernels of others, which are uniform; lowest and highest of the shapes.\n")
    print(f"| threads | against | {' | '.join(KERNELS)} |\n|---|---|{'---|' * len(KERNELS)}")
    for threads in sorted({row.threads for row in rows}):
        shapes = [shape for shape, count in cases if count == threads]
        for peer in peers:
            cells = []
            for name in KERNELS:
                ratios = [by_key[shape, threads, peer].ms / by_key[shape, threads, name].ms for shape in shapes]
                cells.append(f"{min(ratios):.2f}-{max(ratios):.2f}")
            print(f"| {threads} | {peer} | {' | '.join(cells)} |")


def print_sweep(rows: list[Row]) -> None:
    """Batches: multiplications per nanosecond, and whether the kernel is ahead of the dense layer."""
    if not rows:
        return
    by_key = {(row.threads, row.batch, row.name): row for row in rows}
    names = [(f"4-bit {name}", f"torch {name}") for name in DTYPES]
    print(f"\nBatches, {rows[0].shape}, products per ns.\n")
    print(f"| threads | batch | {' | '.join(f'{ours} | {dense} | ratio' for ours, dense in names)} |")
    print("|---|---|" + "---|" * 6)
    for threads, batch in sorted({(row.threads, row.batch) for row in rows}):
        cells = []
        for pair in names:
            ours, dense = (by_key[threads, batch, name].mac_per_ns for name in pair)
            cells.append(f"{ours:.1f} | {dense:.1f} | {ours / dense:.2f}")
        print(f"| {threads} | {batch} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
