"""The layers of a float model with the Hessians of two texts, to judge methods layer by layer.

A method that solves a layer with the Hessian of one text can be measured with that of the other, so that what it has
merely learnt by heart does not count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.api import InputStatistics
from quantlab.engine.calls import BlockDriver
from quantlab.engine.drive import open_driver
from quantlab.engine.linears import find_linears, input_groups, weight_of
from quantlab.engine.statistics import GroupStatistics, StatisticsCollector, StatisticsOptions, capture_inputs
from quantlab.experts import fused_experts, unfuse
from quantlab.skeleton import open_streamed, unload

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSample:
    """One linear layer and what enters it.

    Attributes:
        name: the layer's name in the model.
        weight: (out_features, in_features).
        calibration: statistics of the text to solve with.
        held_out: statistics of the text to measure with.
    """

    name: str
    weight: Tensor
    calibration: InputStatistics
    held_out: InputStatistics


@torch.no_grad()
def layer_samples(
    source: Path, calibration_ids: Tensor, held_out_ids: Tensor, dtype: torch.dtype
) -> Iterator[LayerSample]:
    """Go through the linear layers inside the blocks, of which one is in memory at a time.

    Args:
        source: local model folder with safetensors weights.
        calibration_ids: (sequences, tokens) token ids.
        held_out_ids: (sequences, tokens) token ids.
        dtype: what the model computes in.

    Yields:
        Every layer, in the order of the calls. Its tensors are to be used before the next block is asked for.

    Raises:
        ModelError: the model cannot be streamed.
    """
    model, prefix, blocks, weights = open_streamed(source, dtype)
    with open_driver(model, blocks, calibration_ids[:1]) as driver:
        texts = [_Text(driver, ids) for ids in (calibration_ids, held_out_ids)]
        for index, block in enumerate(blocks):
            if index > 0:
                weights.load_block(index)
            unfuse(block, fused_experts(block))
            yield from _samples_of(f"{prefix}.{index}", index, block, texts)
            for text in texts:
                text.advance(index)
            unload(block)


class _Text:
    """Batches of one text on their way through the blocks."""

    def __init__(self, driver: BlockDriver[Any], ids: Tensor) -> None:
        self._driver = driver
        recorded = [driver.record(batch) for batch in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))]
        self._hidden = [hidden for hidden, _ in recorded]
        self._batches = [batch for _, batch in recorded]

    def run(self, index: int, batch: int) -> Tensor:
        return self._driver.run_block(index, self._hidden[batch], self._batches[batch])

    def collect(
        self, index: int, groups: Sequence[Sequence[str]], linears: dict[str, nn.Module]
    ) -> list[GroupStatistics]:
        """Statistics of every group of layers that share an input."""
        collectors = [
            StatisticsCollector({layer: linears[layer] for layer in group}, StatisticsOptions()) for group in groups
        ]
        firsts = [linears[group[0]] for group in groups]
        for batch in range(len(self._batches)):
            for collector, inputs in zip(
                collectors, capture_inputs(firsts, partial(self.run, index, batch)), strict=True
            ):
                collector.add(inputs)
        return [collector.finish() for collector in collectors]

    def advance(self, index: int) -> None:
        for batch in range(len(self._batches)):
            self._hidden[batch] = self._driver.advance(index, self.run(index, batch), self._batches[batch])


def _samples_of(name: str, index: int, block: nn.Module, texts: Sequence[_Text]) -> Iterator[LayerSample]:
    linears = find_linears(block)
    groups = input_groups(block, linears, partial(texts[0].run, index, 0))
    calibration, held_out = (text.collect(index, groups, linears) for text in texts)
    for group, solved_with, measured_with in zip(groups, calibration, held_out, strict=True):
        for layer in group:
            yield LayerSample(
                name=f"{name}.{layer}",
                weight=weight_of(linears[layer]).detach(),
                calibration=_plain(solved_with),
                held_out=_plain(measured_with),
            )


def _plain(statistics: GroupStatistics) -> InputStatistics:
    (moments,) = next(iter(statistics.moments.values()))
    return InputStatistics(hessian=moments.hessian, num_tokens=statistics.num_tokens)
