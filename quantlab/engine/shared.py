"""Statistics of the float model, collected once for all runs that start from it.

What enters a layer of the float model does not depend on how the layers before it are quantized. So runs with
`inputs="float"` of the same model on the same text need the same moments: one pass takes the calibration batches
through the float model, a block at a time, and writes the moments of every group of layers. A run that finds them
neither collects anything nor keeps the hidden states of the float model.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.atomic import one_at_a_time, replacing
from quantlab.checkpoint.serialize import file_sha256, write_safetensors
from quantlab.engine.chain import Chain
from quantlab.engine.collect import Group, Place
from quantlab.engine.drive import open_driver
from quantlab.engine.gradients import read_gradients
from quantlab.engine.linears import find_linears
from quantlab.engine.moments import Moments
from quantlab.engine.profile import Profile
from quantlab.engine.shards import LocalShards
from quantlab.engine.statistics import GroupStatistics, StatisticsOptions
from quantlab.engine.waves import expert_waves, hardly_reached, packed, plain_groups
from quantlab.errors import CheckpointError, ResumableError
from quantlab.experts import fused_experts, unfuse
from quantlab.progress import Progress
from quantlab.skeleton import open_streamed, unload

COMPLETE = "complete.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatPass:
    """What is collected in the float model.

    Attributes:
        source: local model folder with safetensors weights.
        batches: token ids, (sequences, tokens) each.
        ranges: the shards of the batches, whose sums are added in order.
        dtype: what the model computes in.
        layers: to quantize, by full name.
        statistics: with `inputs="float"`.
        statistics_bytes: for the statistics that are collected together.
        gradients: folder of the gradients, if the statistics need them.
        work: folder for hidden states.
        in_memory: whether hidden states are kept in memory, too.
        device: where the model computes.
    """

    source: Path
    batches: Sequence[Tensor]
    ranges: Sequence[range]
    dtype: torch.dtype
    layers: Collection[str]
    statistics: StatisticsOptions
    statistics_bytes: int
    gradients: Path
    work: Path
    in_memory: bool
    device: torch.device


def collect_in_float_model(
    asked: FloatPass, folder: Path, progress: Progress, stop: Callable[[], bool] = lambda: False
) -> float:
    """Take all batches through the float model and write the statistics, unless an earlier call has done that.

    Args:
        asked: what to collect.
        folder: where `StoredStatistics` will find it; created if it does not exist.
        progress: is told about every block.
        stop: asked after every block; a true answer ends the pass, which has to begin anew.

    Returns:
        The seconds that it took, in this call or in the earlier one.

    Raises:
        NumericalError: the float model computes something that is not finite.
        ResumableError: the pass was stopped.
    """
    complete = folder / COMPLETE
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(complete):  # runs of a comparison share the folder
        if complete.is_file():
            earlier_s: float = json.loads(complete.read_text(encoding="utf-8"))["seconds"]
            return earlier_s
        started, profile = time.monotonic(), Profile(asked.device)
        model, prefix, blocks, weights = open_streamed(asked.source, asked.dtype, asked.device)
        entries: list[dict[str, Any]] = []
        progress.begin("statistics of the float model", len(blocks), "blocks")
        with open_driver(model, blocks, asked.batches[0][:1], asked.device) as driver:
            chain = Chain(driver, asked.batches, asked.work, in_memory=asked.in_memory, profile=profile)
            shards = LocalShards({"float": chain}, asked.batches, asked.ranges)
            if driver.mode == "record":
                weights.unload_rest()
            for index, block in enumerate(blocks):
                if index > 0:
                    weights.load_block(index)
                unfuse(block, fused_experts(block))
                name, originals, gradients = f"{prefix}.{index}", find_linears(block), None
                if asked.statistics.gradients:
                    gradients = read_gradients(asked.gradients, index, [f"{name}.{layer}" for layer in originals])
                place = Place(
                    index=index,
                    name=name,
                    block=block,
                    originals=originals,
                    statistics=asked.statistics,
                    gradients=gradients,
                    quantized=chain,
                    float_chain=chain,
                    profile=profile,
                )
                entries += _collect_block(asked, shards, place, chain, folder)
                if not driver.is_last(index):
                    chain.propagate(index, name).remove()
                unload(block)
                progress.advance(detail=f"block {index + 1}/{len(blocks)}")
                if stop():
                    raise ResumableError("stopped while collecting the statistics of the float model")
            chain.remove()
        seconds = time.monotonic() - started
        with replacing(complete) as temporary:
            temporary.write_text(json.dumps({"seconds": seconds, "groups": entries}), encoding="utf-8")
    return seconds


def _collect_block(
    asked: FloatPass, shards: LocalShards, place: Place, chain: Chain, folder: Path
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []

    def collect(wave: Sequence[Group], all_tokens: Sequence[str] = ()) -> list[GroupStatistics]:
        collected = shards.collect(place, wave, all_tokens)
        for statistics in collected:
            file = f"block-{place.index:05d}-{len(entries):05d}.safetensors"
            entries.append({"widened": bool(all_tokens), **_write(folder / file, statistics)})
        return collected

    # Without quantized layers between them, the groups need not wait for each other.
    for wave in packed(place, plain_groups(place, chain, asked.layers), asked.statistics_bytes):
        collect(wave)
    for wave in expert_waves(place, asked.layers, asked.statistics_bytes):
        low = [wave[position] for position in hardly_reached(place, wave, collect(wave))]
        if low:
            collect(low, [layer for group in low for layer in group])
    return entries


def _write(path: Path, statistics: GroupStatistics) -> dict[str, Any]:
    moments = list(dict.fromkeys(own for moments in statistics.moments.values() for own in moments))
    return {
        "file": path.name,
        "sha256": write_safetensors(path, {f"{number}": own.hessian for number, own in enumerate(moments)}),
        "num_tokens": statistics.num_tokens,
        "moments": {layer: [moments.index(one) for one in own] for layer, own in statistics.moments.items()},
    }


class StoredStatistics:
    """What `collect_in_float_model` wrote.

    Args:
        folder: where it was written.
        device: where statistics are wanted.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        entries = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["groups"]
        self._entries = {(tuple(entry["moments"]), entry["widened"]): entry for entry in entries}

    def collect(self, place: Place, wave: Sequence[Group], all_tokens: Sequence[str]) -> list[GroupStatistics]:
        """The statistics of every group of a wave, as `Shards.collect` would collect them.

        Raises:
            CheckpointError: a file is missing or has changed.
        """
        with place.profile.timed("statistics"):
            return [self._read(place, [*map(place.full, group)], bool(all_tokens)) for group in wave]

    def _read(self, place: Place, layers: list[str], widened: bool) -> GroupStatistics:
        entry = self._entries[tuple(layers), widened]
        path = self._folder / entry["file"]
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is missing or not as it was written; remove its folder to collect it again")
        # Copies lie in memory as collected moments do; where a product reads from decides about its last digits.
        tensors = load_file(path).items()
        stored = {int(key): Moments(hessian=tensor.to(self._device, copy=True)) for key, tensor in tensors}
        fisher = place.gradients.fisher if place.gradients is not None and place.statistics.fisher else {}
        return GroupStatistics(
            moments={layer: tuple(stored[number] for number in own) for layer, own in entry["moments"].items()},
            num_tokens=entry["num_tokens"],
            fisher={layer: fisher[layer] for layer in layers if layer in fisher},
        )
