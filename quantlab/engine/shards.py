"""The calibration batches in shards, whose sums are added in order: here, or by processes that hold a shard each.

How many shards there are says the recipe, since it decides in which order sums are added, and so their last digits.
Where they are summed makes no difference.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from quantlab.engine.activations import Activations
from quantlab.engine.chain import CHECKED_BATCH, Chain
from quantlab.engine.collect import Group, Place, collect_batches, propagate_chains
from quantlab.engine.replica import ShardSite, collect_shard, propagate_shard, start_shard
from quantlab.engine.statistics import GroupStatistics, PartialStatistics, StatisticsCollector
from quantlab.executors import Executor
from quantlab.runtime import LutLinear, storage_layout

Hashes = Mapping[str, Mapping[str, str]]
"""SHA-256 of the files of hidden states, by chain and file name."""

Collect = Callable[[Place, Sequence[Group], Sequence[str]], list[GroupStatistics]]
"""The statistics of every group of a wave; see `collect_batches`."""


class Shards(Protocol):
    """All calibration batches before one block."""

    def collect(self, place: Place, wave: Sequence[Group], all_tokens: Sequence[str]) -> list[GroupStatistics]:
        """The statistics of every group of a wave; see `collect_batches`."""
        ...

    def solved(self, layer: str, module: LutLinear) -> None:
        """A layer of the block, by its name there, has been replaced."""
        ...

    def propagate(self, place: Place) -> list[Activations]:
        """Take all batches through the block, to the next one; returns the hidden states before it."""
        ...

    def hashes(self) -> Hashes:
        """The files of the hidden states before the current block."""
        ...

    def continue_from(self, index: int, hashes: Hashes) -> None:
        """Go on before block `index`, where a former process stood with these files."""
        ...


def shard_ranges(batches: int, shards: int) -> list[range]:
    """Batches cut into runs of nearly equal length, fewer if there are fewer batches."""
    count = min(batches, shards)
    return [range(*bounds) for bounds in pairwise(batches * index // count for index in range(count + 1))]


def add_up(parts: Iterable[PartialStatistics], collectors: Sequence[StatisticsCollector]) -> None:
    """Add the sums of a further shard to those of the shards before it."""
    for part, collector in zip(parts, collectors, strict=True):
        collector.absorb(part)


class LocalShards:
    """All batches in this process.

    Args:
        chains: of the whole calibration set, by name; the first is the quantized one.
        batches: token ids, (sequences, tokens) each.
        ranges: the shards.
    """

    def __init__(self, chains: Mapping[str, Chain], batches: Sequence[Tensor], ranges: Sequence[range]) -> None:
        self._chains, self._batches, self._ranges = chains, batches, ranges

    def collect(self, place: Place, wave: Sequence[Group], all_tokens: Sequence[str]) -> list[GroupStatistics]:
        """See Shards."""
        totals: list[StatisticsCollector] = []
        for batches in self._ranges:
            first_token = sum(ids.numel() for ids in self._batches[: batches.start])
            collectors = collect_batches(place, wave, all_tokens, batches, first_token)
            if totals:
                add_up((collector.partial() for collector in collectors), totals)
            else:
                totals = collectors
        with place.profile.timed("statistics"):
            return [total.finish() for total in totals]

    def solved(self, layer: str, module: LutLinear) -> None:
        """The block is the very one that batches run through."""

    def propagate(self, place: Place) -> list[Activations]:
        """See Shards."""
        return propagate_chains(place)

    def hashes(self) -> Hashes:
        """See Shards."""
        return {name: chain.hashes() for name, chain in self._chains.items()}

    def continue_from(self, index: int, hashes: Hashes) -> None:
        """See Shards."""
        for name, chain in self._chains.items():
            chain.continue_from(index, hashes[name])


class RemoteShards:
    """Every shard in a process of its own, which holds the block, too.

    Args:
        executor: runs the processes.
        sites: what the process of each shard needs to begin.
        chains: of the first batch alone, in this process; the first is the quantized one.
    """

    def __init__(self, executor: Executor, sites: Sequence[ShardSite], chains: Mapping[str, Chain]) -> None:
        self._executor, self._chains = executor, chains
        self._sites = [executor.put(site) for site in sites]
        self._numbers = [site.numbers for site in sites]
        self._index = 0
        self._solved: list[Any] = []
        self._hashes: list[Hashes] = []

    def start(self) -> None:
        """Bring all batches before the first block."""
        self._stand(0, list(self._run(start_shard, [(site,) for site in self._sites])))

    def collect(self, place: Place, wave: Sequence[Group], all_tokens: Sequence[str]) -> list[GroupStatistics]:
        """See Shards."""
        units = [
            (site, self._index, hashes, tuple(map(tuple, wave)), tuple(all_tokens), *self._solved)
            for site, hashes in zip(self._sites, self._hashes, strict=True)
        ]
        totals = [
            StatisticsCollector(
                {place.full(layer): place.originals[layer] for layer in group}, place.statistics, place.gradients
            )
            for group in wave
        ]
        with place.profile.timed("statistics"):
            for parts in self._run(collect_shard, units):
                add_up(parts, totals)
            return [total.finish() for total in totals]

    def solved(self, layer: str, module: LutLinear) -> None:
        """See Shards."""
        state = module.state_dict()
        stored = {key: state[key] for key in storage_layout(module.spec)}
        self._solved.append(self._executor.put((layer, module.spec, stored)))

    def propagate(self, place: Place) -> list[Activations]:
        """See Shards."""
        units = [
            (site, self._index, hashes, *self._solved) for site, hashes in zip(self._sites, self._hashes, strict=True)
        ]
        with place.profile.timed("forward"):
            following = list(self._run(propagate_shard, units))
        passed = [chain.generation(self._index) for chain in self._chains.values()]
        self._solved.clear()
        self._stand(self._index + 1, following)
        return passed

    def hashes(self) -> Hashes:
        """See Shards."""
        return {name: {file: sha for each in self._hashes for file, sha in each[name].items()} for name in self._chains}

    def continue_from(self, index: int, hashes: Hashes) -> None:
        """See Shards."""
        split: list[Hashes] = []
        for numbers in self._numbers:
            files = set(map(Activations.file_name, numbers))  # behind the last block, not all of them are there
            split.append({name: {file: own[file] for file in files & own.keys()} for name, own in hashes.items()})
        self._stand(index, split)

    def _stand(self, index: int, hashes: list[Hashes]) -> None:
        self._index, self._hashes = index, hashes
        checked = Activations.file_name(CHECKED_BATCH)
        for name, chain in self._chains.items():
            chain.stand_at(index, {checked: hashes[0][name][checked]})

    def _run(self, function: Any, units: list[tuple[Any, ...]]) -> Any:
        return self._executor.map(function, units, sticky=True)
