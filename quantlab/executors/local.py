"""The reference: every unit runs in this process, when its result is asked for."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlab.executors.protocol import Link, Resources
from quantlab.progress import Progress


class _Handle:
    """A value, or a call that is made when its value is first needed."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    @cached_property
    def value(self) -> Any:
        return self._compute()


@dataclass(frozen=True, eq=False)
class _LocalLink:
    """Passes on."""

    listener: Progress
    asked_to_stop: Callable[[], bool]

    def reporting(self, name: str) -> AbstractContextManager[Progress]:
        """The listener itself: one unit runs at a time."""
        return nullcontext(self.listener)

    def stop(self) -> bool:
        """Whether the driver was asked to stop."""
        return self.asked_to_stop()


class LocalExecutor:
    """Runs units one after the other; see `Executor`.

    Args:
        gpus: whether units compute on this machine's CUDA device, if more than 0.
    """

    slots = 1

    def __init__(self, gpus: float = 0) -> None:
        self.remote = False
        self.task = Resources(gpus=gpus)

    def require_shared(self, model_folder: Path, folder: Path | None) -> None:
        """There is one machine only."""

    def link(self, progress: Progress, stop: Callable[[], bool]) -> Link:
        """See Executor."""
        return _LocalLink(progress, stop)

    def put(self, value: Any) -> Any:
        """See Executor."""
        return _Handle(lambda: value)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Executor."""
        return _Handle(lambda: function(*map(_resolve, arguments)))

    def map(
        self,
        function: Callable[..., Any],
        units: Iterable[tuple[Any, ...]],
        *,
        resources: Resources | None = None,
        sticky: bool = False,
        arrived: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """See Executor."""
        for position, arguments in enumerate(units):
            result = function(*map(_resolve, arguments))
            if arrived is not None:
                arrived(position)
            yield result


def _resolve(argument: Any) -> Any:
    return argument.value if isinstance(argument, _Handle) else argument
