import io

import pytest
from rich.console import Console

from quantlab.cli import progress as module
from quantlab.cli.progress import LiveProgress, PlainProgress, choose_progress
from quantlab.progress import NoProgress


@pytest.fixture(autouse=True)
def occupied(monkeypatch):
    """The process seems to occupy 620 MB."""
    monkeypatch.setattr(module, "current_rss_bytes", lambda: 620_000_000)


@pytest.fixture
def plain():
    lines, now = [], [0.0]
    progress = PlainProgress(lines.append, clock=lambda: now[0])
    progress.lines, progress.now = lines, now
    return progress


def test_a_stage_has_a_first_and_a_last_line(plain):
    plain.begin("quantizing", 3, "layers")
    for _ in range(3):
        plain.now[0] += 1
        plain.advance(detail="block 1/1  q_proj")
    assert plain.lines == ["quantizing: 3 layers", "  3/3 layers, done in 3.0 s; memory 620 MB; block 1/1  q_proj"]


def test_slow_stages_report_every_few_seconds_with_the_remaining_time(plain):
    plain.begin("quantizing", 4, "layers")
    for _ in range(3):
        plain.now[0] += 4
        plain.advance()
    assert plain.lines[1:] == ["  2/4 layers, 8.0 s, about 8.0 s left; memory 620 MB"]


def test_stages_are_timed_one_by_one(plain):
    plain.begin("first", 1, "layers")
    plain.now[0] = 100
    plain.advance()
    plain.begin("second", 2, "windows")
    plain.now[0] = 101
    plain.advance(count=2)
    assert plain.lines[-1] == "  2/2 windows, done in 1.0 s; memory 620 MB"


def test_live_panel_shows_stage_count_and_detail():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with LiveProgress(console) as progress:
        progress.begin("[weights] of a/b", 35, "layers")
        progress.advance(12, "block 2/5  mlp.down_proj  loss 1.2e-02")
        progress._bars.refresh()
        shown = terminal.getvalue()
        progress.begin("perplexity", 4, "windows")
    assert "[weights] of a/b" in shown
    assert "12/35 layers" in shown
    assert "mlp.down_proj" in shown
    assert "0/4 windows" in terminal.getvalue()


@pytest.mark.parametrize(("budget_bytes", "shown"), [(None, "memory 620 MB\n"), (4 * 10**9, "memory 620 MB of 4 GB\n")])
def test_memory_is_shown_against_the_budget(budget_bytes, shown):
    terminal, lines = io.StringIO(), []
    console = Console(file=terminal, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with LiveProgress(console, budget_bytes) as live:
        live.begin("quantizing", 2, "layers")
        live._bars.refresh()
        panel = "\n".join(line.rstrip() for line in terminal.getvalue().splitlines())
    plain = PlainProgress(lines.append, budget_bytes=budget_bytes)
    plain.begin("quantizing", 1, "layers")
    plain.advance()
    assert shown in panel + "\n"
    assert lines[-1].endswith(f"; {shown.strip()}")


def test_where_the_system_does_not_tell_there_is_no_memory_line(plain, monkeypatch):
    monkeypatch.setattr(module, "current_rss_bytes", lambda: None)
    plain.begin("quantizing", 1, "layers")
    plain.advance()
    assert "memory" not in plain.lines[-1]


def test_the_occupied_memory_is_between_nothing_and_the_peak():
    from quantlab.memory import current_rss_bytes, peak_rss_bytes

    assert 10**7 < current_rss_bytes() <= 1.1 * peak_rss_bytes()


def test_live_panel_cuts_details_to_the_width_of_the_terminal():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=40, color_system=None, legacy_windows=False)
    with LiveProgress(console) as progress:
        progress.begin("s", 2, "u")
        progress.advance(1, "x" * 100)
        progress._bars.refresh()
    assert "x" * 30 in terminal.getvalue()
    assert "x" * 40 not in terminal.getvalue()


def test_live_panel_stays_small_through_many_stages():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with LiveProgress(console) as progress:
        for stage in range(40):
            progress.begin(f"stage {stage}", 2, "u")
            progress.advance()
        assert [task.description for task in progress._bars.tasks] == [f"stage {stage}" for stage in range(34, 40)]


def test_quiet_is_silent_and_files_get_lines():
    with choose_progress(quiet=True) as quiet, choose_progress(quiet=False) as lines:
        assert isinstance(quiet, NoProgress)
        assert isinstance(lines, PlainProgress)


def test_terminals_get_the_live_panel(monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    with choose_progress(quiet=False) as progress:
        assert isinstance(progress, LiveProgress)
