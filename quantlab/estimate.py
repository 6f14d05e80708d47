"""How much a run stores and how long it takes, estimated before it begins.

Storage is exact but for the number of outliers. Time is an estimate: a product of matrices and a small layer are timed
on this machine and scaled by the work of the run. With the manifest of a finished run of the same method it is scaled
from what that run took instead.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantlab.api import InputStatistics, LayerProblem
from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.errors import UsageError
from quantlab.plan import Plan
from quantlab.recipe.layers import LayerMethod
from quantlab.runtime import CodebookKind, LutLinear, ModuleSpec, storage_layout

_PROBE_ROWS, _PROBE_COLUMNS = 64, 512
_PRODUCT_SIZE = 1024

FORWARD_PASSES = 2.5
"""Forward passes of the calibration text through a block: one per group of layers, most of them not to the end."""


@dataclass(frozen=True, kw_only=True)
class MethodProbe:
    """What a method showed on a small random layer.

    Attributes:
        codebook: the kind that it stores.
        outlier_share: outliers per weight.
        solve_rate: work per second, in rows times columns squared.
    """

    codebook: CodebookKind
    outlier_share: float
    solve_rate: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a run, in units that time is proportional to.

    Attributes:
        forward: floating-point operations of the calibration passes.
        statistics: floating-point operations of the Hessians.
        solve: rows times columns squared, summed over the layers.
        written_bytes: of the checkpoint and the hidden states.
    """

    forward: float
    statistics: float
    solve: float
    written_bytes: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast the work is done; units as in `Work`, per second."""

    forward: float
    statistics: float
    solve: float
    written_bytes: float

    def seconds(self, work: Work) -> dict[str, float]:
        """The expected time of each part of the work."""
        return {
            "forward": work.forward / self.forward,
            "statistics": work.statistics / self.statistics,
            "solve": work.solve / self.solve,
            "write": work.written_bytes / self.written_bytes,
        }


def probe(method: LayerMethod) -> MethodProbe:
    """Let a method quantize a small random layer.

    Raises:
        QuantlabError: it cannot.
    """
    group = method.spec.group_size or 1
    columns = group * max(1, _PROBE_COLUMNS // group)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_PROBE_ROWS, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    statistics = InputStatistics(
        hessian=inputs.T @ inputs / len(inputs), num_tokens=len(inputs), fisher=weight.square() + 0.1
    )
    problem = LayerProblem(name="probe", weight=weight, spec=method.spec, statistics=statistics)
    method.quantizer.quantize(problem)  # the first call may compile
    started = time.perf_counter()
    layer = method.quantizer.quantize(problem)
    seconds = time.perf_counter() - started
    module = LutLinear.from_layer(layer, method.spec, None)
    return MethodProbe(
        codebook=module.spec.codebook,
        outlier_share=module.spec.outliers / weight.numel(),
        solve_rate=_PROBE_ROWS * columns**2 / seconds,
    )


def stored_bytes(shape: tuple[int, int], method: LayerMethod, probed: MethodProbe) -> int:
    """Bytes that store the weight of one layer: codes, codebook or scales, outliers."""
    spec = ModuleSpec(
        out_features=shape[0],
        in_features=shape[1],
        bits=method.spec.bits,
        group_size=method.spec.group_size,
        codebook=probed.codebook,
        outliers=round(probed.outlier_share * math.prod(shape)),
        bias=False,
    )
    return sum(math.prod(size) * dtype.itemsize for dtype, size in storage_layout(spec).values())


def measured_rates(solve_rate: float) -> Rates:
    """The rates of this machine, from a product of matrices timed now and the solving rate of a probe."""
    one = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE)
    one @ one
    started = time.perf_counter()
    one @ one
    product = 2 * _PRODUCT_SIZE**3 / (time.perf_counter() - started)
    return Rates(forward=product / 2, statistics=product, solve=solve_rate, written_bytes=200e6)


def recorded_rates(run_folder: Path, method: str) -> Rates:
    """The rates of a finished run.

    Raises:
        UsageError: the folder is not that of a finished run, or of a run of another method.
    """
    try:
        manifest = json.loads((run_folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        shapes = [tuple(layer["shape"]) for layer in manifest["layers"]]
        work = work_of(shapes, manifest["calibration"]["tokens"], manifest["checkpoint_bytes"])
        seconds = {part: max(value, 1e-3) for part, value in manifest["engine_s"].items()}
        name = manifest["method"]["name"]
        rates = Rates(
            forward=work.forward / seconds["forward"],
            statistics=work.statistics / seconds["statistics"],
            solve=work.solve / seconds["solve"],
            written_bytes=work.written_bytes / seconds["write"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{run_folder} is not the folder of a finished run ({type(error).__name__}: {error})"
        ) from error
    if name != method:
        raise UsageError(f"{run_folder} is a run of {name}, from which the time of {method} cannot be scaled")
    return rates


def work_of(shapes: Sequence[tuple[int, ...]], tokens: int, written_bytes: float) -> Work:
    """The work of a run.

    Args:
        shapes: (out_features, in_features) of the layers to quantize.
        tokens: of calibration text.
        written_bytes: of checkpoint and hidden states.
    """
    weights = sum(math.prod(shape) for shape in shapes)
    return Work(
        forward=FORWARD_PASSES * 2.0 * tokens * weights,
        # A Hessian of n columns takes n additions and multiplications per token and column; layers that share an
        # input share it, which halves the number in common architectures.
        statistics=sum(2.0 * tokens * columns**2 for _, columns in shapes) / 2,
        solve=sum(float(rows) * columns**2 for rows, columns in shapes),
        written_bytes=written_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run is expected to store and to take.

    Attributes:
        layer_bytes: stored in place of the weight of each quantized layer, by its name.
        bits_per_weight: the mean over the quantized weights.
        checkpoint_bytes: of the checkpoint.
        seconds: by part of the work.
    """

    layer_bytes: dict[str, int]
    bits_per_weight: float
    checkpoint_bytes: int
    seconds: dict[str, float]


def estimate_run(plan: Plan, like: Path | None) -> Estimate:
    """Estimate what a run stores and how long it takes.

    Args:
        plan: of the run.
        like: folder of a finished run to scale times from; None times a small layer and a matrix product now.

    Raises:
        UsageError: `like` is not a run to scale from.
        QuantlabError: a method cannot quantize a small layer.
    """
    methods = list({id(layer.method): layer.method for layer in plan.quantized if layer.method is not None}.values())
    probes = {id(method): probe(method) for method in methods}
    layer_bytes = {
        layer.name: stored_bytes(layer.shape, layer.method, probes[id(layer.method)])
        for layer in plan.quantized
        if layer.method is not None
    }
    checkpoint = sum(layer_bytes.values()) + (plan.parameters - plan.quantized_parameters) * plan.itemsize
    work = work_of([layer.shape for layer in plan.quantized], plan.calibration_tokens, checkpoint + plan.work_bytes)
    slowest = min(probed.solve_rate for probed in probes.values())
    rates = measured_rates(slowest) if like is None else recorded_rates(like, methods[0].quantizer.info.name)
    return Estimate(
        layer_bytes=layer_bytes,
        bits_per_weight=8 * sum(layer_bytes.values()) / plan.quantized_parameters,
        checkpoint_bytes=checkpoint,
        seconds=rates.seconds(work),
    )
