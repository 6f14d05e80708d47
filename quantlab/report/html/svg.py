"""Matplotlib figures as inline SVG that follows the colours and the font of the page.

Figures are drawn with placeholder colours, one per role, which become CSS variables: the same picture serves the
light page, the dark one and paper. Text stays text. The same figure always gives the same SVG.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantlab.report.html.markup import Html, printable

SERIES = 8
HEAT_LEVELS = 10
"""Shades of the heat map on either side of its neutral middle."""

WIDTH = 4.4
"""Inches of 100 units; narrow enough that the text can be read on a phone without scrolling."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_PREFIX = "#fe01"  # of the placeholders; drawn nowhere, and replaced in style attributes only
_ROLES = ("ink", "muted", "grid", "page", "accent", "alert", "soft", "on-middle")
_VARIABLES = [
    *_ROLES,
    *(f"series-{index}" for index in range(SERIES)),
    *(f"heat-{level}" for level in range(-HEAT_LEVELS, HEAT_LEVELS + 1)),
]
_PLACEHOLDERS = {name: f"{_PREFIX}{index:02x}" for index, name in enumerate(_VARIABLES)}
_STYLE: dict[Any, object] = {
    "axes.edgecolor": _PLACEHOLDERS["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _PLACEHOLDERS["muted"],
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _PLACEHOLDERS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": _PLACEHOLDERS["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": _PLACEHOLDERS["ink"],
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "quantlab",
    "text.color": _PLACEHOLDERS["ink"],
    "text.parse_math": False,
    "xtick.color": _PLACEHOLDERS["grid"],
    "xtick.labelcolor": _PLACEHOLDERS["muted"],
    "ytick.color": _PLACEHOLDERS["grid"],
    "ytick.labelcolor": _PLACEHOLDERS["muted"],
}


def color(role: str) -> str:
    """The placeholder for a colour of the page: "ink", "muted", "accent", "series-0", "heat--3" and so on."""
    return _PLACEHOLDERS[role]


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are made in the style of the page."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # the browser has it
        yield


def axes(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes.

    Args:
        height: in inches of 100 units.
        width: in the same.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def inline(figure: Figure, name: str, title: str, description: str, notes: Mapping[str, str] | None = None) -> Html:
    """The figure as an SVG element.

    Args:
        figure: drawn inside `styled`.
        name: prefix of its ids, unique on the page.
        title: its accessible name.
        description: what is to be seen in it, for who cannot see it.
        notes: texts that appear when the pointer is on an artist, by the gid of the artist.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _annotate(root, notes or {})
    _rename_ids(root, name)
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
    _strip(root)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    _name(root, name, title, description)
    width = figure.get_figwidth() * 100
    root.set("style", f"--width: {width:.0f}px")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return Html(ElementTree.tostring(root, encoding="unicode"))


def label(text: str, length: int = 40) -> str:
    """A text from outside, fit for a plot: one line of printable characters, cut in the middle if it is long."""
    line = " ".join(printable(text).split())
    if len(line) <= length:
        return line
    return f"{line[: length // 2]}…{line[-(length // 2 - 1) :]}"


def _strip(root: ElementTree.Element) -> None:
    """Take out the metadata, and the style that would apply to the whole page; its rule is in `page.css`."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)


def _annotate(root: ElementTree.Element, notes: Mapping[str, str]) -> None:
    for element in root.iter():
        note = notes.get(element.attrib.get("id", ""))
        if note is not None:
            child = ElementTree.Element(f"{{{_SVG}}}title")
            child.text = printable(note)
            element.insert(0, child)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Keep the ids that are referred to, made unique on the page; drop the others."""
    text = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        element.attrib[_LINK][1:] for element in root.iter() if _LINK in element.attrib
    }
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
                else:
                    del element.attrib["id"]
            elif key == _LINK:
                element.set(key, f"#{name}-{value[1:]}")
            else:
                element.set(key, re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value))


def _themed(style: str) -> str:
    return re.sub(rf"{_PREFIX}([0-9a-f]{{2}})", lambda match: f"var(--{_VARIABLES[int(match.group(1), 16)]})", style)


def _name(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    attributes: dict[str, Any] = {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for key, value in attributes.items():
        root.set(key, value)
    for position, (kind, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(f"{{{_SVG}}}{kind}", {"id": f"{name}-{kind}"})
        child.text = printable(text)
        root.insert(position, child)
