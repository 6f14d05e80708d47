"""The layer-streaming loop: for each decoder block load, calibrate, solve, propagate, write, unload.

Statistics come from the quantized prefix: the inputs of a layer are computed by the quantized blocks before it
and the layers already quantized inside its own block, so that later layers can make up for earlier errors.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.api import InputStatistics
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.drive import BlockDriver, RecordedBatch, deduplicate
from quantlab.engine.linears import (
    HessianAccumulator,
    find_linears,
    group_by_input,
    require_quantizable,
    weight_of,
)
from quantlab.engine.solve import LayerResult, SolveOptions, solve_layers
from quantlab.progress import Progress
from quantlab.runtime import ModuleSpec
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamResult:
    """What the engine leaves behind besides the written shards.

    Attributes:
        layers: one entry per quantized layer, in the order of solving.
        modules: how each quantized module is stored, by its name in the model.
        check_ids: (sequences, tokens) of calibration text.
        check_logits: what the quantized model answers to them; a reloaded checkpoint must answer the same.
    """

    layers: tuple[LayerResult, ...]
    modules: dict[str, ModuleSpec]
    check_ids: Tensor
    check_logits: Tensor


@torch.no_grad()
def quantize_model(
    source: Path,
    writer: CheckpointWriter,
    options: SolveOptions,
    calibration_ids: Tensor,
    dtype: torch.dtype,
    progress: Progress,
) -> StreamResult:
    """Quantize every linear layer inside the decoder blocks of a causal LM.

    Embeddings, norms and the output head keep their weights.

    Args:
        source: local model folder with safetensors weights.
        writer: receives one shard per block and one for the rest.
        options: the method and its budget.
        calibration_ids: (samples, tokens) token ids.
        dtype: what the model computes in.
        progress: is told about every finished layer.

    Raises:
        ModelError: the model cannot be streamed.
        PluginError: the method broke its contract.
        QualityError: the method departed from its options, and may not.
        NumericalError: a layer cannot be solved.
    """
    config = read_config(source)
    model = build_skeleton(config, dtype)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        require_quantizable(block, f"{prefix}.{index}")
    weights = WeightSource(source, model, dtype)
    storage_dtype = _narrower(dtype, getattr(config, "dtype", None))

    weights.load_rest()
    weights.load_block(0)
    writer.add_shard("rest", _stored(_tensors_outside(model, prefix), storage_dtype))
    batches = calibration_ids.split(max(1, TOKENS_PER_BATCH // calibration_ids.shape[1]))
    driver = BlockDriver(model, list(blocks), batches[0][:1])
    recorded = _record(driver, batches)
    hidden = [batch.hidden for batch in recorded]

    progress.begin("quantizing", sum(len(find_linears(block)) for block in blocks), "layers")
    results: list[LayerResult] = []
    modules: dict[str, ModuleSpec] = {}
    for index, block in enumerate(blocks):
        if index > 0:
            weights.load_block(index)
        name = f"{prefix}.{index}"
        original = find_linears(block)
        groups = group_by_input(original, lambda: driver.run_block(index, hidden[0], recorded[0]))  # noqa: B023
        for group in groups:
            statistics = _collect(driver, index, original[group[0]], hidden, recorded)
            layers = {f"{name}.{layer}": original[layer] for layer in group}
            for layer, (module, result) in solve_layers(layers, statistics, options).items():
                model.set_submodule(layer, module)
                modules[layer] = module.spec
                results.append(result)
                progress.advance(detail=_describe(result, index, len(blocks)))
        hidden = [driver.run_block(index, h, batch) for h, batch in zip(hidden, recorded, strict=True)]
        tensors = {f"{name}.{key}": tensor for key, tensor in block.state_dict().items()}
        writer.add_shard(f"block-{index:05d}", _stored(tensors, storage_dtype))
        for layer, linear in original.items():
            block.set_submodule(layer, linear)
        unload(block)
    return StreamResult(
        layers=tuple(results),
        modules=modules,
        check_ids=recorded[0].input_ids,
        check_logits=driver.finish(recorded[0], hidden[0]),
    )


def _record(driver: BlockDriver, batches: tuple[Tensor, ...]) -> list[RecordedBatch]:
    first = driver.record(batches[0])
    return [first, *(deduplicate(driver.record(batch), first) for batch in batches[1:])]


class _Captured(Exception):
    """Leaves a forward pass as soon as the input of interest has been seen."""


def _collect(
    driver: BlockDriver, index: int, linear: nn.Module, hidden: list[Tensor], recorded: list[RecordedBatch]
) -> InputStatistics:
    """Statistics of the input of one layer over all batches, in fixed order."""
    accumulator = HessianAccumulator(weight_of(linear).shape[1], hidden[0].device)

    def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        accumulator.add(args[0])
        raise _Captured

    handle = linear.register_forward_pre_hook(capture)
    try:
        for states, batch in zip(hidden, recorded, strict=True):
            with suppress(_Captured):
                driver.run_block(index, states, batch)
    finally:
        handle.remove()
    return InputStatistics(hessian=accumulator.mean(), num_tokens=accumulator.num_tokens)


def _tensors_outside(model: PreTrainedModel, prefix: str) -> dict[str, Tensor]:
    """State outside the blocks; of tied weights only the one that the others are tied to."""
    state = model.state_dict()
    tied = {
        target
        for target, source in model.all_tied_weights_keys.items()
        if state[target].data_ptr() == state[source].data_ptr()
    }
    return {name: tensor for name, tensor in state.items() if name not in tied and not name.startswith(prefix + ".")}


def _narrower(compute: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """The dtype for weights that are kept: that of the source if the computation did not narrow it."""
    return stored if stored is not None and stored.itemsize < compute.itemsize else compute


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Kept weights in the narrower dtype where that loses nothing; everything else as it is."""

    def narrow(tensor: Tensor) -> Tensor:
        narrowed = tensor.to(dtype) if tensor.is_floating_point() and tensor.itemsize > dtype.itemsize else tensor
        return narrowed if torch.equal(narrowed.to(tensor.dtype), tensor) else tensor

    return {name: narrow(tensor) for name, tensor in tensors.items()}


def _describe(result: LayerResult, index: int, num_blocks: int) -> str:
    layer = result.name.partition(f".{index}.")[2]
    return (
        f"block {index + 1}/{num_blocks}  {layer}  loss {result.relative_loss:.2e} (RTN {result.rtn_relative_loss:.2e})"
    )
