"""What is needed to understand and to repeat a run."""

from quantlab.checkpoint.names import RESOLVED_RECIPE_NAME
from quantlab.report.html.markup import Html, breakable, join, tag
from quantlab.report.html.parts import Part, verbatim
from quantlab.report.html.runs import Run
from quantlab.report.html.tables import facts
from quantlab.report.markdown import provenance as described


def fallbacks(run: Run) -> Part:
    """The layers on which the method departed from its options."""
    entries = [str(entry) for entry in run.manifest["fallbacks"]]
    if not entries:
        content: Html = tag("p", "None: every layer was solved as the options say.")
    else:
        content = tag("ul", *(tag("li", breakable(entry)) for entry in entries), class_="warning")
    return Part(key="fallbacks", title="Fallbacks", content=content)


def provenance(run: Run) -> Part:
    """Everything on record, and the command that repeats the run."""
    manifest = run.manifest
    more = [
        (name, str(manifest[key]))
        for key, name in (("seed", "seed"), ("dtype", "computed in"), ("threads", "threads"), ("drive_mode", "engine"))
        if key in manifest
    ]
    files = [tag("li", tag("code", breakable(f"{name} {digest}"))) for name, digest in manifest["files"].items()]
    content = [facts([(name, breakable(value)) for name, value in [*described(run.record), *more]])]
    if files:
        content.append(tag("details", tag("summary", f"Hashes of the {len(files)} files"), tag("ul", *files)))
    recipe = _recipe(run)
    if recipe:
        content.append(tag("details", tag("summary", "The recipe in full"), verbatim(recipe)))
    content += [tag("h4", "Repeat this run"), verbatim(manifest["command"])]
    return Part(key="provenance", title="Provenance", content=join(content))


def _recipe(run: Run) -> str:
    """The recipe with every default filled in; empty in a folder without it."""
    try:
        return (run.folder / RESOLVED_RECIPE_NAME).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
