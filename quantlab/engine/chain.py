"""The calibration batches on their way through the blocks of one model, the quantized or the float one."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from quantlab.engine.activations import Activations
from quantlab.engine.calls import BlockDriver
from quantlab.engine.profile import Profile
from quantlab.engine.recall import Recall
from quantlab.errors import CheckpointError, NumericalError
from quantlab.finite import all_finite

CHECKED_BATCH = 0
"""Number of the batch whose logits a run keeps, the only one that it needs behind the last block."""


class Chain:
    """Hidden states of every batch at the door of one block, and how to get to the next one.

    Args:
        driver: of the model.
        batches: token ids, (sequences, tokens) each; recorded here.
        folder: for the files of the hidden states; leftovers of a former process may be in it.
        in_memory: whether hidden states are kept in memory, too.
        profile: is told where the time goes.
        numbers: of the batches in the calibration set, if they are a part of it; files are named by them, and other
            processes work on the other parts.
        begin: whether the batches stand before the first block; otherwise `stand_at` says where, before anything else.
        resumable: whether another process may go on where this one is, from files.
        finishing: number of the only batch that is wanted behind the last block; None for all of them.

    Attributes:
        recall: of the block that is next, if its parts need not be run again in every pass.
    """

    recall: Recall | None = None

    def __init__(
        self,
        driver: BlockDriver[Any],
        batches: Sequence[Tensor],
        folder: Path,
        *,
        in_memory: bool,
        profile: Profile,
        numbers: range | None = None,
        begin: bool = True,
        resumable: bool = False,
        finishing: int | None = None,
    ) -> None:
        self._driver = driver
        self._folder = folder
        self._in_memory = in_memory
        self._profile = profile
        self._numbers = range(len(batches)) if numbers is None else numbers
        self._shared = numbers is not None
        self._resumable, self._finishing = resumable, finishing
        self._recorded: list[Any] = []
        self._standing_at = 0
        self._hidden = self.generation(0)
        for number, ids in zip(self._numbers, batches, strict=True):
            with profile.timed("forward"):
                hidden, batch = driver.record(ids.to(driver.device))
            self._recorded.append(batch)
            if begin:
                self._put(self._hidden, number, hidden)
        self._settle(self._hidden)

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, index: int, batch: int) -> Tensor:
        """The output of block `index`, which must be the next one, for one batch."""
        with self._profile.timed("load"):
            hidden = self._hidden.get(self._numbers[batch])
        recalled = nullcontext() if self.recall is None else self.recall.of_batch(batch, hidden)
        with self._profile.timed("forward"), recalled:
            return self._driver.run_block(index, hidden, self._recorded[batch])

    def propagate(self, index: int, name: str) -> Activations:
        """Run every batch that is wanted there through block `index`, and go on to the next block.

        Args:
            index: of the block.
            name: of the block, for errors.

        Returns:
            The hidden states that entered the block, to be removed when those behind it are no longer needed twice.

        Raises:
            NumericalError: the block's output is not finite.
            ResumableError: the hidden states cannot be written.
        """
        following = self.generation(index + 1)
        for position, (number, batch) in enumerate(zip(self._numbers, self._recorded, strict=True)):
            if self._driver.is_last(index) and self._finishing not in (None, number):
                continue
            output = self.run(index, position)
            if not all_finite(output):
                raise NumericalError(
                    f"{name}: its output contains NaN or infinity in {output.dtype}; use --set model.dtype=float32"
                )
            with self._profile.timed("forward"):
                hidden = self._driver.advance(index, output, batch)
            self._put(following, number, hidden)
        self._settle(following)
        passed, self._hidden = self._hidden, following
        self._standing_at = index + 1
        return passed

    def stand_at(self, index: int, hashes: Mapping[str, str]) -> None:
        """Be at the door of block `index` with files that this or another process has written there.

        Raises:
            CheckpointError: the files are missing or have changed.
        """
        if (self._standing_at, self.hashes()) != (index, dict(hashes)):
            self._hidden = self.generation(index)
            self._hidden.restore(hashes)
            self._standing_at = index

    def continue_from(self, index: int, hashes: Mapping[str, str]) -> None:
        """Go on at the door of block `index`, where a former process stood.

        Args:
            index: of the block.
            hashes: of the files that it had there.

        Raises:
            CheckpointError: the files are missing or have changed; or the blocks before `index` were run again,
                and did not give the same.
        """
        if not self._driver.replay_on_resume:
            restored = self.generation(index)
            restored.restore(hashes)
            self._hidden.remove()
            self._hidden = restored
        elif self.hashes() != hashes:
            raise CheckpointError(
                f"{self._folder}: the finished blocks do not compute what they computed before, so the run cannot be "
                "continued on this machine or with this number of threads; remove its folder"
            )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of the hidden states, by file name."""
        return self._hidden.hashes()

    def finish(self, batch: int) -> Tensor:
        """The logits of a batch behind the last block: (sequences, tokens, vocabulary)."""
        return self._driver.finish(self._recorded[batch], self._hidden.get(self._numbers[batch]))

    def remove(self) -> None:
        """Forget the hidden states and delete their files."""
        self._hidden.remove()

    def generation(self, index: int) -> Activations:
        """The hidden states at the door of a block."""
        folder = self._folder / f"block-{index:05d}"
        # Before the first block a run begins anew, while a process that takes over one of several parts goes on.
        lasting = self._resumable and (index > 0 or self._shared)
        return Activations(
            folder, in_memory=self._in_memory, device=self._driver.device, lasting=lasting, shared=self._shared
        )

    def _put(self, generation: Activations, batch: int, hidden: Tensor) -> None:
        with self._profile.timed("write"):
            generation.put(batch, hidden)

    def _settle(self, generation: Activations) -> None:
        with self._profile.timed("write"):
            generation.settle()
