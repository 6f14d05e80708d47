"""Stopping a run: the first signal asks it to stop where it can be continued, the second interrupts it."""

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Inside, Ctrl-C and SIGTERM are requests; called, it says whether there was one. A context manager."""

    def __init__(self) -> None:
        self._requested = False

    def __call__(self) -> bool:
        """Whether the run has been asked to stop."""
        return self._requested

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after the current block; Ctrl-C again stops at once\n")
