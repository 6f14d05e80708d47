"""What the runs are judged by: who is best at a code width, and by more than the noise."""

import math
from collections.abc import Sequence

from quantlab.report.comparison import NOISE
from quantlab.report.html.runs import Run


def texts(runs: Sequence[Run]) -> list[str]:
    """Every text that at least one run was evaluated on, in order of appearance."""
    return list(dict.fromkeys(text for run in runs for text in run.record.perplexity))


def value(run: Run, text: str, name: str) -> float:
    """A measured value, or NaN."""
    measured = run.record.perplexity.get(text, {}).get(name)
    return float(measured) if isinstance(measured, int | float) and math.isfinite(measured) else math.nan


def mean_ratio(run: Run) -> float:
    """Geometric mean over the layers of the loss as a multiple of round-to-nearest's; NaN without such layers."""
    logs = [math.log(layer.ratio) for layer in run.layers if layer.ratio > 0]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def rivals(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs that it is compared with, itself among them: same model, same code width."""
    return [other for other in runs if other.model == run.model and other.manifest["bits"] == run.manifest["bits"]]


def excess_bits(run: Run, group: Sequence[Run]) -> float:
    """By which share a run stores more bits per weight than the leanest of a group."""
    leanest: float = min(other.manifest["bits_per_weight"] for other in group)
    own: float = run.manifest["bits_per_weight"]
    return own / leanest - 1


def ranked(runs: Sequence[Run], text: str) -> list[Run]:
    """The runs with a divergence from the float model on a text, the closest first."""
    return sorted((run for run in runs if value(run, text, "kl") >= 0), key=lambda run: value(run, text, "kl"))


def best_two(runs: Sequence[Run], text: str) -> tuple[Run, Run] | None:
    """The run closest to the float model, and the closest of the others that do not merely repeat it."""
    order = ranked(runs, text)
    return next(((order[0], other) for other in order[1:] if not _is_repetition(order[0], other)), None)


def _is_repetition(run: Run, other: Run) -> bool:
    """Whether two runs differ in nothing but their seed, and so in the windows of text that it draws."""

    def same(run: Run) -> list[object]:
        named = [run.manifest.get(name) for name in ("method", "group_size", "bits_per_weight", "dtype")]
        drawn = run.manifest.get("calibration", {})
        return [*named, {key: value for key, value in drawn.items() if key != "token_sha256"}]

    return run.manifest.get("seed") != other.manifest.get("seed") and same(run) == same(other)


def clear_winner(runs: Sequence[Run], text: str) -> Run | None:
    """The run closest to the float model, if it is closer than the next by more than the noise of both."""
    best = best_two(runs, text)
    if best is None:
        return None
    first, second = best
    noise = math.hypot(*(value(run, text, "kl_standard_error") for run in (first, second)))
    lead = value(second, text, "kl") - value(first, text, "kl")
    return first if lead > NOISE * noise else None  # not if the noise is unknown
