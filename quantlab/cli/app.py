"""The command group, and how errors become messages and exit codes."""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from quantlab._version import __version__
from quantlab.cli.check import check
from quantlab.cli.data import data
from quantlab.cli.ls import ls
from quantlab.cli.options import CONTEXT, Session, verbatim, verbose_option
from quantlab.cli.run import run
from quantlab.cli.show import show
from quantlab.cli.validate import validate
from quantlab.errors import QuantlabError

UNEXPECTED, OUT_OF_MEMORY, INTERRUPTED = 1, 4, 130


START = (
    "quantlab run ganq_w4             quantize the bundled demo model to 4 bits",
    "quantlab run ganq_w4 --dry-run   only say what would be done",
    "quantlab ls recipes              what else can be run",
)
EXIT_CODES = (
    "  0  ok",
    "  1  unexpected error",
    "  2  wrong usage",
    "  3  quality not reached",
    "  4  out of memory",
    " 78  bad recipe, model, data or plugin",
    "130  interrupted",
)


@click.group(
    "quantlab",
    context_settings=CONTEXT,
    commands=[run, data, ls, show, validate, check],
    epilog="\n\n".join([verbatim("Start here, without network and GPU", START), verbatim("Exit codes", EXIT_CODES)]),
)
@click.version_option(__version__, prog_name="quantlab")
@verbose_option
def cli() -> None:
    """The laboratory for weight-only quantization of language models."""


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command; errors are printed to stderr.

    Returns:
        The exit code.
    """
    session = Session(arguments=tuple(arguments))
    try:
        # Without standalone mode click returns the code of --help and --version, and a command's None.
        code: int | None = cli.main(list(arguments), prog_name="quantlab", standalone_mode=False, obj=session)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        if session.verbose:
            traceback.print_exc()
        message, exit_code = _describe(error)
        click.echo(f"{click.style('error', fg='red', bold=True)}: {message}", err=True)
        return exit_code
    return code or 0


def _describe(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, QuantlabError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        advice = "try --set calibration.num_samples=32 (fewer windows) or --set model.dtype=bfloat16 (half the size)"
        return f"out of memory: {str(error) or 'the system refused an allocation'}; {advice}", OUT_OF_MEMORY
    return (
        f"unexpected {type(error).__name__}: {error}\n  This is a bug in quantlab or a plugin; -v shows where",
        UNEXPECTED,
    )
