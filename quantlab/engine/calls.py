"""How a model calls its decoder blocks: the calls, stand-ins for the blocks, and what drives blocks by them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.errors import ModelError

Batch = TypeVar("Batch")
Rest = tuple[Any, ...] | None
"""What a block returns besides the hidden states; None: it returns a bare tensor."""


@dataclass(frozen=True, eq=False)
class BlockArguments:
    """What a block is called with, without the hidden states.

    Attributes:
        args: what follows the hidden states.
        kwargs: by name.
        named: the hidden states are given by name, too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def call(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        """The answer of a block, or of its forward, to these arguments."""
        if self.named:
            return function(*self.args, hidden_states=hidden, **self.kwargs)
        return function(hidden, *self.args, **self.kwargs)


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block by the model.

    Attributes:
        index: of the block.
        hidden: (sequences, tokens, hidden_size), what enters the block.
        arguments: everything else.
    """

    index: int
    hidden: Tensor
    arguments: BlockArguments


Stub = Callable[[BlockCall], Any]


@contextmanager
def forward_replaced(blocks: Sequence[nn.Module], stub: Stub) -> Iterator[None]:
    """Inside, each block's forward is the stub; attributes that the model reads from its blocks stay."""
    for index, block in enumerate(blocks):
        block.forward = _as_forward(index, stub)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _as_forward(index: int, stub: Stub) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        named = "hidden_states" in kwargs
        hidden, *rest = (kwargs.pop("hidden_states"), *args) if named else args
        return stub(BlockCall(index, hidden, BlockArguments(tuple(rest), kwargs, named)))

    return forward


class BlockDriver(ABC, Generic[Batch]):
    """Drives the blocks of a model one at a time.

    For a batch of tokens: `record`, then for each block in order `run_block` as often as needed and `advance` with
    the output that the next block is to build on, then `finish` if the logits are wanted.

    Args:
        model: the skeleton; the weights outside its blocks are loaded in `record`, `advance` and `finish`.
        blocks: its decoder blocks; block k is loaded in `run_block(k)`.
        device: where the model computes; all tensors given and returned are there.

    Attributes:
        device: where the model computes.
        mode: name of the way of driving, for the record.
        replay_on_resume: the blocks hand each other more than hidden states, so that a new process which wants
            to go on at block k has to run the batch through blocks 0 to k - 1 first.
    """

    mode: ClassVar[str]
    replay_on_resume: bool

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._model = model
        self._blocks = blocks
        self.device = device

    def is_last(self, index: int) -> bool:
        """Whether block `index` is the one whose output the logits follow from."""
        return index == len(self._blocks) - 1

    @abstractmethod
    def record(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Batch]:
        """Run the model up to its first block.

        Args:
            input_ids: (sequences, tokens).
            attention_mask: (sequences, tokens), 1 for tokens and 0 for padding; None: no padding.

        Returns:
            What enters the first block, (sequences, tokens, hidden_size), and the batch for the other methods.

        Raises:
            ModelError: the model does not call its blocks in the way that the driver was chosen for.
        """

    @abstractmethod
    def run_block(self, index: int, hidden: Tensor, batch: Batch) -> Tensor:
        """The output of one loaded block, (sequences, tokens, hidden_size); may be repeated, the last time counts.

        Raises:
            ModelError: the block overwrites its input, so that it cannot be repeated.
        """

    @abstractmethod
    def advance(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """What enters the block after `index`, given the output of block `index`; after the last block, `output`."""

    @abstractmethod
    def finish(self, batch: Batch, output: Tensor) -> Tensor:
        """The logits that follow from the output of the last block: (sequences, tokens, vocabulary)."""

    def _call_block(self, index: int, hidden: Tensor, arguments: BlockArguments) -> tuple[Tensor, Rest]:
        version = _version(hidden)
        output = arguments.call(self._blocks[index], hidden)
        if _version(hidden) != version:
            raise ModelError(f"{type(self._model).__name__}: block {index} overwrites its input")
        return split_output(output)


def split_output(output: Any) -> tuple[Tensor, Rest]:
    """The parts of the output of a block."""
    return (output[0], tuple(output[1:])) if isinstance(output, tuple | list) else (output, None)


def join_output(hidden: Tensor, rest: Rest) -> Any:
    """The output of a block from its parts."""
    return hidden if rest is None else (hidden, *rest)


def trace_calls(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    rest: Rest,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    to_the_end: bool,
) -> tuple[tuple[BlockCall, ...], int | None]:
    """Run the model with blocks that pass their hidden states through.

    Args:
        model: the skeleton.
        blocks: its decoder blocks.
        rest: what every block returns besides.
        input_ids: (sequences, tokens).
        attention_mask: (sequences, tokens) or None.
        to_the_end: whether to go on behind the last block, which would be for nothing but to see that no block is
            called again: the logits of a batch can be larger than everything else.

    Returns:
        The call of every block, and the first block that was not given the output of the block before; None
        if there is none.

    Raises:
        ModelError: the model does not call each block once, in order.
    """

    class AllCalled(Exception):
        """Leaves the forward pass in its last block."""

    calls: list[BlockCall] = []
    changed: list[int] = []
    returned = [(torch.empty(0), 0)]

    def stub(call: BlockCall) -> Any:
        if calls and not _same(call.hidden, *returned[-1]):
            changed.append(call.index)
        calls.append(call)
        returned[-1] = (call.hidden, _version(call.hidden))
        if len(calls) == len(blocks) and not to_the_end:
            raise AllCalled
        return join_output(call.hidden, rest)

    with suppress(AllCalled), forward_replaced(blocks, stub):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    order = [call.index for call in calls]
    if order != list(range(len(blocks))):
        raise ModelError(
            f"{type(model).__name__}: the forward pass calls its {len(blocks)} blocks in the order {order}; only "
            "models that call each block once, one after the other, can be streamed"
        )
    return tuple(calls), changed[0] if changed else None


def _same(entering: Tensor, returned: Tensor, version: int) -> bool:
    """Whether a tensor is the returned one, or a view of all of it, and was not written to since."""
    alias = entering is returned or (
        entering.data_ptr() == returned.data_ptr()
        and entering.dtype == returned.dtype
        and entering.shape == returned.shape
        and entering.stride() == returned.stride()
    )
    return alias and _version(entering) == version


def _version(tensor: Tensor) -> int:
    """Counts the writes in place to a tensor; tensors made in inference mode have no such counter."""
    return 0 if tensor.is_inference() else tensor._version
