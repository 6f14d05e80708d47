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


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measured value.

    Attributes:
        mean: over the seeds.
        standard_error: over the seeds; with one seed over the windows of the text, where that says something about
            the difference between methods, otherwise NaN.
    """

    mean: float
    standard_error: float


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
        float_perplexity: by text.
        kl: divergence from the float model by text, nats per token.
        quantize_s: time to quantize.
        peak_rss_bytes: of the process until it had quantized.
        fallbacks: layers on which the method departed from its options, over all seeds.
    """

    variant: str
    bits: int
    seeds: int
    failure: str | None = None
    over_budget: bool = False
    bits_per_weight: float = math.nan
    checkpoint_bytes: int = 0
    perplexity: Mapping[str, Value] = field(default_factory=dict)
    float_perplexity: Mapping[str, float] = field(default_factory=dict)
    kl: Mapping[str, Value] = field(default_factory=dict)
    quantize_s: float = math.nan
    peak_rss_bytes: int = 0
    fallbacks: int = 0


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
        float_perplexity={text: values["float"] for text, values in first.items()},
        kl={
            text: _over_seeds([record.perplexity[text]["kl"] for record in records], values["kl_standard_error"])
            for text, values in first.items()
        },
        quantize_s=statistics.mean(manifest["stages_s"]["quantize"] for manifest in manifests),
        peak_rss_bytes=max(manifest["memory"]["quantize_peak_rss_bytes"] for manifest in manifests),
        fallbacks=sum(len(manifest["fallbacks"]) for manifest in manifests),
    )


def _over_seeds(values: Sequence[float], alone: float) -> Value:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else alone
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


def best_row(rows: Sequence[ComparisonRow], value: Callable[[ComparisonRow], Value]) -> ComparisonRow | None:
    """The row with the lowest value, if it is lower than the next one by more than the noise of both."""
    ranked = sorted((row for row in rows if row.seeds), key=lambda row: value(row).mean)
    if len(ranked) < 2:
        return None
    first, second = value(ranked[0]), value(ranked[1])
    noise = math.hypot(first.standard_error, second.standard_error)
    return ranked[0] if second.mean - first.mean > NOISE * noise else None  # not if the noise is unknown


def table_rows(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """The table as text, header first; the best value of a column at each code width is marked with *."""
    texts = list(next((row.perplexity for row in rows if row.seeds), {}))
    header = ["method", "bits", "bits/weight", "size"]
    for text in texts:
        header += [f"perplexity {text}", "to float", "KL to float"]
    lines = [[*header, "quantization", "peak memory", "fallbacks"]]
    for row in rows:
        if not row.seeds:
            lines.append([row.variant, str(row.bits), *[""] * (len(lines[0]) - 3), row.failure or ""])
            continue
        peers = [other for other in rows if other.bits == row.bits]
        cells = [
            row.variant + (" !" if row.failure else ""),
            str(row.bits),
            f"{row.bits_per_weight:.3f}" + (" +" if row.over_budget else ""),
            format_bytes(row.checkpoint_bytes),
        ]
        for text in texts:
            difference = row.perplexity[text].mean - row.float_perplexity[text]
            cells += [
                _shown(row, peers, _perplexity_on(text), 3),
                f"{difference:+.3f}",
                _shown(row, peers, _kl_on(text), 4),
            ]
        lines.append([*cells, format_duration(row.quantize_s), format_bytes(row.peak_rss_bytes), str(row.fallbacks)])
    return lines


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


def caption(rows: Sequence[ComparisonRow]) -> str:
    """What the marks mean, of those that occur."""
    seeds = max((row.seeds for row in rows), default=0)
    errors = "over seeds" if seeds > 1 else "over windows of text, one seed"
    notes = [f"± standard error {errors}", f"* lowest at its width by more than {NOISE:g} standard errors"]
    if any(row.over_budget for row in rows):
        notes.append(f"+ stores over {BUDGET_TOLERANCE - 1:.0%} more than the leanest method at its width")
    if any(row.failure and row.seeds for row in rows):
        notes.append("! some seeds failed")
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
    texts = list(next((row.perplexity for row in rows if row.seeds), {}))
    output = io.StringIO()
    writer = csv.writer(output)
    plain = ["variant", "bits", "seeds", "bits_per_weight", "checkpoint_bytes", "quantize_s", "peak_rss_bytes"]
    plain += ["fallbacks", "over_budget", "failure"]
    measured = [f"{name} {text}" for text in texts for name in ("perplexity", "perplexity_se", "float", "kl", "kl_se")]
    writer.writerow([*plain, *measured])
    for row in rows:
        values: list[object] = [getattr(row, name) for name in plain]
        for text in texts if row.seeds else []:
            perplexity, kl = row.perplexity[text], row.kl[text]
            values += [perplexity.mean, perplexity.standard_error, row.float_perplexity[text], kl.mean]
            values.append(kl.standard_error)
        writer.writerow(values)
    return output.getvalue()


def json_rows(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """The values for programs; what is not known is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(row)) for row in rows]
