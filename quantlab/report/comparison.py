"""The table of a comparison: one row per method variant and code width, seeds taken together."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from quantlab.report.record import RunRecord
from quantlab.report.units import format_bytes, format_duration

BUDGET_TOLERANCE = 1.05
"""A method that stores more than this many times the bits of the leanest at the same code width is marked."""

NOISE = 2.0
"""A difference counts if it exceeds this many standard errors."""

NOT_MEASURED = "—"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measured value.

    Attributes:
        mean: over the seeds; NaN if it was not measured.
        standard_error: over the seeds; with one seed, or where no seed changes the value, over the windows of the text
            or the questions of the tasks, where that says something about the difference between methods, otherwise
            NaN.
    """

    mean: float
    standard_error: float


UNKNOWN = Value(mean=math.nan, standard_error=math.nan)


@dataclass(frozen=True, kw_only=True)
class FloatRow:
    """The model that all methods started from.

    Attributes:
        bits_per_weight: stored bits per parameter.
        checkpoint_bytes: of its weight files.
        perplexity: by text.
        accuracy: mean over the tasks; NaN without tasks.
        tokens_per_s: of its generation, in turns with the quantized models; NaN if not measured.
    """

    bits_per_weight: float
    checkpoint_bytes: int
    perplexity: Mapping[str, float]
    accuracy: float = math.nan
    tokens_per_s: float = math.nan


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One method variant at one code width.

    Attributes:
        variant: as the user wrote it.
        bits: code width.
        seeds: finished runs behind the row.
        failure: why runs failed or are missing, or None.
        over_budget: whether it stores notably more than the leanest method at this code width.
        bits_per_weight: over the quantized weights.
        checkpoint_bytes: of the checkpoint.
        perplexity: by text.
        kl: divergence from the float model by text, nats per token.
        accuracy: mean over the tasks.
        quantize_s: time to quantize.
        peak_rss_bytes: of the process until it had quantized.
        tokens_per_s: of generation; NaN if not measured. The float model's in `reference` was measured in turns with
            it, so that their ratio says more than either.
        fallbacks: layers on which the method departed from its options, over all seeds.
        reference: the float model, as measured beside it; None without finished runs.
    """

    variant: str
    bits: int
    seeds: int
    failure: str | None = None
    over_budget: bool = False
    bits_per_weight: float = math.nan
    checkpoint_bytes: int = 0
    perplexity: Mapping[str, Value] = field(default_factory=dict)
    kl: Mapping[str, Value] = field(default_factory=dict)
    accuracy: Value = UNKNOWN
    quantize_s: float = math.nan
    peak_rss_bytes: int = 0
    tokens_per_s: float = math.nan
    fallbacks: int = 0
    reference: FloatRow | None = None


def comparison_row(variant: str, bits: int, records: Sequence[RunRecord], failure: str | None) -> ComparisonRow:
    """The row of one method variant at one code width.

    Args:
        variant: its label.
        bits: code width.
        records: of the finished runs, one per seed.
        failure: why runs failed or are missing, or None.
    """
    if not records:
        return ComparisonRow(variant=variant, bits=bits, seeds=0, failure=failure)
    manifests = [record.manifest for record in records]
    first = records[0].perplexity
    return ComparisonRow(
        variant=variant,
        bits=bits,
        seeds=len(records),
        failure=failure,
        bits_per_weight=statistics.mean(manifest["bits_per_weight"] for manifest in manifests),
        checkpoint_bytes=manifests[0]["checkpoint_bytes"],
        perplexity={
            text: _over_seeds([record.perplexity[text]["quantized"] for record in records], math.nan) for text in first
        },
        kl={
            text: _over_seeds([record.perplexity[text]["kl"] for record in records], values["kl_standard_error"])
            for text, values in first.items()
        },
        accuracy=_over_seeds(
            [_or_nan(record.mean_accuracy("quantized")) for record in records], records[0].accuracy_error("quantized")
        ),
        quantize_s=statistics.mean(manifest["stages_s"]["quantize"] for manifest in manifests),
        peak_rss_bytes=max(manifest["memory"]["quantize_peak_rss_bytes"] for manifest in manifests),
        tokens_per_s=_measured([record.tokens_per_s("quantized") for record in records]),
        fallbacks=sum(len(manifest["fallbacks"]) for manifest in manifests),
        reference=FloatRow(
            bits_per_weight=records[0].source_bits_per_weight,
            checkpoint_bytes=manifests[0]["source_bytes"],
            perplexity={text: values["float"] for text, values in first.items()},
            accuracy=_or_nan(records[0].mean_accuracy("float")),
            tokens_per_s=_measured([record.tokens_per_s("float") for record in records]),
        ),
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _measured(values: Sequence[float]) -> float:
    """The first that was measured; NaN if none was."""
    return next((value for value in values if not math.isnan(value)), math.nan)


def _over_seeds(values: Sequence[float], alone: float) -> Value:
    if any(map(math.isnan, values)):
        return UNKNOWN
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(set(values)) > 1 else alone
    return Value(mean=statistics.mean(values), standard_error=spread)


def mark_budgets(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows, those marked that store notably more than the leanest method at the same code width."""
    leanest: dict[int, float] = {}
    for row in rows:
        if row.seeds:
            leanest[row.bits] = min(leanest.get(row.bits, math.inf), row.bits_per_weight)
    return [
        replace(row, over_budget=bool(row.seeds) and row.bits_per_weight > BUDGET_TOLERANCE * leanest[row.bits])
        for row in rows
    ]


def best_row(
    rows: Sequence[ComparisonRow], value: Callable[[ComparisonRow], Value], *, highest: bool = False
) -> ComparisonRow | None:
    """The row with the lowest value, if it is lower than the next one by more than the noise of both.

    Args:
        rows: that compete.
        value: of a row; rows without one take no part.
        highest: look for the highest value instead.
    """
    sign = -1 if highest else 1
    known = [row for row in rows if row.seeds and not math.isnan(value(row).mean)]
    ranked = sorted(known, key=lambda row: sign * value(row).mean)
    if len(ranked) < 2:
        return None
    first, second = value(ranked[0]), value(ranked[1])
    noise = math.hypot(first.standard_error, second.standard_error)
    lead = sign * (second.mean - first.mean)
    return ranked[0] if lead > NOISE * noise else None  # not if the noise is unknown


def table_rows(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """The table as text: header, float model, methods; the best value of a column at each code width has a *."""
    texts = _texts(rows)
    header = ["method", "bits", "bits/weight", "size"]
    for text in texts:
        header += [f"perplexity {text}", "to float", "KL to float"]
    lines = [[*header, "tasks", "quantization", "peak memory", "tokens/s", "fallbacks"]]
    reference = next((row.reference for row in rows if row.reference is not None), None)
    if reference is not None:
        lines.append(_float_cells(reference, texts))
    for row in rows:
        if row.seeds:
            lines.append(_cells(row, [other for other in rows if other.bits == row.bits], texts))
        else:
            lines.append([row.variant, str(row.bits), *[""] * (len(lines[0]) - 3), row.failure or ""])
    return lines


def _texts(rows: Sequence[ComparisonRow]) -> list[str]:
    return list(next((row.perplexity for row in rows if row.seeds), {}))


def _float_cells(reference: FloatRow, texts: Sequence[str]) -> list[str]:
    bits = f"{reference.bits_per_weight:.4g}"
    cells = ["float", "", bits, format_bytes(reference.checkpoint_bytes)]
    for text in texts:
        cells += [f"{reference.perplexity[text]:.3f}", "", ""]
    return [*cells, _percent(reference.accuracy), "", "", _speed(reference.tokens_per_s), ""]


def _cells(row: ComparisonRow, peers: Sequence[ComparisonRow], texts: Sequence[str]) -> list[str]:
    cells = [
        row.variant + (" !" if row.failure else ""),
        str(row.bits),
        f"{row.bits_per_weight:.3f}" + (" +" if row.over_budget else ""),
        format_bytes(row.checkpoint_bytes),
    ]
    for text in texts:
        reference = math.nan if row.reference is None else row.reference.perplexity[text]
        cells += [
            _shown(row, peers, _perplexity_on(text), 3),
            f"{row.perplexity[text].mean - reference:+.3f}",
            _shown(row, peers, _kl_on(text), 4),
        ]
    return [
        *cells,
        _shown_accuracy(row, peers),
        format_duration(row.quantize_s),
        format_bytes(row.peak_rss_bytes),
        _speed(row.tokens_per_s, math.nan if row.reference is None else row.tokens_per_s / row.reference.tokens_per_s),
        str(row.fallbacks),
    ]


def _perplexity_on(text: str) -> Callable[[ComparisonRow], Value]:
    return lambda row: row.perplexity[text]


def _kl_on(text: str) -> Callable[[ComparisonRow], Value]:
    return lambda row: row.kl[text]


def _shown(
    row: ComparisonRow, peers: Sequence[ComparisonRow], value: Callable[[ComparisonRow], Value], digits: int
) -> str:
    own = value(row)
    spread = "" if math.isnan(own.standard_error) else f" ± {own.standard_error:.{digits}f}"
    return f"{own.mean:.{digits}f}{spread}{' *' if best_row(peers, value) is row else ''}"


def _shown_accuracy(row: ComparisonRow, peers: Sequence[ComparisonRow]) -> str:
    own = row.accuracy
    spread = "" if math.isnan(own.standard_error) else f" ± {100 * own.standard_error:.1f}"
    is_best = best_row(peers, lambda other: other.accuracy, highest=True) is row
    return f"{_percent(own.mean)}{spread}{' *' if is_best else ''}"


def _percent(share: float) -> str:
    return NOT_MEASURED if math.isnan(share) else f"{share:.1%}"


def _speed(tokens_per_s: float, of_float: float = math.nan) -> str:
    if math.isnan(tokens_per_s):
        return NOT_MEASURED
    return f"{tokens_per_s:.3g}" + ("" if math.isnan(of_float) else f" ({of_float:.2f} ×)")


def caption(rows: Sequence[ComparisonRow]) -> str:
    """What the marks mean, of those that occur."""
    seeds = max((row.seeds for row in rows), default=0)
    alone = "over windows of text and questions"
    errors = f"over seeds; {alone} where seeds change nothing" if seeds > 1 else f"{alone}, one seed"
    notes = [f"± standard error {errors}", f"* best at its width by more than {NOISE:g} standard errors"]
    if any(row.over_budget for row in rows):
        notes.append(f"+ stores over {BUDGET_TOLERANCE - 1:.0%} more than the leanest method at its width")
    if any(row.failure and row.seeds for row in rows):
        notes.append("! some seeds failed")
    missing = [
        flag
        for flag, values in (
            ("--tasks", [row.accuracy.mean for row in rows if row.seeds]),
            ("--profile", [row.tokens_per_s for row in rows if row.seeds]),
        )
        if any(map(math.isnan, values))
    ]
    if missing:
        notes.append(f"{NOT_MEASURED} not measured ({', '.join(missing)})")
    return "; ".join(notes)


def rich_table(rows: Sequence[ComparisonRow]) -> Table:
    """The table for the terminal."""
    header, *lines = table_rows(rows)
    table = Table(header_style="bold", caption=caption(rows), caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for previous, line in zip([None, *lines], lines, strict=False):
        if previous is not None and previous[1] != line[1]:
            table.add_section()
        table.add_row(*line)
    return table


def markdown_table(rows: Sequence[ComparisonRow]) -> str:
    """The table as Markdown."""
    header, *lines = table_rows(rows)
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [header, *lines]]
    ruler = ["---", *["---:"] * (len(header) - 1)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], ruler, *escaped[1:]])
    return f"{body}\n\n{caption(rows)}\n"


def csv_table(rows: Sequence[ComparisonRow]) -> str:
    """The values as CSV, one line per row."""
    texts = _texts(rows)
    output = io.StringIO()
    writer = csv.writer(output)
    plain = ["variant", "bits", "seeds", "bits_per_weight", "checkpoint_bytes", "quantize_s", "peak_rss_bytes"]
    plain += ["tokens_per_s", "fallbacks", "over_budget", "failure"]
    measured = [f"{name} {text}" for text in texts for name in ("perplexity", "perplexity_se", "float", "kl", "kl_se")]
    writer.writerow([*plain, "float_tokens_per_s", "accuracy", "accuracy_se", "float_accuracy", *measured])
    for row in rows:
        values: list[object] = [getattr(row, name) for name in plain]
        if row.reference is not None:
            accuracy = row.accuracy
            values += [row.reference.tokens_per_s, accuracy.mean, accuracy.standard_error, row.reference.accuracy]
            for text in texts:
                perplexity, kl = row.perplexity[text], row.kl[text]
                values += [perplexity.mean, perplexity.standard_error, row.reference.perplexity[text]]
                values += [kl.mean, kl.standard_error]
        unknown = [isinstance(value, float) and math.isnan(value) for value in values]
        writer.writerow(["" if missing else value for value, missing in zip(values, unknown, strict=True)])
    return output.getvalue()


def json_rows(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """The values for programs; what is not known is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(row)) for row in rows]
