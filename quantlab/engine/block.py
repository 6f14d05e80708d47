"""Quantize the layers of one loaded block: collect the statistics of their inputs, solve, put in place.

Layers are solved in the order in which the block calls them, and the inputs of each are those behind the layers
solved before it. Experts of one mixture do not see each other, so their statistics are collected together, as many
in one pass as the memory allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from quantlab.engine.collect import Group, Place
from quantlab.engine.linears import weight_of
from quantlab.engine.measure import LayerResult
from quantlab.engine.shards import Collect, Shards
from quantlab.engine.solve import LayerSolver, SolveOptions
from quantlab.engine.statistics import GroupStatistics
from quantlab.engine.waves import expert_waves, hardly_reached, plain_groups
from quantlab.errors import QualityError
from quantlab.executors import Executor


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockJob:
    """One block and everything that its layers are solved with.

    Attributes:
        place: the block, and the batches before it; at least the first of them.
        shards: all batches.
        collect: the statistics of a wave of groups; see `quantlab.engine.shards.Shards.collect`.
        options: by full name, of the layers to quantize; the others keep their weights.
        statistics_bytes: for the statistics that are collected in one pass.
        max_rows: rows that a row-independent method is given at once; None for all.
        executor: where layers are solved.
    """

    place: Place
    shards: Shards
    collect: Collect
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
    plain = [[group] for group in plain_groups(place, place.quantized, job.options)]
    for number, wave in enumerate([*plain, *expert_waves(place, job.options, job.statistics_bytes)]):
        collected = job.collect(place, wave, ())
        routed = {} if number < len(plain) else _widen_coverage(job, wave, collected)
        with job.place.profile.timed("solve"):
            solvers = [_solver(job, group, collected.pop(0), originals) for group in wave]
        for group in wave:
            yield from _put_in_place(job, group, solvers.pop(0), routed.get(group[0]))


def _widen_coverage(job: BlockJob, wave: Sequence[Group], collected: list[GroupStatistics]) -> dict[str, int]:
    """Collect again, on all tokens, for experts that the router hardly ever picks.

    Returns:
        The tokens routed to these experts, by the first layer of their group; `collected` is changed.

    Raises:
        QualityError: there are such experts, and the recipe does not allow to depart from their routing.
    """
    positions = hardly_reached(job.place, wave, collected)
    low = [wave[position] for position in positions]
    routed = {group[0]: collected[position].num_tokens for position, group in zip(positions, low, strict=True)}
    for group in low:
        if not all(job.options[job.full(layer)].allow_fallbacks for layer in group):
            in_features = weight_of(job.place.originals[group[0]]).shape[1]
            raise QualityError(
                f"{job.full(group[0])}: only {routed[group[0]]} calibration tokens are routed to this expert, "
                f"too few for {in_features} inputs; calibrate on more text, or accept with allow_fallbacks: true "
                "that such experts are calibrated on the tokens of all experts"
            )
    if low:
        widened = job.collect(job.place, low, [layer for group in low for layer in group])
        for position, statistics in zip(positions, widened, strict=True):
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
