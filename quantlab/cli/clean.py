"""`quantlab clean`: remove what unfinished runs have left behind."""

import sys
import typing
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from quantlab.cli.options import common_options, examples
from quantlab.errors import UsageError

if typing.TYPE_CHECKING:
    from quantlab.leftovers import Leftover


@click.command(
    short_help="Remove unfinished runs.",
    epilog=examples("quantlab clean --dry-run", "quantlab clean runs/ganq_w4-demo --yes", "quantlab clean --kernels"),
)
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--kernels", is_flag=True, help="Remove the compiled kernels, too; alone, only them.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def clean(folders: tuple[Path, ...], kernels: bool, dry_run: bool, yes: bool) -> None:
    """Remove the unfinished runs in or below DIR (default: runs), after showing what would be lost.

    Finished results are never touched, nor a run that a process is working on.
    """
    from quantlab.leftovers import compiled_kernels, find_unfinished, remove_kernels

    with ExitStack() as locks:
        leftovers = _take(find_unfinished(folders or ([] if kernels else [Path("runs")])), locks)
        libraries = compiled_kernels() if kernels else []
        if not leftovers and not libraries:
            click.echo("nothing to remove")
            return
        _show(leftovers, libraries)
        if dry_run:
            return
        if not yes and not _agreed():
            click.echo("nothing was removed")
            return
        for leftover in leftovers:
            leftover.remove()
        remove_kernels(libraries)
    click.echo("removed")


def _take(folders: Sequence[Path], locks: ExitStack) -> "list[Leftover]":
    """Take every run that may be removed; say why the others may not."""
    from quantlab.leftovers import taken

    leftovers = []
    for folder in folders:
        try:
            leftovers.append(locks.enter_context(taken(folder)))
        except UsageError as error:
            click.echo(f"kept: {error}", err=True)
    return leftovers


def _show(leftovers: "Sequence[Leftover]", libraries: Sequence[Path]) -> None:
    from quantlab.report.units import format_bytes, format_duration

    for leftover in leftovers:
        lost = (
            "finished; only its work files"
            if leftover.is_complete
            else f"{leftover.blocks} finished blocks, {format_duration(leftover.seconds)} of work"
        )
        click.echo(f"{leftover.folder}: {lost}, {format_bytes(leftover.size_bytes)}")
    if libraries:
        size_bytes = sum(library.stat().st_size for library in libraries)
        click.echo(f"{len(libraries)} compiled kernels, {format_bytes(size_bytes)}")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("nothing was removed, since nobody can be asked here; agree with --yes")
    return click.confirm("Remove?")
