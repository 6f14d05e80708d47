"""One backward pass of the float model over the calibration set, one decoder block in memory at a time.

A forward pass keeps what enters every block. Then the blocks are visited from the last to the first: each is loaded
alone, run again with autograd on, and given the gradients by its output, which turn into those by its input. On the
way `quantlab.engine.sensitivity` keeps what the statistics need. Weights take no part in autograd.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.checkpoint.atomic import one_at_a_time, replacing
from quantlab.checkpoint.serialize import write_safetensors
from quantlab.engine.calls import BlockDriver
from quantlab.engine.drive import open_driver
from quantlab.engine.linears import find_linears
from quantlab.engine.sensitivity import LayerSensitivity, observed
from quantlab.engine.statistics import Gradients, StatisticsOptions
from quantlab.errors import ModelError, NumericalError, ResumableError
from quantlab.experts import fused_experts, unfuse
from quantlab.finite import all_finite
from quantlab.progress import Progress
from quantlab.skeleton import CPU, WeightSource, open_streamed, unload

LOGITS_PER_PIECE = 1 << 24  # whose softmax is taken in float32 at a time


class HiddenStates(Protocol):
    """Keeps the hidden states of every sequence at one place of the model."""

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep a tensor under a number."""
        ...

    def get(self, batch: int) -> Tensor:
        """The tensor under a number."""
        ...

    def remove(self) -> None:
        """Forget all tensors."""
        ...


@torch.no_grad()
def collect_gradients(
    source: Path,
    calibration_ids: Tensor,
    dtype: torch.dtype,
    options: StatisticsOptions,
    folder: Path,
    new_states: Callable[[str], HiddenStates],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    device: torch.device = CPU,
) -> float:
    """Run the backward pass of the float model and write what it says, one file per block.

    A folder in which an earlier call has written all files is left as it is.

    Args:
        source: local model folder with safetensors weights.
        calibration_ids: (sequences, tokens) token ids.
        dtype: what the model computes in.
        options: which gradients are needed.
        folder: where `read_gradients` will find them; created if it does not exist.
        new_states: makes an empty store from a name; there is one store per block.
        progress: is told about every block, twice.
        stop: asked after every block; a true answer ends the pass, which has to begin anew.
        device: where the model computes.

    Returns:
        The seconds that it took, in this call or in the earlier one.

    Raises:
        ModelError: the blocks of the model cannot be differentiated one at a time.
        NumericalError: a gradient is not finite.
        ResumableError: the pass was stopped.
    """
    complete = folder / "seconds.json"
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(complete):  # runs of a comparison share the folder
        if complete.is_file():
            earlier_s: float = json.loads(complete.read_text(encoding="utf-8"))
            return earlier_s
        started = time.monotonic()
        model, prefix, blocks, weights = open_streamed(source, dtype, device)
        calibration_ids = calibration_ids.to(device)
        with open_driver(model, blocks, calibration_ids[:1], device) as driver:
            _require_separate_blocks(model, driver)
            progress.begin("gradients", 2 * len(blocks), "blocks")
            work = _Pass(driver, weights, blocks, calibration_ids, options)
            states = work.forward(new_states, progress, stop)
            gradients = new_states("gradients")
            work.start(states.pop(), gradients)
            for index in reversed(range(len(blocks))):
                found = work.backward(index, states.pop(), gradients)
                named = {f"{prefix}.{index}.{key}": value for key, value in found.items()}
                write_safetensors(_file(folder, index), named)
                progress.advance(detail=f"block {index + 1}/{len(blocks)}  backward")
                _require_going_on(stop)
            gradients.remove()
        seconds = time.monotonic() - started
        with replacing(complete) as temporary:
            temporary.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def read_gradients(folder: Path, index: int, layers: Sequence[str]) -> Gradients:
    """What `collect_gradients` wrote about some layers of one block.

    Args:
        folder: where it was written.
        index: the number of the block.
        layers: full names.
    """
    with safe_open(_file(folder, index), framework="pt") as file:
        names = set(file.keys())

        def read(kind: str) -> dict[str, Tensor]:
            return {layer: file.get_tensor(f"{layer}.{kind}") for layer in layers if f"{layer}.{kind}" in names}

        return Gradients(fisher=read("fisher"), saliency=read("saliency"))


def _file(folder: Path, index: int) -> Path:
    return folder / f"gradients-{index:05d}.safetensors"


def _require_going_on(stop: Callable[[], bool]) -> None:
    if stop():
        raise ResumableError("stopped while collecting the gradients of the float model")


def _require_separate_blocks(model: PreTrainedModel, driver: BlockDriver[Any]) -> None:
    if driver.mode != "record" or driver.replay_on_resume:
        raise ModelError(
            f"{type(model).__name__}: its blocks hand each other more than hidden states, so that gradients cannot be "
            "passed back one block at a time; use saliency_groups: 0 and a method that needs no Fisher diagonal"
        )


class _Pass:
    """The stages of the pass over all sequences, each sequence a batch of its own."""

    def __init__(
        self,
        driver: BlockDriver[Any],
        weights: WeightSource,
        blocks: Sequence[nn.Module],
        calibration_ids: Tensor,
        options: StatisticsOptions,
    ) -> None:
        self._driver = driver
        self._weights = weights
        self._blocks = blocks
        self._ids = calibration_ids
        self._options = options
        self._batches: list[Any] = []

    def forward(
        self, new_states: Callable[[str], HiddenStates], progress: Progress, stop: Callable[[], bool]
    ) -> list[HiddenStates]:
        """What enters each block, and what leaves the last one; the first block is loaded already."""
        states = [new_states("block-00000")]
        for sequence, ids in enumerate(self._ids.split(1)):
            hidden, batch = self._driver.record(ids)
            states[0].put(sequence, hidden)
            self._batches.append(batch)
        for index, block in enumerate(self._blocks):
            if index > 0:
                self._weights.load_block(index)
            states.append(new_states(f"block-{index + 1:05d}"))
            for sequence, batch in enumerate(self._batches):
                states[-1].put(sequence, self._driver.run_block(index, states[-2].get(sequence), batch))
            unload(block)
            progress.advance(detail=f"block {index + 1}/{len(self._blocks)}  forward")
            _require_going_on(stop)
        return states

    def start(self, outputs: HiddenStates, gradients: HiddenStates) -> None:
        """Put the gradients of each sequence's summed loss by the output of the last block."""
        for sequence, batch in enumerate(self._batches):
            output = outputs.get(sequence).detach().requires_grad_()
            with torch.enable_grad():
                logits = self._driver.finish(batch, output)
            (gradient,) = torch.autograd.grad(logits, output, _gradient_by_logits(logits.detach(), batch.input_ids))
            gradients.put(sequence, gradient)
        outputs.remove()

    def backward(self, index: int, inputs: HiddenStates, gradients: HiddenStates) -> dict[str, Tensor]:
        """What is kept of one block, by layer; gradients by its output are replaced by those by its input."""
        block = self._blocks[index]
        self._weights.load_block(index)
        unfuse(block, fused_experts(block))
        linears = find_linears(block)
        found = {name: LayerSensitivity(name, linear, self._ids, self._options) for name, linear in linears.items()}
        for sequence, batch in enumerate(self._batches):
            hidden = inputs.get(sequence).detach().requires_grad_()
            with torch.enable_grad(), observed(linears, found):
                output = self._driver.run_block(index, hidden, batch)
                (gradient,) = torch.autograd.grad(output, hidden, gradients.get(sequence))
            if not all_finite(gradient):
                raise NumericalError(
                    f"the gradient by the input of block {index} contains NaN or infinity in sequence {sequence}; "
                    "try model.dtype: float32"
                )
            gradients.put(sequence, gradient)
        unload(block)
        inputs.remove()
        return {f"{name}.{kind}": value for name, layer in found.items() for kind, value in layer.finish().items()}


def _gradient_by_logits(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Of the summed cross-entropy of one sequence: softmax minus one at the next token, 0 for the last token.

    The sum, not the mean, is differentiated so that gradients of long sequences do not vanish in half precision.
    """
    gradient = torch.zeros_like(logits)
    targets = input_ids[0, 1:]
    for start in range(0, len(targets), max(1, LOGITS_PER_PIECE // logits.shape[-1])):
        piece = slice(start, min(len(targets), start + max(1, LOGITS_PER_PIECE // logits.shape[-1])))
        probabilities = logits[0, piece].float().softmax(dim=-1)
        probabilities[torch.arange(len(probabilities), device=targets.device), targets[piece]] -= 1
        gradient[0, piece] = probabilities.to(logits.dtype)
    return gradient
