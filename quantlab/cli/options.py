"""What the commands share: their context, common options, and the session."""

import os
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

if typing.TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One invocation of the command line.

    Attributes:
        arguments: as typed, without the program's name.
        verbose: whether a traceback is wanted.
        quiet: whether only the result is wanted.
        color: False for no colors, None for colors on a terminal.
    """

    arguments: tuple[str, ...] = ()
    verbose: bool = False
    quiet: bool = False
    color: bool | None = field(default_factory=lambda: False if os.environ.get("NO_COLOR") else None)


def _with_dashes(token: str) -> str:
    """`--output_dir` is accepted for `--output-dir`."""
    return token.replace("_", "-")


CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": _with_dashes, "max_content_width": 100}


def verbatim(title: str, lines: Iterable[str]) -> str:
    """A titled paragraph that click prints as it is, without filling its lines."""
    return "\n".join(["\b", f"{title}:", *(f"  {line}" for line in lines)])


def examples(*commands: str) -> str:
    """The examples at the end of a command's help."""
    return verbatim("Examples" if len(commands) > 1 else "Example", commands)


def common_options(command: Command) -> Command:
    """Adds what every command has: `-q`, `-v` and `--no-color`."""
    for decorate in (
        _session_flag("--no-color", help="No colors; so does the environment variable NO_COLOR.", color=False),
        _session_flag("-v", "--verbose", help="Show the traceback of an error.", verbose=True),
        _session_flag("-q", "--quiet", help="No progress; only the result.", quiet=True),
    ):
        command = decorate(command)
    return command


def open_console(*, stderr: bool = False) -> "Console":
    """A rich console that keeps to `--no-color`."""
    from rich.console import Console

    context = click.get_current_context(silent=True)
    return Console(stderr=stderr, no_color=True if context is not None and context.color is False else None)


def recipe_options(command: Command) -> Command:
    """Adds the recipe argument, `--model` and `--set`."""
    for decorate in (
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Override a value of the recipe, for example --set method.bits=3. May be repeated.",
        ),
        click.option("--model", metavar="MODEL", help="Another model: a folder, a hub id or an alias."),
        click.argument("recipe"),
    ):
        command = decorate(command)
    return command


def _split_names(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.strip() for item in value for name in item.split(",") if name.strip())


tasks_option = click.option(
    "--tasks",
    multiple=True,
    metavar="NAMES",
    callback=_split_names,
    help="lm-eval task, group, or local task; commas or repeated.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def _session_flag(*names: str, help: str, **changes: bool) -> Callable[[Command], Command]:
    """A flag that is remembered in the session instead of being passed to the command."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            session = context.ensure_object(Session)
            for name, change in changes.items():
                setattr(session, name, change)
            context.color = session.color

    return click.option(*names, is_flag=True, expose_value=False, callback=remember, help=help)
