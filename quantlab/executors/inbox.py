"""Messages from units to the driver, and the request to stop from the driver to the units."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from quantlab.progress import Progress

Message = tuple[str, str]
"""The name of a unit, and what it says."""


class Inbox:
    """Holds messages until the driver takes them; runs as an actor beside the driver."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stopping = False

    def post(self, message: Message) -> None:
        """Add a message."""
        self._messages.append(message)

    def take(self) -> list[Message]:
        """The messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def request_stop(self) -> None:
        """Ask all units to stop."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether units are asked to stop."""
        return self._stopping


class PostedProgress:
    """Turns the stages of a unit into messages: what is done and how much of it.

    Args:
        post: takes a message's text.
    """

    def __init__(self, post: Callable[[str], None]) -> None:
        self._post = post
        self._stage = self._unit = ""
        self._done = self._total = 0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """See Progress."""
        self._stage, self._total, self._unit, self._done = stage, total, unit, 0
        self._post(f"{stage}: {total} {unit}")

    def advance(self, count: int = 1, detail: str = "") -> None:
        """See Progress."""
        self._done += count
        self._post(f"{self._stage} {self._done}/{self._total} {self._unit}{f'  {detail}' if detail else ''}")


@contextmanager
def warnings_posted(post: Callable[[str], None]) -> Iterator[None]:
    """Inside, Python warnings and log records from WARNING on are messages, too."""

    class Posting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            post(f"{record.levelname.lower()}: {record.getMessage()}")

    def show(message: Any, category: type[Warning], *_: object, **__: object) -> None:
        post(f"{category.__name__}: {message}")

    handler = Posting(level=logging.WARNING)
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def deliver(messages: list[Message], progress: Progress) -> None:
    """Show messages as details of the driver's own stage."""
    for name, text in messages:
        progress.advance(0, f"{name}: {text}")
