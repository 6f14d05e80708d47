"""`quantlab check`: does a method fulfil the plugin contract?"""

import dataclasses
import json
import typing
from collections import Counter

import click

from quantlab.cli.options import common_options, examples, json_option
from quantlab.errors import QualityError

if typing.TYPE_CHECKING:
    from quantlab.testing import CheckResult

_COLORS = {"passed": "green", "failed": "red"}


@click.command(
    short_help="Test a method against the plugin contract.",
    epilog=examples("quantlab check ganq", "quantlab check my_method --json"),
)
@click.argument("method")
@json_option
@common_options
def check(method: str, as_json: bool) -> None:
    """Test the installed METHOD, bundled or your own, against every promise of the plugin contract.

    Exits 3 if a promise is broken.
    """
    from quantlab import registry
    from quantlab.testing import Status, check_quantizer

    results = check_quantizer(registry.configure(method))
    if as_json:
        click.echo(json.dumps([_as_json(result) for result in results], indent=2))
    else:
        _print_results(results)
    failed = [result.name for result in results if result.status is Status.FAILED]
    if failed:
        raise QualityError(f"{method} breaks {len(failed)} of {len(results)} promises: {', '.join(failed)}")


def _as_json(result: "CheckResult") -> dict[str, str]:
    return {**dataclasses.asdict(result), "status": result.status.value}


def _print_results(results: "list[CheckResult]") -> None:
    width = max(len(result.status.value) for result in results)
    for result in results:
        status = click.style(f"{result.status.value:<{width}}", fg=_COLORS.get(result.status.value, "yellow"))
        click.echo(f"{status}  {result.name}" + (f": {result.message}" if result.message else ""))
    counts = Counter(result.status.value for result in results)
    click.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
