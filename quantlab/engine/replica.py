"""One shard of the calibration batches, in a process that holds the block it stands before.

What the functions here return follows from their arguments and from files. A process keeps the skeleton, the block and
the hidden states of its shard between calls, which saves loading them; one that takes over from a lost process loads
them, and goes on.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.engine.chain import CHECKED_BATCH, Chain
from quantlab.engine.collect import Group, Place, collect_batches, propagate_chains
from quantlab.engine.drive import open_driver
from quantlab.engine.gradients import read_gradients
from quantlab.engine.linears import bias_of, find_linears
from quantlab.engine.profile import Profile
from quantlab.engine.statistics import PartialStatistics, StatisticsOptions
from quantlab.experts import fused_experts, unfuse
from quantlab.runtime import LutLinear, ModuleSpec
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload

Solved = tuple[str, ModuleSpec, Mapping[str, Tensor]]
"""A layer of the current block that is quantized already: its name in the block, and how it is stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSite:
    """What a process needs to begin.

    Attributes:
        key: tells it apart from every other shard of every run.
        source: folder of the float model.
        dtype: what the model computes in.
        batches: token ids of the shard, (sequences, tokens) each.
        numbers: of these batches in the calibration set.
        first_token: number of their first token in the calibration set.
        probe: token ids to choose the driver with, (1, tokens).
        chains: names of the chains; the first is the quantized one.
        work: folder for hidden states.
        gradients: folder of the gradients, if the statistics need them.
        statistics: what is collected.
        in_memory: whether hidden states are kept in memory, too.
    """

    key: str
    source: Path
    dtype: torch.dtype
    batches: tuple[Tensor, ...]
    numbers: range
    first_token: int
    probe: Tensor
    chains: tuple[str, ...]
    work: Path
    gradients: Path
    statistics: StatisticsOptions
    in_memory: bool


@torch.no_grad()
def start_shard(site: ShardSite) -> dict[str, dict[str, str]]:
    """Bring a shard before the first block; returns the hashes of its files, by chain. A unit of an executor."""
    return _replica_of(site, begin=True).hashes()


@torch.no_grad()
def collect_shard(
    site: ShardSite,
    index: int,
    hidden: Mapping[str, Mapping[str, str]],
    wave: Sequence[Sequence[str]],
    all_tokens: Sequence[str],
    *solved: Solved,
) -> list[PartialStatistics]:
    """Collect statistics of the shard alone; a unit of an executor.

    Args:
        site: the shard.
        index: of the block.
        hidden: hashes of the files before it, by chain.
        wave: as in `collect_batches`.
        all_tokens: as in `collect_batches`.
        solved: layers of the block that are quantized already.
    """
    replica = _replica_of(site)
    place = replica.place(index, hidden, solved)
    groups: list[Group] = [list(group) for group in wave]
    batches = range(len(site.batches))
    collectors = collect_batches(place, groups, all_tokens, batches, site.first_token)
    return [collector.partial() for collector in collectors]


@torch.no_grad()
def propagate_shard(
    site: ShardSite, index: int, hidden: Mapping[str, Mapping[str, str]], *solved: Solved
) -> dict[str, dict[str, str]]:
    """Take the shard through a block; returns the hashes of the files behind it. A unit of an executor."""
    replica = _replica_of(site)
    propagate_chains(replica.place(index, hidden, solved))
    return replica.hashes()


class _Replica:
    """The model of one shard, of which one block is loaded."""

    _index: int
    _placed: int
    _originals: dict[str, nn.Module]

    def __init__(self, site: ShardSite, begin: bool) -> None:
        self.site = site
        self._opened = ExitStack()
        self._model = build_skeleton(read_config(site.source), site.dtype)
        self._prefix, blocks = find_blocks(self._model)
        self._blocks = list(blocks)
        self._weights = WeightSource(site.source, self._model, site.dtype)
        self._weights.load_rest()
        self._load(0)
        driver = self._opened.enter_context(open_driver(self._model, self._blocks, site.probe))
        self._chains = {
            name: Chain(
                driver,
                site.batches,
                site.work / name,
                in_memory=site.in_memory,
                profile=Profile(),
                numbers=site.numbers,
                begin=begin,
                resumable=True,
                finishing=CHECKED_BATCH,
            )
            for name in site.chains
        }
        self._weights.unload_rest()

    def place(self, index: int, hidden: Mapping[str, Mapping[str, str]], solved: Sequence[Solved]) -> Place:
        """Be before a block, with the layers that are quantized in their places."""
        if index != self._index:
            self._leave()
            self._load(index)
        block, name = self._blocks[index], f"{self._prefix}.{index}"
        for layer, spec, stored in solved[self._placed :]:
            block.set_submodule(layer, LutLinear(spec, dict(stored), bias_of(self._originals[layer])))
        self._placed = len(solved)
        for chain, hashes in hidden.items():
            self._chains[chain].stand_at(index, hashes)
        statistics, gradients = self.site.statistics, None
        if statistics.gradients:
            gradients = read_gradients(self.site.gradients, index, [f"{name}.{layer}" for layer in self._originals])
        quantized, *floats = self._chains.values()
        return Place(
            index=index,
            name=name,
            block=block,
            originals=self._originals,
            statistics=statistics,
            gradients=gradients,
            quantized=quantized,
            float_chain=floats[0] if floats else None,
            profile=Profile(),
        )

    def hashes(self) -> dict[str, dict[str, str]]:
        """Of the files of hidden states, by chain."""
        return {name: chain.hashes() for name, chain in self._chains.items()}

    def close(self) -> None:
        """Give the memory back."""
        self._opened.close()

    def _load(self, index: int) -> None:
        block = self._blocks[index]
        self._weights.load_block(index)
        unfuse(block, fused_experts(block))
        self._index, self._placed, self._originals = index, 0, find_linears(block)

    def _leave(self) -> None:
        block = self._blocks[self._index]
        for layer, linear in self._originals.items():
            block.set_submodule(layer, linear)
        unload(block)


_kept: list[_Replica] = []
"""The replica of this process; one, since each holds a block."""


def _replica_of(site: ShardSite, begin: bool = False) -> _Replica:
    if not _kept or _kept[0].site.key != site.key:
        while _kept:
            _kept.pop().close()
        _kept.append(_Replica(site, begin))
    return _kept[0]
