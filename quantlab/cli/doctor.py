"""`quantlab doctor`: is the installation sound?"""

import dataclasses
import json
import typing
from collections.abc import Sequence

import click

from quantlab.cli.options import common_options, examples, json_option
from quantlab.errors import InstallationError

if typing.TYPE_CHECKING:
    from quantlab.doctor import Finding

_COLORS = {"ok": "green", "warning": "yellow", "broken": "red"}


@click.command(
    short_help="Check the installation and the machine.",
    epilog=examples("quantlab doctor", "quantlab doctor --json"),
)
@json_option
@common_options
def doctor(as_json: bool) -> None:
    """Show versions, methods, native kernels, memory and disk, and what to do where something is wrong.

    Native kernels are compiled if they are not yet. Exits 78 if something is broken.
    """
    from quantlab.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    broken = [finding.name for finding in findings if finding.level == "broken"]
    if broken:
        raise InstallationError(f"broken: {', '.join(broken)}")


def _print(findings: "Sequence[Finding]") -> None:
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            click.echo(click.style(topic, bold=True))
        level = click.style(f"{finding.level:<7}", fg=_COLORS[finding.level])
        click.echo(f"  {level}  {finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            click.echo(f"  {'':<7}  {'':<{width}}  try: {finding.remedy}")
