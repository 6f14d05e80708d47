"""The errors of a run's layers, summed up by the place of a layer in its block."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXTS = {"calibration": "calibration", "held_out": "held-out"}
"""What the texts of `quantlab.evaluate.evaluation.evaluate_layers` are called."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Layers at the same place of different blocks: geometric means of their errors, NaN where there is none.

    Attributes:
        name: inside the block, with a star for every number.
        count: how many layers.
        calibration: error on the text that they were calibrated on.
        held_out: error on other text.
        against_rtn: the same as a multiple of round-to-nearest's.
        accumulated: on other text, with the errors of everything before the layer.
    """

    name: str
    count: int
    calibration: float
    held_out: float
    against_rtn: float
    accumulated: float

    def cells(self) -> list[str]:
        """The figures for a table."""
        values = {".3e": (self.calibration, self.held_out), ".3f": (self.against_rtn,), ".2e": (self.accumulated,)}
        return ["–" if math.isnan(value) else f"{value:{form}}" for form, own in values.items() for value in own]


def by_role(layers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per place in a block, in the order of the calls, and one for all layers.

    Args:
        layers: as `quantlab.evaluate.layers.measure_layers` returns them.
    """
    roles: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        roles.setdefault(_role(layer["name"]), []).append(layer)
    return [*(_row(name, own) for name, own in roles.items()), _row("all", layers)]


def _role(name: str) -> str:
    """The name of a layer inside its block; other numbers, as of experts, become stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(r"^.*?\.\d+\.", "", name, count=1))


def _row(name: str, layers: Sequence[Mapping[str, Any]]) -> Row:
    def mean(text: str, error: str, *, relative_to: str | None = None) -> float:
        values = [
            layer[text][error] / (layer[text][relative_to] if relative_to else 1)
            for layer in layers
            if layer[text][error] and (relative_to is None or layer[text][relative_to])
        ]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan

    return Row(
        name=name,
        count=len(layers),
        calibration=mean("calibration", "error"),
        held_out=mean("held_out", "error"),
        against_rtn=mean("held_out", "error", relative_to="rtn_error"),
        accumulated=mean("held_out", "accumulated"),
    )
