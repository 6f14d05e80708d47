"""Run the decoder blocks of a skeleton one at a time, exactly as the model's own forward would.

Recording: the model's forward runs once per batch with every block replaced by a stub that passes its hidden
states through and keeps the other arguments it was called with (masks, rotary tables, caches, per-layer
inputs). Each block is later called with *its own* recorded arguments, which is exact for architectures that
give different blocks different masks or rotary tables. It is not exact where the model changes the hidden
states between two blocks; that is detected and refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.errors import ModelError


@dataclass(frozen=True, eq=False)
class BlockArguments:
    """What a block is called with, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """One batch at the door of the first block.

    Attributes:
        input_ids: (sequences, tokens).
        hidden: (sequences, tokens, hidden_size), what enters the first block.
        arguments: one entry per block.
    """

    input_ids: Tensor
    hidden: Tensor
    arguments: tuple[BlockArguments, ...]


class BlockDriver:
    """Drives the blocks of a model whose weights outside the blocks, and in the first block, are loaded.

    Args:
        model: the skeleton.
        blocks: its decoder blocks.
        input_ids: a small batch, (sequences, tokens), on which the first block shows what blocks return.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], input_ids: Tensor) -> None:
        self._model = model
        self._blocks = blocks
        self._wrap_output = self._learn_output_type(input_ids)

    def record(self, input_ids: Tensor) -> RecordedBatch:
        """Run the model up to its first block and note what every block will be called with.

        Raises:
            ModelError: the model changes hidden states between blocks, or does not call each block once.
        """
        calls: list[tuple[Tensor, BlockArguments]] = []

        def stub(hidden: Tensor, arguments: BlockArguments) -> Any:
            if calls and hidden is not calls[-1][0]:
                raise ModelError(
                    f"{type(self._model).__name__}: the model changes the hidden states between blocks "
                    f"{len(calls) - 1} and {len(calls)}, so its blocks cannot be driven one at a time"
                )
            calls.append((hidden, arguments))
            return self._wrap_output(hidden)

        with _forward_replaced(self._blocks, [stub] * len(self._blocks)):
            self._model(input_ids=input_ids, use_cache=False)
        if len(calls) != len(self._blocks):
            raise ModelError(
                f"{type(self._model).__name__}: the forward pass calls its {len(self._blocks)} blocks "
                f"{len(calls)} times; only models that call each block once can be streamed"
            )
        return RecordedBatch(input_ids, calls[0][0], tuple(arguments for _, arguments in calls))

    def run_block(self, index: int, hidden: Tensor, batch: RecordedBatch) -> Tensor:
        """The output of one loaded block: (sequences, tokens, hidden_size)."""
        arguments = batch.arguments[index]
        output = self._blocks[index](hidden, *arguments.args, **arguments.kwargs)
        hidden_out: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_out

    def finish(self, batch: RecordedBatch, hidden: Tensor) -> Tensor:
        """The logits that follow from the output of the last block: (sequences, tokens, vocabulary)."""
        stubs: list[Stub] = [lambda incoming, _: self._wrap_output(incoming)] * (len(self._blocks) - 1)
        stubs.append(lambda _, __: self._wrap_output(hidden))
        with _forward_replaced(self._blocks, stubs):
            logits: Tensor = self._model(input_ids=batch.input_ids, use_cache=False).logits
        return logits

    def _learn_output_type(self, input_ids: Tensor) -> Callable[[Tensor], Any]:
        """How a stub must wrap hidden states to look like a block's output.

        Annotations are no guide (several models declare a tuple and return a tensor), so the first block runs.
        """

        class Learned(Exception):
            """Leaves the forward pass as soon as the first block has returned."""

        first = self._blocks[0]
        outputs: list[Any] = []

        def run_once(hidden: Tensor, arguments: BlockArguments) -> Any:
            outputs.append(type(first).forward(first, hidden, *arguments.args, **arguments.kwargs))
            raise Learned

        with suppress(Learned), _forward_replaced([first], [run_once]):
            self._model(input_ids=input_ids, use_cache=False)
        if isinstance(outputs[0], tuple):
            padding = (None,) * (len(outputs[0]) - 1)
            return lambda hidden: (hidden, *padding)
        return lambda hidden: hidden


Stub = Callable[[Tensor, BlockArguments], Any]


@contextmanager
def _forward_replaced(blocks: Sequence[nn.Module], stubs: Sequence[Stub]) -> Iterator[None]:
    """Inside, each block's forward is its stub; attributes that the model reads from its blocks stay."""
    for block, stub in zip(blocks, stubs, strict=True):
        block.forward = _as_forward(stub)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _as_forward(stub: Stub) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        return stub(hidden, BlockArguments(tuple(rest), kwargs))

    return forward


def deduplicate(batch: RecordedBatch, reference: RecordedBatch) -> RecordedBatch:
    """The same batch, sharing with `reference` every argument tensor that has equal content.

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

    arguments = tuple(
        BlockArguments(
            share(mine.args, theirs.args),
            {name: share(value, theirs.kwargs.get(name)) for name, value in mine.kwargs.items()},
        )
        for mine, theirs in zip(batch.arguments, reference.arguments, strict=True)
    )
    return RecordedBatch(batch.input_ids, batch.hidden, arguments)
