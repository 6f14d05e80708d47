"""What long work tells about itself; the command line decides how to show it."""

from typing import Protocol


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
