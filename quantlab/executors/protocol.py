"""What the engine asks of whatever runs its units."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one unit occupies while it runs.

    Attributes:
        cpus: processor cores; None for as many as torch has threads, since every unit computes on that many.
        gpus: CUDA devices; a fraction shares one.
    """

    cpus: int | None = None
    gpus: float = 0


class Link(Protocol):
    """How a unit is heard while it runs, and learns that it should end; it can be an argument of a unit."""

    def reporting(self, name: str) -> AbstractContextManager[Progress]:
        """Inside, where a unit tells about its stages; `name` tells it apart from others."""
        ...

    def stop(self) -> bool:
        """Whether the unit should end at the next place from which it can go on."""
        ...


class Executor(Protocol):
    """Runs units: calls of module-level functions whose results depend on nothing but their arguments and on files.

    An argument may be a handle, which `put` and `call` return; the function receives the value behind it. Arguments
    and results are not written to. A unit that is lost together with its machine runs again elsewhere.

    Attributes:
        remote: whether units run in other processes, several at a time.
        task: what a unit occupies unless it says otherwise.
    """

    remote: bool
    task: Resources

    @property
    def slots(self) -> int:
        """Units that can run at the same time."""
        ...

    def require_shared(self, model_folder: Path, folder: Path | None) -> None:
        """Check that every machine computes alike, and reads the model and the run folder by the same paths.

        Args:
            model_folder: of a model.
            folder: exists; results are written there. None if there are no files.

        Raises:
            UsageError: naming the machine and what is different there.
        """
        ...

    def link(self, progress: Progress, stop: Callable[[], bool]) -> Link:
        """A link to `progress` and `stop`; a link made before ends."""
        ...

    def put(self, value: Any) -> Any:
        """A handle for a value that many units share."""
        ...

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one unit, whose result stays where it is: a handle for other units."""
        ...

    def map(
        self,
        function: Callable[..., Any],
        units: Iterable[tuple[Any, ...]],
        *,
        resources: Resources | None = None,
        sticky: bool = False,
        arrived: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """Run a unit for each tuple of arguments, and yield the results in their order.

        Leaving the iterator early cancels the units that are not done.

        Args:
            function: of a module that is installed on every machine.
            units: arguments.
            resources: what each occupies; None for `task`.
            sticky: run the unit at position k in the same process as that of former sticky calls, as long as it
                lives, so that the function may keep there what it has loaded. It must do without.
            arrived: is told the position of each unit that is done, as soon as it is.

        Raises:
            ResumableError: the machines are lost.
            Exception: what a unit raises, at its turn.
        """
        ...
