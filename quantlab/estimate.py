"""How much a run stores and how long it takes, estimated before it begins.

Storage is exact but for the number of outliers. Time is an estimate, from seconds of work on this machine: one block of
the model, with weights of zero, runs a text; the method solves two random layers, from which the others are scaled.
With the manifest of a finished run of the same method it is scaled from what that run took instead.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.engine.calls import BlockCall, forward_replaced
from quantlab.engine.device import is_there, synchronize
from quantlab.engine.moments import Moments
from quantlab.engine.solve import SolveOptions, solve_layers
from quantlab.engine.statistics import GroupStatistics
from quantlab.errors import UsageError
from quantlab.plan import Plan
from quantlab.recipe.layers import LayerMethod
from quantlab.runtime import CodebookKind, LutLinear, ModuleSpec, storage_layout
from quantlab.skeleton import CPU, build_skeleton, find_blocks, place_buffers
from quantlab.solvers.products import add_products

_PROBE_ROWS, _PROBE_COLUMNS = 256, (256, 1024)
_PROBE_TOKENS = 512
_PRODUCT_SIZE = 1024
_WRITTEN_BYTES_PER_S = 200e6

FORWARD_PASSES = 2.5
"""Forward passes of the calibration text through a block: one per group of layers, most of them not to the end."""


@dataclass(frozen=True, kw_only=True)
class MethodProbe:
    """What a method showed on small random layers.

    Attributes:
        codebook: the kind that it stores.
        outlier_share: outliers per weight.
        weight_s: seconds per weight.
        weight_input_s: seconds per weight and input: of the products with the Hessian.
    """

    codebook: CodebookKind
    outlier_share: float
    weight_s: float
    weight_input_s: float

    def seconds(self, shape: tuple[int, ...]) -> float:
        """The expected time to solve and to measure a layer, (out_features, in_features)."""
        return math.prod(shape) * (self.weight_s + self.weight_input_s * shape[1])


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


def probe(method: LayerMethod, device: torch.device = CPU) -> MethodProbe:
    """Let the engine quantize two small random layers with a method.

    Args:
        method: with its budget.
        device: where to solve them.

    Raises:
        QuantlabError: it cannot.
    """
    group = method.spec.group_size or 1
    narrow, wide = (group * max(1, columns // group) for columns in _PROBE_COLUMNS)
    _solve_random(method, narrow, device)  # the first call may compile
    narrow_s, _ = _solve_random(method, narrow, device)
    wide_s, module = _solve_random(method, max(wide, 2 * narrow), device)
    wide = module.spec.in_features
    slope = max(0.0, wide_s / wide - narrow_s / narrow) / (wide - narrow) / _PROBE_ROWS
    return MethodProbe(
        codebook=module.spec.codebook,
        outlier_share=module.spec.outliers / (_PROBE_ROWS * wide),
        weight_s=max(0.0, narrow_s / (_PROBE_ROWS * narrow) - slope * narrow),
        weight_input_s=slope,
    )


def _solve_random(method: LayerMethod, columns: int, device: torch.device) -> tuple[float, LutLinear]:
    """The seconds that it takes to solve a random layer, and the answer."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(columns, _PROBE_ROWS, bias=False)
    weight = torch.randn(_PROBE_ROWS, columns, generator=generator).to(device)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    inputs = torch.randn(2 * columns, columns, generator=generator).to(device)
    statistics = GroupStatistics(
        moments={"probe": (Moments(hessian=inputs.T @ inputs / len(inputs)),)},
        num_tokens=len(inputs),
        fisher={"probe": weight.square() + 0.1},
    )
    options = SolveOptions(quantizer=method.quantizer, spec=method.spec, allow_fallbacks=True)
    started = time.perf_counter()
    module, _ = solve_layers({"probe": linear}, statistics, {"probe": options})["probe"]
    synchronize(device)
    return time.perf_counter() - started, module


@torch.no_grad()
def block_seconds(config: PretrainedConfig, dtype: torch.dtype, device: torch.device = CPU) -> float:
    """The time that the first block of a model takes for one token of calibration text.

    Its weights are zero, and so are those outside the blocks: their memory is never touched but to be read.
    """
    model = build_skeleton(config, dtype)
    place_buffers(model, device)
    first, *others = find_blocks(model)[1]
    elsewhere = {id(module) for block in others for module in block.modules()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(module) not in elsewhere:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    tokens = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS)
    seconds: list[float] = []

    class Measured(Exception):
        """Leaves the forward pass behind the first block."""

    def measure(call: BlockCall) -> Tensor:
        for _ in range(2):  # the first may prepare what later ones use
            started = time.perf_counter()
            call.arguments.call(partial(type(first).forward, first), call.hidden)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        raise Measured

    with suppress(Measured), forward_replaced([first], measure):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=False)
    return min(seconds) / tokens


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


def _measured_seconds(
    plan: Plan,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    work: Work,
    probes: dict[int, MethodProbe],
) -> dict[str, float]:
    """The expected time of each part of the work, from what this machine does in a few seconds."""
    inputs, sums = (torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device) for _ in range(2))
    add_products(sums, inputs, inputs)
    synchronize(device)
    started = time.perf_counter()
    add_products(sums, inputs, inputs)
    synchronize(device)
    product = 2 * _PRODUCT_SIZE**3 / (time.perf_counter() - started)
    return {
        "forward": FORWARD_PASSES * plan.num_blocks * plan.calibration_tokens * block_seconds(config, dtype, device),
        "statistics": work.statistics / product,
        "solve": sum(probes[id(layer.method)].seconds(layer.shape) for layer in plan.quantized),
        "write": work.written_bytes / _WRITTEN_BYTES_PER_S,
    }


def recorded_rates(run_folder: Path, method: str) -> Rates:
    """The rates of a finished run.

    Raises:
        UsageError: the folder is not that of a finished run, or of a run of another method.
    """
    try:
        manifest = json.loads((run_folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        shapes = [tuple(layer["shape"]) for layer in manifest["layers"]]
        work = work_of(shapes, manifest["calibration"]["tokens"], manifest["written_bytes"])
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
        # In units of a full product, of which a symmetric one computes half; layers that share an input share their
        # Hessian, which halves the number in common architectures.
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
        seconds: by part of the work; empty if this machine does not have the device to measure on.
    """

    layer_bytes: dict[str, int]
    bits_per_weight: float
    checkpoint_bytes: int
    seconds: dict[str, float]


def estimate_run(
    plan: Plan, config: PretrainedConfig, dtype: torch.dtype, like: Path | None, device: torch.device = CPU
) -> Estimate:
    """Estimate what a run stores and how long it takes.

    Args:
        plan: of the run.
        config: of the model.
        dtype: what the model computes in.
        like: folder of a finished run to scale times from; None measures for a few seconds now.
        device: where the run is to compute.

    Raises:
        UsageError: `like` is not a run to scale from.
        QuantlabError: a method cannot quantize a small layer.
    """
    methods = list({id(layer.method): layer.method for layer in plan.quantized if layer.method is not None}.values())
    probes = {id(method): probe(method, device if is_there(device) else CPU) for method in methods}
    layer_bytes = {
        layer.name: stored_bytes(layer.shape, layer.method, probes[id(layer.method)])
        for layer in plan.quantized
        if layer.method is not None
    }
    checkpoint = sum(layer_bytes.values()) + (plan.parameters - plan.quantized_parameters) * plan.itemsize
    written = checkpoint + plan.hidden_states_written
    work = work_of([layer.shape for layer in plan.quantized], plan.calibration_tokens, written)
    seconds: dict[str, float] = {}
    if like is None and is_there(device):
        seconds = _measured_seconds(plan, config, dtype, device, work, probes)
    elif like is not None:
        seconds = recorded_rates(like, methods[0].quantizer.info.name).seconds(work)
    return Estimate(
        layer_bytes=layer_bytes,
        bits_per_weight=8 * sum(layer_bytes.values()) / plan.quantized_parameters,
        checkpoint_bytes=checkpoint,
        seconds=seconds,
    )
