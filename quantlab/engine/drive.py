"""Run the decoder blocks of a skeleton one at a time, exactly as the model's own forward would.

A probe on a small batch decides how: a model that hands the output of each block unchanged to the next one, and
nothing else that a block returned, is driven by recorded arguments (`quantlab.engine.record`), any other by paused
forwards (`quantlab.engine.suspend`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.engine.calls import (
    BlockArguments,
    BlockCall,
    BlockDriver,
    Rest,
    forward_replaced,
    split_output,
    trace_calls,
)
from quantlab.engine.record import RecordingDriver
from quantlab.engine.suspend import SuspendingDriver
from quantlab.errors import ModelError
from quantlab.skeleton import CPU


@contextmanager
def open_driver(
    model: PreTrainedModel, blocks: Sequence[nn.Module], input_ids: Tensor, device: torch.device = CPU
) -> Iterator[BlockDriver[Any]]:
    """Choose how to drive the blocks of a model; on leaving, forwards that are still paused are ended.

    Args:
        model: the skeleton, with the weights outside the blocks and in the first block loaded.
        blocks: its decoder blocks.
        input_ids: a small batch to probe with, (sequences, tokens).
        device: where the model computes.

    Raises:
        ModelError: the model does not call each block once, in order, or changes its own weights.
    """
    input_ids = input_ids.to(device)
    versions = [parameter._version for parameter in model.parameters()]
    rest = _returned_besides(model, blocks[0], input_ids)
    calls, changed = trace_calls(model, blocks, rest, input_ids, None, to_the_end=True)
    if versions != [parameter._version for parameter in model.parameters()]:
        raise ModelError(
            f"{type(model).__name__}: the forward pass changes the weights of the model, so its blocks can neither be "
            "loaded nor quantized one at a time"
        )
    arguments = [call.arguments for call in calls]
    if changed is None and not _mentioned(rest, arguments):
        blank = None if rest is None else (None,) * len(rest)
        yield RecordingDriver(model, blocks, device, blank, replay_on_resume=any(map(_has_mutable, arguments)))
        return
    driver = SuspendingDriver(model, blocks, device)
    try:
        yield driver
    finally:
        driver.close()


def _returned_besides(model: PreTrainedModel, first: nn.Module, input_ids: Tensor) -> Rest:
    """What the first block returns besides the hidden states.

    Annotations are no guide (several models declare a tuple and return a tensor), so the block runs.
    """

    class Learned(Exception):
        """Leaves the forward pass as soon as the first block has returned."""

    outputs: list[Any] = []

    def run_once(call: BlockCall) -> Any:
        outputs.append(call.arguments.call(partial(type(first).forward, first), call.hidden))
        raise Learned

    with suppress(Learned), forward_replaced([first], run_once):
        model(input_ids=input_ids, use_cache=False)
    if not outputs:
        raise ModelError(f"{type(model).__name__}: the forward pass does not call its decoder blocks")
    if not isinstance(outputs[0], Tensor) and type(outputs[0]) not in (tuple, list):
        raise ModelError(
            f"{type(model).__name__}: its blocks return {type(outputs[0]).__name__}, not hidden states; they cannot be "
            "driven one at a time"
        )
    return split_output(outputs[0])[1]


def _mentioned(rest: Rest, arguments: Sequence[BlockArguments]) -> bool:
    """Whether a block is called with something that the block before returned besides the hidden states."""
    handed_on = [item for item in rest or () if item is not None]
    return any(
        value is item for call in arguments for value in (*call.args, *call.kwargs.values()) for item in handed_on
    )


def _has_mutable(arguments: BlockArguments) -> bool:
    """Whether a block can leave something in its arguments for a later block to find."""
    immutable = Tensor | bool | int | float | str | torch.dtype | torch.device

    def mutable(value: Any) -> bool:
        if isinstance(value, tuple):
            return any(map(mutable, value))
        return not (value is None or isinstance(value, immutable))

    return any(map(mutable, (*arguments.args, *arguments.kwargs.values())))
