"""Quantize the layers of one loaded block: collect the statistics of their inputs, solve, put in place.

Layers are solved in the order in which the block calls them, and the inputs of each are those behind the layers
solved before it. Experts of one mixture do not see each other, so their statistics are collected together, as many
in one pass as the memory allows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from quantlab.engine.collect import Group, Place
from quantlab.engine.linears import group_by_input, weight_of
from quantlab.engine.measure import LayerResult
from quantlab.engine.shards import Shards
from quantlab.engine.solve import LayerSolver, SolveOptions
from quantlab.engine.statistics import (
    GroupStatistics,
    statistics_bytes,
)
from quantlab.errors import QualityError
from quantlab.executors import Executor
from quantlab.experts import expert_groups

COVERAGE = 4
"""An expert that sees fewer tokens than its in_features divided by this is calibrated on all tokens instead."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockJob:
    """One block and everything that its layers are solved with.

    Attributes:
        place: the block, and the batches before it; at least the first of them.
        shards: all batches.
        options: by full name, of the layers to quantize; the others keep their weights.
        statistics_bytes: for the statistics that are collected in one pass.
        max_rows: rows that a row-independent method is given at once; None for all.
        executor: where layers are solved.
    """

    place: Place
    shards: Shards
    options: Mapping[str, SolveOptions]
    statistics_bytes: int
    max_rows: int | None
    executor: Executor

    def full(self, layer: str) -> str:
        """The name in the model of a layer of the block."""
        return self.place.full(layer)


def quantize_block(job: BlockJob) -> Iterator[LayerResult]:
    """Quantize the layers of a block in place, and report on each as soon as it is done.

    Raises:
        PluginError: the method broke its contract.
        QualityError: the method departed from its options or an expert saw too few tokens, and neither may be.
        NumericalError: a layer cannot be solved.
    """
    place, originals = job.place, job.place.originals
    experts = expert_groups(place.block)
    expert_layers = {layer for group in experts for layer in group}
    plain = {layer: linear for layer, linear in originals.items() if layer not in expert_layers}
    groups = group_by_input(plain, partial(place.quantized.run, place.index, 0))
    for wave in _waves(job, groups, experts, originals):
        collected = job.shards.collect(place, wave, ())
        routed = {}
        if wave[0][0] in expert_layers:
            routed = _widen_coverage(job, wave, collected, originals)
        with job.place.profile.timed("solve"):
            solvers = [_solver(job, group, collected.pop(0), originals) for group in wave]
        for group in wave:
            yield from _put_in_place(job, group, solvers.pop(0), routed.get(group[0]))


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
            size = statistics_bytes(in_features, len(group), job.place.statistics)
            if size > room:
                waves.append([])
                room = max(job.statistics_bytes, size)
            waves[-1].append(group)
            room -= size
    return waves


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
        widened = job.shards.collect(job.place, low, [layer for group in low for layer in group])
        for position, statistics in zip(chosen, widened, strict=True):
            collected[position] = statistics
    return routed


def _solver(
    job: BlockJob, group: Group, statistics: GroupStatistics, originals: Mapping[str, nn.Module]
) -> LayerSolver:
    """Begin to solve the layers of a group."""
    linears = {job.full(layer): originals[layer] for layer in group}
    options = {layer: job.options[layer] for layer in linears}
    return LayerSolver(linears, statistics, options, job.max_rows, job.executor)


def _put_in_place(job: BlockJob, group: Group, solver: LayerSolver, routed: int | None) -> Iterator[LayerResult]:
    """Solve the layers of a group and put the answers in their places."""
    with job.place.profile.timed("solve"):
        solved = solver.finish()
    for layer in group:
        module, result = solved[job.full(layer)]
        job.place.block.set_submodule(layer, module)
        job.shards.solved(layer, module)
        if job.place.quantized.recall is not None:
            job.place.quantized.recall.note_solved(layer)
        if routed is not None:
            fallbacks = result.diagnostics.get("fallbacks", 0) + 1
            diagnostics = {**result.diagnostics, "fallbacks": fallbacks, "routed_tokens": routed}
            result = replace(result, diagnostics=diagnostics)
        yield result
