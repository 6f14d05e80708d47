"""The product of single layers, quantized beside dense: where the speed of generation comes from, or is lost.

Weights are cold, as they are in a model: successive calls take the next of several copies of a layer that together
are larger than a cache, as far as that takes reasonably many copies. Quantized and dense layer take turns.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import UsageError
from quantlab.evaluate.clock import Clock
from quantlab.evaluate.subject import Subject
from quantlab.progress import Progress
from quantlab.runtime import LutLinear, ModuleSpec

COLD_BYTES = 192 << 20
MOST_COPIES = 64
TURN_S = 0.05
FEWEST_CALLS, MOST_CALLS = 5, 1000

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What is measured.

    Attributes:
        batches: numbers of inputs that are multiplied at once; 1 is what generation does.
        repeats: turns of each layer.
        dtype: of the inputs and of the dense weight, or None for what the model is stored in.
    """

    batches: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 3
    dtype: str | None = None


def profile_kernels(subject: Subject, options: KernelOptions, progress: Progress) -> dict[str, Any]:
    """Measure one layer of every shape and storage that a quantized model has.

    Returns:
        "layers", each with "out_features", "in_features", "bits", "group_size", "codebook", "outliers", how many
        the model has as "count", and "batches" by number of inputs: "ms" and "dense_ms" (medians over the turns),
        "speedup" and "speedup_range"; beside them "dtype", "device", "threads" and "torch".

    Raises:
        UsageError: the model has no quantized layers.
    """
    dtype = subject.dtype if options.dtype is None else getattr(torch, options.dtype)
    found: dict[tuple[Any, ...], list[LutLinear]] = {}
    for module in subject.load(dtype).modules():
        if isinstance(module, LutLinear):
            found.setdefault(_kind(module.spec), []).append(module)
    if not found:
        raise UsageError(f"{subject.name} has no quantized layers; give a run or a quantized checkpoint")
    progress.begin("multiplying", len(found) * len(options.batches), "products")
    return {
        "layers": [
            {
                **_describe(layers[0].spec),
                "count": len(layers),
                "batches": _measure(layers[0], subject.device, dtype, options, progress),
            }
            for layers in found.values()
        ],
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _kind(spec: ModuleSpec) -> tuple[Any, ...]:
    """What the time depends on; layers differ in their numbers of outliers, by little."""
    return spec.out_features, spec.in_features, spec.bits, spec.group_size, spec.codebook, spec.outliers > 0


def _describe(spec: ModuleSpec) -> dict[str, Any]:
    names = ("out_features", "in_features", "bits", "group_size", "codebook", "outliers")
    return {name: getattr(spec, name) for name in names}


@torch.inference_mode()
def _measure(
    layer: LutLinear, device: torch.device, dtype: torch.dtype, options: KernelOptions, progress: Progress
) -> dict[str, dict[str, Any]]:
    layer.separate()
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=device, dtype=dtype)
    dense.weight.copy_(layer.dequantize())
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
    first = torch.zeros(1, layer.in_features, device=device, dtype=dtype)
    quantized_calls = _in_turn(layer, layer.storage_bits // 8, first)
    dense_calls = _in_turn(dense, dense.weight.nbytes, first)
    results = {}
    for count in options.batches:
        inputs = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(device, dtype)
        turns = [(_time(quantized_calls, inputs), _time(dense_calls, inputs)) for _ in range(options.repeats)]
        speedups = [other / own for own, other in turns]
        results[str(count)] = {
            "ms": 1000 * statistics.median(own for own, _ in turns),
            "dense_ms": 1000 * statistics.median(other for _, other in turns),
            "speedup": statistics.median(speedups),
            "speedup_range": [min(speedups), max(speedups)],
        }
        progress.advance(detail=f"{layer.out_features}x{layer.in_features}, {count} inputs")
    return results


def _in_turn(layer: nn.Module, nbytes: int, first: Tensor) -> Iterator[Call]:
    """Copies of a layer, enough to be cold in turn, one after the other without end; each has been used once."""
    copies = [copy.deepcopy(layer) for _ in range(min(MOST_COPIES, max(2, -(-COLD_BYTES // nbytes))))]
    for each in copies:
        each(first)  # a first use prepares the weight
    return itertools.cycle(copies)


def _time(calls: Iterator[Call], inputs: Tensor) -> float:
    """Seconds of one call, the median over a turn."""
    clock = Clock(inputs.device)
    started = time.perf_counter()
    done = 0
    while done < FEWEST_CALLS or (done < MOST_CALLS and time.perf_counter() - started < TURN_S):
        next(calls)(inputs)
        clock.tick()
        done += 1
    return statistics.median(clock.intervals_s())
