"""The errors of the layers' outputs on text that the run has not seen, if they were measured."""

import math

from quantlab.report.html.markup import join, tag
from quantlab.report.html.parts import Part
from quantlab.report.html.runs import Run
from quantlab.report.html.tables import NOTHING, Cell, Column, table
from quantlab.report.layer_errors import TEXTS, Row, by_role


def outputs(run: Run) -> Part | None:
    """The table of `quantlab eval --layers`; None where nobody asked for it."""
    errors = run.record.layer_errors
    if errors is None:
        return None
    texts = ", ".join(
        f"{TEXTS[name]} text {text['source']}, {text['windows']} x {text['sequence_length']} tokens"
        for name, text in errors["texts"].items()
    )
    explanation = (
        f"Squared errors of the layers' outputs as shares of the outputs, geometric means over the blocks ({texts}). "
        "Layers are given the inputs of the float model; accumulated errors have those of all layers before them."
    )
    columns = [
        Column(title="Layers", numeric=False),
        Column(title="Count"),
        Column(title="Calibration"),
        Column(title="Held-out"),
        Column(title="Held-out/RTN"),
        Column(title="Accumulated"),
    ]
    caption = "Output errors. Select a heading to sort."
    content = [tag("p", explanation), table(caption, columns, [_row(row) for row in by_role(errors["layers"])])]
    return Part(key="outputs", title="Errors on held-out text", content=join(content))


def _row(row: Row) -> list[Cell]:
    values = (row.calibration, row.held_out, row.against_rtn, row.accumulated)
    return [
        Cell(content=row.name),
        Cell(content=str(row.count), value=row.count),
        *(
            NOTHING if math.isnan(value) else Cell(content=text, value=value)
            for text, value in zip(row.cells(), values, strict=True)
        ),
    ]
