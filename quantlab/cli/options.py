"""What the commands share: their context, common options, and the session."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One invocation of the command line.

    Attributes:
        arguments: as typed, without the program's name.
        verbose: whether a traceback is wanted.
    """

    arguments: tuple[str, ...] = ()
    verbose: bool = False


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


def verbose_option(command: Command) -> Command:
    """Adds `-v`, which shows the traceback of an error."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(Session).verbose = True

    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(command)


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


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
