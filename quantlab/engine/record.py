"""Driving blocks by recorded arguments.

The model's forward runs once per batch with every block replaced by a stub that passes its hidden states through
and keeps the other arguments it was called with (masks, rotary tables, per-layer inputs). Each block is later
called with *its own* recorded arguments, which is exact for architectures that give different blocks different
masks or rotary tables. It is not exact where the model changes the hidden states between two blocks; that is
detected, and such models are driven by `quantlab.engine.suspend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.engine.calls import (
    BlockArguments,
    BlockCall,
    BlockDriver,
    Rest,
    forward_replaced,
    join_output,
    trace_calls,
)
from quantlab.errors import ModelError


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """What the blocks are called with for one batch.

    Attributes:
        input_ids: (sequences, tokens).
        attention_mask: (sequences, tokens) or None.
        arguments: one entry per block.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    arguments: tuple[BlockArguments, ...]


class RecordingDriver(BlockDriver[RecordedBatch]):
    """Calls each block with the arguments that the model's own forward would have given it.

    Args:
        model: the skeleton.
        blocks: its decoder blocks.
        device: where the model computes.
        rest: a stand-in for what a block returns besides the hidden states.
        replay_on_resume: see `BlockDriver`.
    """

    mode: ClassVar[str] = "record"

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        device: torch.device,
        rest: Rest,
        replay_on_resume: bool,
    ) -> None:
        super().__init__(model, blocks, device)
        self._rest = rest
        self.replay_on_resume = replay_on_resume
        self._reference: tuple[BlockArguments, ...] | None = None

    def record(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, RecordedBatch]:
        """Note what every block is called with; tensors of equal content are shared with the first batch."""
        calls, changed = trace_calls(self._model, self._blocks, self._rest, input_ids, attention_mask, to_the_end=False)
        if changed is not None:
            raise ModelError(
                f"{type(self._model).__name__}: the model changes the hidden states between blocks {changed - 1} and "
                f"{changed} for a batch of shape {tuple(input_ids.shape)}, but did not when it was probed"
            )
        arguments = tuple(call.arguments for call in calls)
        if self._reference is None:
            self._reference = arguments
        else:
            arguments = share_arguments(arguments, self._reference)
        return calls[0].hidden, RecordedBatch(input_ids, attention_mask, arguments)

    def run_block(self, index: int, hidden: Tensor, batch: RecordedBatch) -> Tensor:
        """The output for the recorded arguments."""
        return self._call_block(index, hidden, batch.arguments[index])[0]

    def advance(self, index: int, output: Tensor, batch: RecordedBatch) -> Tensor:
        """The output itself: the model does nothing between blocks."""
        return output

    def finish(self, batch: RecordedBatch, output: Tensor) -> Tensor:
        """The logits of a forward in which only the last block is given a meaningful output."""

        def jump(call: BlockCall) -> Any:
            return join_output(output if self.is_last(call.index) else call.hidden, self._rest)

        with forward_replaced(self._blocks, jump):
            result = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits: Tensor = result.logits
        return logits


def share_arguments(
    arguments: Sequence[BlockArguments], reference: Sequence[BlockArguments]
) -> tuple[BlockArguments, ...]:
    """The same arguments, with every tensor of equal content replaced by that of the reference.

    Batches of equal shape mostly have equal masks and rotary tables; sharing them keeps one copy per run.
    """
    known: dict[int, Tensor] = {}

    def share(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                same = isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(value, other)
                known[id(value)] = other if same else value
            return known[id(value)]
        if type(value) is tuple and isinstance(other, tuple) and len(value) == len(other):
            return tuple(share(mine, theirs) for mine, theirs in zip(value, other, strict=True))
        return value

    return tuple(
        BlockArguments(
            share(mine.args, theirs.args),
            {name: share(value, theirs.kwargs.get(name)) for name, value in mine.kwargs.items()},
            mine.named,
        )
        for mine, theirs in zip(arguments, reference, strict=True)
    )
