"""Showing the progress of a run: a live panel on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

from quantlab.cli.options import open_console
from quantlab.memory import current_rss_bytes
from quantlab.progress import NoProgress, Progress
from quantlab.report.units import format_bytes, format_duration

LINE_INTERVAL_S = 5.0

MOST_BARS = 6
"""Stages that are shown at a time; a comparison has dozens of them."""


@contextmanager
def choose_progress(*, quiet: bool, budget_bytes: int | None = None) -> Iterator[Progress]:
    """The listener that suits stderr: nothing if quiet, a live panel on a terminal, lines in a file.

    Args:
        quiet: whether nothing is to be shown.
        budget_bytes: the memory that the work may occupy, to be shown beside what it occupies.
    """
    console = open_console(stderr=True)
    if quiet:
        yield NoProgress()
    elif console.is_terminal:
        with LiveProgress(console, budget_bytes) as live:
            yield live
    else:
        yield PlainProgress(
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), budget_bytes=budget_bytes
        )


def memory_line(budget_bytes: int | None) -> str:
    """What the process occupies now, and what it may occupy; empty where the system does not tell."""
    occupied_bytes = current_rss_bytes()
    if occupied_bytes is None:
        return ""
    budget = "" if budget_bytes is None else f" of {format_bytes(budget_bytes)}"
    return f"memory {format_bytes(occupied_bytes)}{budget}"


class PlainProgress:
    """Writes a line when a stage begins, every few seconds, and when it ends.

    Attributes:
        write: takes one line.
        clock: seconds.
        budget_bytes: the memory that the work may occupy, or None.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        budget_bytes: int | None = None,
    ) -> None:
        self.write = write
        self.clock = clock
        self.budget_bytes = budget_bytes
        self._total = self._done = 0
        self._unit = ""
        self._began = self._last_line = 0.0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Announce a stage."""
        self._total, self._done, self._unit = total, 0, unit
        self._began = self._last_line = self.clock()
        self.write(f"{stage}: {total} {unit}")

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Count; write a line if the last one is some seconds old, or the stage is complete."""
        self._done += count
        now = self.clock()
        if (count == 0 or self._done < self._total) and now - self._last_line < LINE_INTERVAL_S:
            return
        self._last_line = now
        elapsed_s = now - self._began
        if self._done == 0:
            timing = format_duration(elapsed_s)
        elif self._done < self._total:
            remaining_s = elapsed_s / self._done * (self._total - self._done)
            timing = f"{format_duration(elapsed_s)}, about {format_duration(remaining_s)} left"
        else:
            timing = f"done in {format_duration(elapsed_s)}"
        facts = "; ".join(fact for fact in (timing, memory_line(self.budget_bytes), detail) if fact)
        self.write(f"  {self._done}/{self._total} {self._unit}, {facts}")


class LiveProgress:
    """A live panel on a terminal: one bar per stage, and below what was done last and the memory. A context manager.

    Args:
        console: where to show it.
        budget_bytes: the memory that the work may occupy, or None.
    """

    def __init__(self, console: Console, budget_bytes: int | None = None) -> None:
        self._bars = _Bars(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.completed}/{task.total} {task.fields[unit]}", markup=False),
            bars.TimeElapsedColumn(),
            bars.TextColumn("eta", style="dim"),
            bars.TimeRemainingColumn(),
            console=console,
        )
        self._bars.budget_bytes = budget_bytes
        self._stage: bars.TaskID | None = None

    def __enter__(self) -> "LiveProgress":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.ended = True
        self._bars.stop()

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Add a bar for the stage; those of the last stages before it stay."""
        if self._stage is not None:
            self._bars.stop_task(self._stage)
        if len(self._bars.task_ids) >= MOST_BARS:
            self._bars.remove_task(self._bars.task_ids[0])
        self._bars.detail = ""
        self._stage = self._bars.add_task(stage, total=total, unit=unit)

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Move the bar; show the detail below it."""
        if detail:
            self._bars.detail = detail
        if self._stage is not None:
            self._bars.advance(self._stage, count)


class _Bars(bars.Progress):
    """Rich's bars with lines below them, cut to the width of the terminal."""

    detail = ""
    budget_bytes: int | None = None
    ended = False

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if not self.ended:
            for line in filter(None, (self.detail, memory_line(self.budget_bytes))):
                yield Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis")
