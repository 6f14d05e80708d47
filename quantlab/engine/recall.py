"""Answers of the parts of a block that are not computed again in every pass over the batches.

A block runs once for each group of its layers, and once more to hand on its output. As soon as all layers inside one of
its direct parts (the attention, say) are solved, that part answers the same in every pass that follows: the first of
them keeps the answers, the others take them over. They are the very tensors, so that nothing changes but the time.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

SIZE_LIMIT = 2
"""A part whose answers exceed the hidden states by this factor (attention weights, say) is run every time."""


class Recall:
    """What the parts of one block answered, by part and batch.

    Args:
        block: about to be quantized.
        layers: names in the block of the layers that are to be solved.
    """

    def __init__(self, block: nn.Module, layers: Collection[str]) -> None:
        self._parts = dict(block.named_children())
        inside = {name: {layer for layer in layers if layer.startswith(f"{name}.")} for name in self._parts}
        self._unsolved = {name: within for name, within in inside.items() if within}
        self._kept: dict[tuple[str, int], tuple[Any, list[int]]] = {}
        self._is_last_pass = False

    def note_solved(self, layer: str) -> None:
        """A layer has its final form."""
        for within in self._unsolved.values():
            within.discard(layer)

    def begin_last_pass(self) -> None:
        """From now on answers are given away, and no more are kept."""
        self._is_last_pass = True

    @contextmanager
    def of_batch(self, batch: int, hidden: Tensor) -> Iterator[None]:
        """Inside, parts whose layers are all solved answer as they did before to the same batch.

        Args:
            batch: its number.
            hidden: (sequences, tokens, hidden_size), what enters the block.
        """
        solved = {name: self._parts[name] for name, within in self._unsolved.items() if not within}
        for name, part in solved.items():
            part.forward = self._recalling((name, batch), part.forward, SIZE_LIMIT * hidden.nbytes)
        try:
            yield
        finally:
            for part in solved.values():
                del part.forward

    def _recalling(self, place: tuple[str, int], forward: Callable[..., Any], limit: int) -> Callable[..., Any]:
        kept = self._kept.pop(place, None) if self._is_last_pass else self._kept.get(place)
        may_keep = kept is None and not self._is_last_pass
        calls = 0

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1  # a part that is called twice has two answers, of which the first is kept
            if calls == 1 and kept is not None and _versions(kept[0]) == kept[1]:
                return kept[0]
            output = forward(*args, **kwargs)
            if calls == 1 and may_keep and 0 < _bytes(output) <= limit:
                self._kept[place] = (output, _versions(output))
            return output

        return answer


def _versions(output: Any) -> list[int]:
    """Counts the writes in place: what the block wrote to is no answer of the part any more."""
    return [item._version for item in _items(output) if item is not None]


def _bytes(output: Any) -> int:
    """Of the tensors of an answer; 0 if there is anything else in it, or writes to them are not counted."""
    countable = all(item is None or (isinstance(item, Tensor) and not item.is_inference()) for item in _items(output))
    return sum(item.nbytes for item in _items(output) if item is not None) if countable else 0


def _items(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
