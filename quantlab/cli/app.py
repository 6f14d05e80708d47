"""The command group, and how errors become messages and exit codes."""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from quantlab._version import __version__
from quantlab.cli.check import check
from quantlab.cli.clean import clean
from quantlab.cli.compare import compare
from quantlab.cli.cp import cp
from quantlab.cli.data import data
from quantlab.cli.doctor import doctor
from quantlab.cli.eval import evaluate
from quantlab.cli.export import export
from quantlab.cli.generate import generate
from quantlab.cli.inspect import inspect
from quantlab.cli.ls import ls
from quantlab.cli.new_method import new_method
from quantlab.cli.options import CONTEXT, Session, common_options, verbatim
from quantlab.cli.plan import plan
from quantlab.cli.profile import profile
from quantlab.cli.report import report
from quantlab.cli.run import run
from quantlab.cli.show import show
from quantlab.cli.validate import validate
from quantlab.cli.verify import verify
from quantlab.errors import QuantlabError

UNEXPECTED, OUT_OF_MEMORY, INTERRUPTED = 1, 4, 130


START = (
    "quantlab run ganq_w4      quantize the bundled demo model to 4 bits",
    "quantlab plan ganq_w4     only say what would be done, and what it takes",
    "quantlab ls recipes       what else can be run",
)
EXIT_CODES = (
    "  0  ok",
    "  1  unexpected error",
    "  2  wrong usage",
    "  3  quality not reached",
    "  4  out of memory",
    " 75  stopped, or no space on the disk; the same command continues the run",
    " 78  bad recipe, model, data, plugin or installation",
    "130  interrupted",
)


@click.group(
    "quantlab",
    context_settings=CONTEXT,
    commands=[
        *(run, compare, plan, evaluate, profile, generate),
        *(inspect, verify, export, report),
        *(data, ls, cp, show, validate, check, new_method),
        *(doctor, clean),
    ],
    epilog="\n\n".join([verbatim("Start here, without network and GPU", START), verbatim("Exit codes", EXIT_CODES)]),
)
@click.version_option(__version__, prog_name="quantlab")
@common_options
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
        code: int | None = cli.main(
            list(arguments), prog_name="quantlab", standalone_mode=False, obj=session, color=session.color
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo("\n".join(["\ninterrupted", *_notes(error)]), err=True)
        return INTERRUPTED
    except Exception as error:
        if session.verbose:
            traceback.print_exc()
        message, exit_code = _describe(error)
        title = click.style("error", fg="red", bold=True)
        click.echo("\n".join([f"{title}: {message}", *_notes(error)]), err=True, color=session.color)
        return exit_code
    return code or 0


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, one line each; click puts an Abort around an interrupt."""
    return [f"  {note}" for cause in (error.__cause__, error) for note in getattr(cause, "__notes__", ())]


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
