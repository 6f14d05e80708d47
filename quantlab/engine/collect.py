"""One pass of some calibration batches through one block, to collect what enters its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from quantlab.engine.activations import Activations
from quantlab.engine.chain import Chain
from quantlab.engine.profile import Profile
from quantlab.engine.statistics import Gradients, StatisticsCollector, StatisticsOptions, capture_inputs
from quantlab.experts import all_tokens_for

Group = list[str]
"""Layers of a block that share their input, by their name in the block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A loaded block, and batches before it.

    Attributes:
        index: of the block.
        name: of the block in the model.
        block: loaded, its experts unfused.
        originals: its linear layers, as `find_linears` names them before anything is replaced.
        statistics: what is collected.
        gradients: of the block's layers, if `statistics.gradients`.
        quantized: the batches behind the blocks quantized so far.
        float_chain: the batches in the float model, if `statistics.float_inputs`.
        profile: is told where the time goes.
    """

    index: int
    name: str
    block: nn.Module
    originals: Mapping[str, nn.Module]
    statistics: StatisticsOptions
    gradients: Gradients | None
    quantized: Chain
    float_chain: Chain | None
    profile: Profile

    def full(self, layer: str) -> str:
        """The name in the model of a layer of the block."""
        return f"{self.name}.{layer}"


def collect_batches(
    place: Place, wave: Sequence[Group], all_tokens: Sequence[str], batches: range, first_token: int
) -> list[StatisticsCollector]:
    """Collect the inputs of every group in one pass over some batches, in their order.

    Args:
        place: the block.
        wave: groups whose layers do not see each other.
        all_tokens: layers of experts that are to hear all tokens of their mixture.
        batches: of the chains at this place.
        first_token: number of the first token of the first batch in the calibration set.
    """
    collectors = [
        StatisticsCollector(
            {place.full(layer): place.originals[layer] for layer in group},
            place.statistics,
            place.gradients,
            first_token=first_token,
        )
        for group in wave
    ]
    linears = [place.originals[group[0]] for group in wave]
    with all_tokens_for(place.block, all_tokens):
        for batch in batches:
            quantized: list[Tensor | None] = [None] * len(wave)
            float_inputs = quantized
            if place.statistics.quantized_inputs:
                quantized = capture_inputs(linears, partial(place.quantized.run, place.index, batch))
            if place.float_chain is not None:
                with layers_in_place(place.block, place.originals):
                    float_inputs = capture_inputs(linears, partial(place.float_chain.run, place.index, batch))
            with place.profile.timed("statistics"):
                for collector, inputs, reference in zip(collectors, quantized, float_inputs, strict=True):
                    collector.add(inputs, reference)
    return collectors


def propagate_chains(place: Place) -> list[Activations]:
    """Take all batches at a place through the block, in both models if there is a float chain.

    Returns:
        The hidden states before the block, by chain.
    """
    passed = [place.quantized.propagate(place.index, place.name)]
    if place.float_chain is not None:
        with layers_in_place(place.block, place.originals):
            passed.append(place.float_chain.propagate(place.index, place.name))
    return passed


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
