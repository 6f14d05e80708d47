"""Which layers of a block have their statistics collected together, in one pass over the batches."""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from quantlab.engine.chain import Chain
from quantlab.engine.collect import Group, Place
from quantlab.engine.linears import group_by_input, weight_of
from quantlab.engine.statistics import GroupStatistics, statistics_bytes
from quantlab.experts import expert_groups

COVERAGE = 4
"""An expert that sees fewer tokens than its in_features divided by this is calibrated on all tokens instead."""


def plain_groups(place: Place, chain: Chain, layers: Collection[str]) -> list[Group]:
    """The layers to quantize that every token reaches, those that share an input together, in the order of the calls.

    Args:
        place: the block, with nothing replaced in it yet.
        chain: whose first batch shows which layers share their input.
        layers: to quantize, by full name.

    Raises:
        ModelError: as for `group_by_input`.
    """
    routed = {layer for group in expert_groups(place.block) for layer in group}
    plain = {layer: linear for layer, linear in place.originals.items() if layer not in routed}
    groups = group_by_input(plain, partial(chain.run, place.index, 0))
    return _chosen(place, groups, layers)


def expert_waves(place: Place, layers: Collection[str], room_bytes: int) -> list[list[Group]]:
    """The layers of experts to quantize, in runs as in `packed`; those in one run do not see each other.

    Args:
        place: the block.
        layers: to quantize, by full name.
        room_bytes: for the statistics of one run.
    """
    by_role: dict[tuple[str, ...], list[Group]] = {}  # the same layers of every expert, in the order of the calls
    for group in expert_groups(place.block):
        by_role.setdefault(tuple(re.sub(r"\d+", "*", layer) for layer in group), []).append(group)
    return [wave for same in by_role.values() for wave in packed(place, _chosen(place, same, layers), room_bytes)]


def packed(place: Place, groups: Sequence[Group], room_bytes: int) -> Iterator[list[Group]]:
    """Groups in runs whose statistics fit the memory together; one that does not fit alone is a run of its own."""
    wave: list[Group] = []
    room = room_bytes
    for group in groups:
        size = statistics_bytes(_in_features(place, group), len(group), place.statistics)
        if wave and size > room:
            yield wave
            wave, room = [], room_bytes
        wave.append(group)
        room -= size
    if wave:
        yield wave


def hardly_reached(place: Place, wave: Sequence[Group], collected: Sequence[GroupStatistics]) -> list[int]:
    """Positions of the groups of experts that the router hardly ever picks."""
    return [
        position
        for position, (group, statistics) in enumerate(zip(wave, collected, strict=True))
        if statistics.num_tokens < max(1, _in_features(place, group) // COVERAGE)
    ]


def _chosen(place: Place, groups: Sequence[Group], layers: Collection[str]) -> list[Group]:
    kept = ([layer for layer in group if place.full(layer) in layers] for group in groups)
    return [group for group in kept if group]


def _in_features(place: Place, group: Group) -> int:
    return weight_of(place.originals[group[0]]).shape[1]
