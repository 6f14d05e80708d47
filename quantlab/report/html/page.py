"""The page as a whole."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from quantlab._version import __version__
from quantlab.report.html.codebooks import codebooks
from quantlab.report.html.convergence import convergence, convergence_of_methods
from quantlab.report.html.experts import experts
from quantlab.report.html.layers import layers
from quantlab.report.html.markup import Html, join, tag
from quantlab.report.html.outputs import outputs
from quantlab.report.html.overview import overview, verdict
from quantlab.report.html.parts import Part, verbatim
from quantlab.report.html.provenance import fallbacks, provenance
from quantlab.report.html.published import published
from quantlab.report.html.resources import resources
from quantlab.report.html.runs import Failure, Run, find_commands, find_runs
from quantlab.report.html.scores import ranked, texts
from quantlab.report.html.tradeoff import tradeoff
from quantlab.report.units import format_bytes, format_count

FILE_NAME = "report.html"


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of some runs.

    Args:
        folders: of runs or of comparisons.
        path: the file to write.

    Returns:
        The file.

    Raises:
        UsageError: a folder is neither, or cannot be read.
    """
    path.write_text(render_page(*find_runs(folders), find_commands(folders)), encoding="utf-8")
    return path


def render_page(runs: Sequence[Run], failures: Sequence[Failure] = (), commands: Sequence[str] = ()) -> str:
    """The page as text; it needs nothing outside itself.

    Args:
        runs: at least one.
        failures: cells of a comparison without a result.
        commands: that made the comparison.
    """
    title, script = _title(runs), _package_file("page.js")
    found = [overview(runs, failures), tradeoff(runs), published(runs)]
    if len(runs) > 1:
        found.append(convergence_of_methods(runs))
    parts = [part for part in found if part is not None]
    if len(runs) == 1:
        parts += _parts_of(runs[0], "")
    else:
        parts.append(Part(key="runs", title="Run by run", content=join(_folded(runs))))
    if commands:
        parts.append(Part(key="repeat", title="Repeat this comparison", content=verbatim("\n".join(commands))))
    body = tag(
        "body",
        tag("a", "Skip to the results", href="#summary", class_="skip"),
        tag(
            "header",
            tag("p", _subject(runs), class_="eyebrow"),
            tag("h1", title),
            tag("p", verdict(runs, failures), class_="verdict"),
        ),
        tag("nav", tag("ul", *(_link(part) for part in parts)), aria_label="Sections"),
        tag("main", *(part.render(level=2) for part in parts)),
        tag("footer", f"Written by quantlab {__version__} from the records of the runs alone."),
        tag("script", script),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("title", f"{title} · quantlab"),
        tag("style", _package_file("page.css")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _policy(script: str) -> str:
    """Even if an escape were missing somewhere, no other script would run, and the page could load and send nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = ("default-src 'none'", f"script-src 'sha256-{digest}'", "style-src 'unsafe-inline'")
    return "; ".join([*sources, "base-uri 'none'", "form-action 'none'"])


def _title(runs: Sequence[Run]) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    on = models[0] if len(models) == 1 else f"{len(models)} models"
    return f"{runs[0].label} on {on}" if len(runs) == 1 else f"{len(runs)} runs on {on}"


def _subject(runs: Sequence[Run]) -> str:
    model = runs[0].manifest["model"]
    if any(run.model != runs[0].model for run in runs):
        return "quantlab report"
    size = format_bytes(runs[0].manifest["source_bytes"])
    return f"quantlab report · {model['architecture']}, {format_count(model['parameters'])} parameters, {size}"


def _parts_of(run: Run, prefix: str) -> list[Part]:
    parts = [
        layers(run, prefix),
        outputs(run),
        codebooks(run, prefix),
        convergence(run, prefix),
        resources(run, prefix),
        experts(run, prefix),
        fallbacks(run),
        provenance(run),
    ]
    return [part for part in parts if part is not None]


def _folded(runs: Sequence[Run]) -> list[Html]:
    """Every run on its own, closed but for the best one."""
    best = next((run for text in texts(runs)[:1] for run in ranked(runs, text)), runs[0])
    return [
        tag(
            "details",
            tag("summary", run.label, tag("small", run.folder.name)),
            *(part.render(level=3, prefix=f"run-{index}-") for part in _parts_of(run, f"run-{index}-")),
            open=run is best,
        )
        for index, run in enumerate(runs)
    ]


def _link(part: Part) -> Html:
    return tag("li", tag("a", part.title, href=f"#{part.key}"))


def _package_file(name: str) -> Html:
    return Html((Path(__file__).parent / name).read_text(encoding="utf-8"))
