"""Quantize the layers of one loaded block: collect the statistics of their inputs, solve, put in place.

Layers are solved in the order in which the block calls them, and the inputs of each are those behind the layers
solved before it. Experts of one mixture do not see each other, so their statistics are collected together, as many
in one pass as the memory allows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from quantlab.engine.chain import Chain
from quantlab.engine.linears import group_by_input, weight_of
from quantlab.engine.measure import LayerResult
from quantlab.engine.profile import Profile
from quantlab.engine.solve import SolveOptions, solve_layers
from quantlab.engine.statistics import (
    Gradients,
    GroupStatistics,
    StatisticsCollector,
    StatisticsOptions,
    capture_inputs,
    statistics_bytes,
)
from quantlab.errors import QualityError
from quantlab.experts import all_tokens_for, expert_groups

COVERAGE = 4
"""An expert that sees fewer tokens than its in_features divided by this is calibrated on all tokens instead."""

Group = list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockJob:
    """One block and everything that its layers are solved with.

    Attributes:
        index: of the block.
        name: of the block in the model.
        block: loaded, its experts unfused.
        options: by full name, of the layers to quantize; the others keep their weights.
        statistics: what is collected.
        gradients: of the block's layers, if `statistics.gradients`.
        quantized: the batches behind the blocks quantized so far.
        float_chain: the batches in the float model, if `statistics.float_inputs`.
        statistics_bytes: for the statistics that are collected in one pass.
        max_rows: rows that a row-independent method is given at once; None for all.
        profile: is told where the time goes.
    """

    index: int
    name: str
    block: nn.Module
    options: Mapping[str, SolveOptions]
    statistics: StatisticsOptions
    gradients: Gradients | None
    quantized: Chain
    float_chain: Chain | None
    statistics_bytes: int
    max_rows: int | None
    profile: Profile

    def full(self, layer: str) -> str:
        """The name in the model of a layer of the block."""
        return f"{self.name}.{layer}"


def quantize_block(job: BlockJob, originals: Mapping[str, nn.Module]) -> Iterator[LayerResult]:
    """Quantize the layers of a block in place, and report on each as soon as it is done.

    Args:
        job: the block.
        originals: its linear layers, as `find_linears` names them before anything is replaced.

    Raises:
        PluginError: the method broke its contract.
        QualityError: the method departed from its options or an expert saw too few tokens, and neither may be.
        NumericalError: a layer cannot be solved.
    """
    experts = expert_groups(job.block)
    expert_layers = {layer for group in experts for layer in group}
    plain = {layer: linear for layer, linear in originals.items() if layer not in expert_layers}
    groups = group_by_input(plain, partial(job.quantized.run, job.index, 0))
    for wave in _waves(job, groups, experts, originals):
        collected = _collect(job, wave, originals)
        routed = {}
        if wave[0][0] in expert_layers:
            routed = _widen_coverage(job, wave, collected, originals)
        for group in wave:
            yield from _solve(job, group, collected.pop(0), originals, routed.get(group[0]))


def _waves(
    job: BlockJob, plain: Sequence[Group], experts: Sequence[Group], originals: Mapping[str, nn.Module]
) -> list[list[Group]]:
    """The groups with layers to quantize, those together whose statistics are collected in one pass."""
    chosen = [[layer for layer in group if job.full(layer) in job.options] for group in plain]
    waves = [[group] for group in chosen if group]
    by_role: dict[tuple[str, ...], list[Group]] = {}  # the same layers of every expert, in the order of the calls
    for group in experts:
        by_role.setdefault(tuple(re.sub(r"\d+", "*", layer) for layer in group), []).append(
            [layer for layer in group if job.full(layer) in job.options]
        )
    for groups in by_role.values():
        room = 0
        for group in filter(None, groups):
            in_features = weight_of(originals[group[0]]).shape[1]
            size = statistics_bytes(in_features, len(group), job.statistics)
            if size > room:
                waves.append([])
                room = max(job.statistics_bytes, size)
            waves[-1].append(group)
            room -= size
    return waves


def _collect(job: BlockJob, wave: Sequence[Group], originals: Mapping[str, nn.Module]) -> list[GroupStatistics]:
    """The statistics of each group, over all batches in fixed order, in one pass."""
    collectors = [
        StatisticsCollector({job.full(layer): originals[layer] for layer in group}, job.statistics, job.gradients)
        for group in wave
    ]
    firsts = [group[0] for group in wave]
    linears = [originals[layer] for layer in firsts]
    for batch in range(len(job.quantized)):
        quantized: list[Tensor | None] = [None] * len(wave)
        float_inputs = quantized
        if job.statistics.quantized_inputs:
            quantized = capture_inputs(linears, partial(job.quantized.run, job.index, batch))
        if job.float_chain is not None:
            with layers_in_place(job.block, originals):
                float_inputs = capture_inputs(linears, partial(job.float_chain.run, job.index, batch))
        with job.profile.timed("statistics"):
            for collector, inputs, reference in zip(collectors, quantized, float_inputs, strict=True):
                collector.add(inputs, reference)
    with job.profile.timed("statistics"):
        return [collector.finish() for collector in collectors]


def _widen_coverage(
    job: BlockJob, wave: Sequence[Group], collected: list[GroupStatistics], originals: Mapping[str, nn.Module]
) -> dict[str, int]:
    """Collect again, on all tokens, for experts that the router hardly ever picks.

    Returns:
        The tokens routed to these experts, by the first layer of their group; `collected` is changed.

    Raises:
        QualityError: there are such experts, and the recipe does not allow to depart from their routing.
    """
    routed = {}
    for group, statistics in zip(wave, collected, strict=True):
        in_features = weight_of(originals[group[0]]).shape[1]
        if statistics.num_tokens < max(1, in_features // COVERAGE):
            routed[group[0]] = statistics.num_tokens
            if not all(job.options[job.full(layer)].allow_fallbacks for layer in group):
                raise QualityError(
                    f"{job.full(group[0])}: only {statistics.num_tokens} calibration tokens are routed to this expert, "
                    f"too few for {in_features} inputs; calibrate on more text, or accept with allow_fallbacks: true "
                    "that such experts are calibrated on the tokens of all experts"
                )
    if routed:
        chosen = [position for position, group in enumerate(wave) if group[0] in routed]
        low = [wave[position] for position in chosen]
        with all_tokens_for(job.block, [layer for group in low for layer in group]):
            for position, statistics in zip(chosen, _collect(job, low, originals), strict=True):
                collected[position] = statistics
    return routed


def _solve(
    job: BlockJob, group: Group, statistics: GroupStatistics, originals: Mapping[str, nn.Module], routed: int | None
) -> Iterator[LayerResult]:
    """Solve the layers of a group and put the answers in their places."""
    linears = {job.full(layer): originals[layer] for layer in group}
    with job.profile.timed("solve"):
        options = {layer: job.options[layer] for layer in linears}
        solved = solve_layers(linears, statistics, options, max_rows=job.max_rows)
    for layer in group:
        module, result = solved[job.full(layer)]
        job.block.set_submodule(layer, module)
        if job.quantized.recall is not None:
            job.quantized.recall.note_solved(layer)
        if routed is not None:
            fallbacks = result.diagnostics.get("fallbacks", 0) + 1
            diagnostics = {**result.diagnostics, "fallbacks": fallbacks, "routed_tokens": routed}
            result = replace(result, diagnostics=diagnostics)
        yield result


@contextmanager
def layers_in_place(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, a block has these layers; afterwards those that it has now."""
    current = {layer: block.get_submodule(layer) for layer in layers}
    for layer, module in layers.items():
        block.set_submodule(layer, module)
    try:
        yield
    finally:
        for layer, module in current.items():
            block.set_submodule(layer, module)
