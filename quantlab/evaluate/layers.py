"""How far every layer of a quantized model is from its float layer, on text.

With W and Ŵ the weights of a layer, x what enters it in the float model and x̂ what enters it in the quantized model,
each error is a share of |W x|², summed over the tokens of a text that reach the layer:

    error         |(W - Ŵ) x|²      of the layer alone, with the inputs of the float model
    rtn_error     the same for W rounded to nearest with the same budget
    accumulated   |W x - Ŵ x̂|²     with the errors of all layers before it; None for experts, whose tokens are chosen
                                    by routers that the two models need not agree about

Errors are measured as they occur in the outputs, without Hessians, and both models have one block in memory at a time.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain as chained
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.api import CodebookSpec
from quantlab.engine.chain import Chain
from quantlab.engine.drive import open_driver
from quantlab.engine.forward import CheckpointParts, FloatParts, ModelParts
from quantlab.engine.linears import find_linears, input_groups, weight_of
from quantlab.engine.profile import Profile
from quantlab.engine.statistics import capture_inputs
from quantlab.evaluate.perplexity import TOKENS_PER_BATCH
from quantlab.experts import expert_groups, fused_experts, unfuse
from quantlab.progress import Progress
from quantlab.runtime import LutLinear
from quantlab.skeleton import find_blocks
from quantlab.solvers.grid import round_to_nearest

ROWS_PER_PIECE = 1024


@torch.no_grad()
def measure_layers(
    float_parts: FloatParts,
    quantized_parts: CheckpointParts,
    texts: Mapping[str, Tensor],
    work: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure every quantized layer on several texts.

    Args:
        float_parts: the float model.
        quantized_parts: the checkpoint made from it.
        texts: token ids, (sequences, tokens) each, by name.
        work: folder for hidden states; what is put there is removed.
        progress: is told about every block.

    Returns:
        One entry per layer in the order of the calls: its "name", "bits" and "group_size", and by text "error",
        "rtn_error" and "accumulated". An error is None if no token reaches the layer.

    Raises:
        ModelError: a model cannot be streamed.
        NumericalError: a block's output is not finite.
    """
    progress.begin("layer errors", len(float_parts.blocks), "blocks")
    prefix = find_blocks(float_parts.model)[0]
    batches = {name: ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1])) for name, ids in texts.items()}
    results = []
    with ExitStack() as opened:
        models = [
            _Streamed(parts, batches, work / name, opened)
            for name, parts in (("float", float_parts), ("quantized", quantized_parts))
        ]
        for index in range(len(float_parts.blocks)):
            if index > 0:
                for model in models:
                    model.load(index)
            for layer, values in _measure_block(index, *models).items():
                results.append({"name": f"{prefix}.{index}.{layer}", **values})
            for model in models:
                model.leave(index)
            progress.advance()
    return results


class _Streamed:
    """One model, and every text on its way through it."""

    def __init__(
        self, parts: ModelParts, batches: Mapping[str, Sequence[Tensor]], work: Path, opened: ExitStack
    ) -> None:
        self._parts = parts
        parts.load_rest()
        self.load(0)
        first = next(iter(batches.values()))[0][:1]
        driver = opened.enter_context(open_driver(parts.model, parts.blocks, first, parts.device))
        self.chains: dict[str, Chain] = {}
        for name, own in batches.items():
            self.chains[name] = Chain(driver, own, work / name, in_memory=False, profile=Profile())
            opened.callback(self.chains[name].remove)

    def block(self, index: int) -> nn.Module:
        return self._parts.blocks[index]

    def load(self, index: int) -> None:
        self._parts.load_block(index)
        unfuse(self.block(index), fused_experts(self.block(index)))

    def leave(self, index: int) -> None:
        if index < len(self._parts.blocks) - 1:
            for chain in self.chains.values():
                chain.propagate(index, f"block {index}").remove()
        self._parts.unload_block(index)


def _measure_block(index: int, reference: _Streamed, quantized: _Streamed) -> dict[str, dict[str, Any]]:
    block, replaced = reference.block(index), quantized.block(index)
    layers = {name: module for name, module in replaced.named_modules() if isinstance(module, LutLinear)}
    linears = find_linears(block)
    first = next(iter(reference.chains.values()))
    groups = [
        chosen
        for group in input_groups(block, linears, partial(first.run, index, 0))
        if (chosen := [layer for layer in group if layer in layers])
    ]
    if not groups:
        return {}
    routed = set(chained.from_iterable(expert_groups(block)))
    values: dict[str, dict[str, Any]] = {
        layer: {"bits": layers[layer].spec.bits, "group_size": layers[layer].spec.group_size}
        for layer in chained.from_iterable(groups)
    }
    for text, chain in reference.chains.items():
        sums = {layer: _Sums(linears[layer], layers[layer]) for layer in values}
        for batch in range(len(chain)):
            inputs = capture_inputs([linears[group[0]] for group in groups], partial(chain.run, index, batch))
            behind = capture_inputs(
                [layers[group[0]] for group in groups], partial(quantized.chains[text].run, index, batch)
            )
            for group, own, other in zip(groups, inputs, behind, strict=True):
                for layer in group:
                    if own is not None:
                        sums[layer].add(own, None if layer in routed else other)
        for layer, total in sums.items():
            values[layer][text] = total.errors()
    return values


class _Sums:
    """Sums over tokens of the squares of one layer's outputs and of their errors."""

    def __init__(self, linear: nn.Module, layer: LutLinear) -> None:
        self._linear, self._layer = linear, layer
        self._spec = CodebookSpec(bits=layer.spec.bits, group_size=layer.spec.group_size)
        self._scale = 0.0
        self._sums: dict[str, float | None] = {"error": 0.0, "rtn_error": 0.0, "accumulated": 0.0}

    def add(self, inputs: Tensor, behind: Tensor | None) -> None:
        """Add a batch: what enters the layer in the float and in the quantized model, (..., in_features)."""
        stored, weight = self._layer.dequantize(), weight_of(self._linear)
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        behind = None if behind is None else behind.reshape(inputs.shape).float()
        for start in range(0, len(weight), ROWS_PER_PIECE):
            rows = slice(start, start + ROWS_PER_PIECE)
            own, replaced = weight[rows].float(), stored[rows].float()
            outputs = inputs @ own.T
            self._scale += _energy(outputs)
            self._add("error", inputs @ (own - replaced).T)
            self._add("rtn_error", inputs @ (own - round_to_nearest(own, self._spec).dequantize()).T)
            self._add("accumulated", None if behind is None else outputs.sub_(behind @ replaced.T))

    def errors(self) -> dict[str, float | None]:
        """The errors as shares of the outputs."""
        return {
            name: None if total is None or not self._scale else total / self._scale
            for name, total in self._sums.items()
        }

    def _add(self, name: str, error: Tensor | None) -> None:
        total = self._sums[name]
        self._sums[name] = None if error is None or total is None else total + _energy(error)


def _energy(outputs: Tensor) -> float:
    return outputs.square().sum(dtype=torch.float64).item()
