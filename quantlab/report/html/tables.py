"""Tables that can be sorted, and lists of facts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.report.html.markup import Html, join, tag


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table.

    Attributes:
        content: what is shown.
        value: what a numeric column is sorted by; NaN comes last.
        note: shown below the content in small print.
        marked: whether it is emphasised as the best of its column.
    """

    content: str
    value: float | None = None
    note: str | None = None
    marked: bool = False


NOTHING = Cell(content="–", value=math.nan)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head.
        numeric: whether it is aligned and sorted as numbers.
        unit: below the title in small print.
    """

    title: str
    numeric: bool = True
    unit: str | None = None


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Html:
    """A table whose columns can be sorted, inside a region that scrolls where the screen is narrow.

    Args:
        caption: says what is in it.
        columns: its heads.
        rows: cells by column; the first is the head of its row.
    """
    head = tag("tr", *(_head(column) for column in columns))
    body = join(tag("tr", *(_cell(index, cell, columns[index]) for index, cell in enumerate(row))) for row in rows)
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body), class_="sortable")
    return scrolling(content, caption)


def scrolling(content: Html, label: str) -> Html:
    """A region that can be scrolled with the keyboard, too."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names with their values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def _head(column: Column) -> Html:
    unit = None if column.unit is None else tag("small", column.unit)
    button = tag("button", tag("span", column.title, unit), type="button")
    return tag("th", button, scope="col", class_="number" if column.numeric else None)


def _cell(index: int, cell: Cell, column: Column) -> Html:
    content: str = tag("strong", cell.content) if cell.marked else cell.content
    note = None if cell.note is None else tag("small", cell.note)
    classes = "number" if column.numeric else None
    value = None if cell.value is None else repr(float(cell.value))
    if index == 0:
        return tag("th", content, note, scope="row", class_=classes, data_value=value)
    return tag("td", content, note, class_=classes, data_value=value)
