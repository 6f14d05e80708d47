"""Driving blocks by forwards that pause inside every block call.

Each batch has a thread in which the model's own forward runs up to its next block call and waits there. Whatever
the model does between two blocks happens in that forward, with the output that it is given, so this is exact even
where the model changes the hidden states between blocks. At any time at most one thread runs: control is handed
over and back, so that the order of all computations is fixed.

A paused forward holds the hidden states of its batch in memory, and can only go on, not start in the middle.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.engine.calls import BlockCall, BlockDriver, Rest, forward_replaced, join_output
from quantlab.errors import ModelError


class SuspendingDriver(BlockDriver["PausedForward"]):
    """Keeps one paused forward per batch until it is finished or the driver is closed."""

    mode: ClassVar[str] = "suspend"
    replay_on_resume = True

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(model, blocks, device)
        self._paused: list[PausedForward] = []

    def record(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, "PausedForward"]:
        """Start the forward of a batch; it pauses in its first block."""

        def forward() -> Tensor:
            output = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            logits: Tensor = output.logits
            return logits

        paused = PausedForward(self._blocks, forward)
        self._paused.append(paused)
        return self._require_call(0, paused.start()).hidden, paused

    def run_block(self, index: int, hidden: Tensor, batch: "PausedForward") -> Tensor:
        """The output for the arguments of the call that the forward waits in."""
        arguments = self._require_call(index, batch.waiting_at).arguments
        output, batch.rest = self._call_block(index, hidden, arguments)
        return output

    def advance(self, index: int, output: Tensor, batch: "PausedForward") -> Tensor:
        """Let the forward go on to its next block; the last block is left by `finish`."""
        self._require_call(index, batch.waiting_at)
        if self.is_last(index):
            return output
        return self._require_call(index + 1, batch.resume(join_output(output, batch.rest))).hidden

    def finish(self, batch: "PausedForward", output: Tensor) -> Tensor:
        """Let the forward go on to its end, which is possible once."""
        self._require_call(len(self._blocks) - 1, batch.waiting_at)
        logits = batch.resume(join_output(output, batch.rest))
        if isinstance(logits, BlockCall):
            raise self._unexpected(f"block {logits.index} is called after the last one")
        return logits

    def close(self) -> None:
        """End the forwards that are still paused."""
        for paused in self._paused:
            paused.close()
        self._paused.clear()

    def _require_call(self, index: int, event: BlockCall | Tensor | None) -> BlockCall:
        if not isinstance(event, BlockCall) or event.index != index:
            where = f"is in block {event.index}" if isinstance(event, BlockCall) else "has ended"
            raise self._unexpected(f"the forward pass {where} where block {index} was expected")
        return event

    def _unexpected(self, what: str) -> ModelError:
        return ModelError(f"{type(self._model).__name__}: {what}; its blocks cannot be driven one at a time")


class _Abandoned(BaseException):
    """Unwinds a paused forward that is not going on."""


class PausedForward:
    """A forward pass on a thread of its own, which waits inside every block call.

    Args:
        blocks: the blocks in which it waits; they are their own selves whenever it does.
        forward: computes the logits, with the gradient and inference modes of the thread that creates this object.

    Attributes:
        waiting_at: the block call in which the forward waits; None before the first and after the last.
        rest: what that block returned besides the hidden states, when it was last run.
    """

    def __init__(self, blocks: Sequence[nn.Module], forward: Callable[[], Tensor]) -> None:
        self.waiting_at: BlockCall | None = None
        self.rest: Rest = None
        self._blocks = blocks
        self._forward = forward
        self._modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._events: SimpleQueue[BlockCall | Tensor | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="paused forward", daemon=True)

    def start(self) -> BlockCall | Tensor:
        """Run to the first block call, or to the logits if there is none; errors of the forward are raised here."""
        return self._let_run(self._thread.start)

    def resume(self, answer: Any) -> BlockCall | Tensor:
        """Let the block call that the forward waits in return `answer`, and run to the next one or to the logits."""
        return self._let_run(lambda: self._answers.put(answer))

    def close(self) -> None:
        """End the forward without going on, and its thread with it."""
        if self._thread.is_alive():
            self._answers.put(_Abandoned())
        self._thread.join()

    def _let_run(self, go: Callable[[], None]) -> BlockCall | Tensor:
        with forward_replaced(self._blocks, self._pause):
            go()
            try:
                event = self._events.get()
            except BaseException:  # Ctrl-C: leave no thread running beside the caller
                self._events.get()
                raise
        if isinstance(event, BlockCall):
            self.waiting_at = event
            return event
        self.waiting_at = None
        self._thread.join()
        if isinstance(event, BaseException):
            raise event
        return event

    def _run(self) -> None:
        gradients, inference = self._modes
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                event: Tensor | BaseException = self._forward()
        except BaseException as error:  # handed to the thread that waits
            event = error
        self._events.put(event)

    def _pause(self, call: BlockCall) -> Any:
        self._events.put(call)
        answer = self._answers.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer
