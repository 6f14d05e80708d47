"""What the commands share: their context, common options, and the session."""

import os
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

if typing.TYPE_CHECKING:
    from rich.console import Console

    from quantlab.executors import Executor

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


_EXECUTOR = "quantlab.executor"


def _with_dashes(token: str) -> str:
    """`--output_dir` is accepted for `--output-dir`."""
    return token.replace("_", "-")


CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": _with_dashes, "max_content_width": 100}


def _parse_device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from quantlab.recipe.device import device_error

    if (problem := device_error(value)) is not None:
        raise click.BadParameter(problem, context, parameter)
    if value != "cpu":
        import torch

        from quantlab.engine.device import require_device

        require_device(torch.device(value))
    return value


device_option = click.option(
    "--device", default="cpu", show_default=True, callback=_parse_device, help="Where to compute, such as cuda:0."
)


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


def executor_options(command: Command) -> Command:
    """Adds where the work is done, `--executor` and what belongs to it; `opened_executor` reads it."""
    for decorate in (
        _executor_option("--spill-dir", metavar="DIR", help="Where that Ray puts what does not fit there."),
        _executor_option(
            "--object-store", metavar="SIZE", help="Memory in which a Ray started here shares data, such as 4GiB."
        ),
        _executor_option(
            "--gpus-per-task",
            type=click.FloatRange(min=0),
            default=0,
            show_default=True,
            help="CUDA devices that a unit of work occupies and solves layers on.",
        ),
        _executor_option(
            "--cpus-per-task",
            type=click.IntRange(min=1),
            help="Cores that a unit of work occupies.  [default: its threads]",
        ),
        _executor_option("--address", metavar="HOST:PORT", help="Of a running Ray cluster.  [default: start Ray here]"),
        _executor_option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Where the work is done; the results are the same.",
        ),
    ):
        command = decorate(command)
    return command


@contextmanager
def opened_executor() -> "Iterator[Executor]":
    """The executor that the current command was asked to use."""
    from quantlab.executors import ExecutorOptions, open_executor
    from quantlab.recipe.size import parse_size, size_error

    chosen = click.get_current_context().meta[_EXECUTOR]
    size = chosen["object_store"]
    if size is not None and (problem := size_error(size)):
        raise click.BadParameter(problem, param_hint="--object-store")
    options = ExecutorOptions(
        name=chosen["executor"],
        address=chosen["address"],
        cpus_per_task=chosen["cpus_per_task"],
        gpus_per_task=chosen["gpus_per_task"],
        object_store_bytes=None if size is None else parse_size(size),
        spill_dir=chosen["spill_dir"],
    )
    with open_executor(options) as opened:
        yield opened


def _executor_option(name: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option that is remembered in the context instead of being passed to the command."""

    def remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
        context.meta.setdefault(_EXECUTOR, {})[parameter.name] = value

    return click.option(name, expose_value=False, callback=remember, **attributes)


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
