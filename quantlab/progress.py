"""What long work tells about itself; the command line decides how to show it."""

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from quantlab.errors import ResumableError


class Progress(Protocol):
    """A listener for the stages of a run; stages follow each other and do not nest."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage starts: `total` steps of the kind `unit`, for example 35 "layers"."""
        ...

    def advance(self, count: int = 1, detail: str = "") -> None:
        """`count` steps are done; `detail` describes the last one."""
        ...


class NoProgress:
    """A listener that shows nothing, for library use and tests."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Show nothing."""

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Show nothing."""


class LoggedProgress:
    """Passes progress on and writes every event to a log.

    Args:
        progress: the listener to pass on to.
        log: is written to.
        stop: whether the work has been asked to stop.

    Attributes:
        stoppable: whether the work may be stopped at any step.
    """

    def __init__(self, progress: Progress, log: TextIO, stop: Callable[[], bool]) -> None:
        self._progress = progress
        self._log = log
        self._stop = stop
        self.stoppable = False

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Log, and pass on."""
        self._stage = stage
        self._write(f"{stage}: {total} {unit}")
        self._progress.begin(stage, total, unit)

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Log the detail, and pass on.

        Raises:
            ResumableError: the work may be stopped here, and has been asked to.
        """
        if detail:
            self._write(detail)
        self._progress.advance(count, detail)
        if self.stoppable and self._stop():
            raise ResumableError(f"stopped while measuring {self._stage}")

    def _write(self, line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=self._log, flush=True)
