"""The verdict, and the table of all runs."""

import math
from collections.abc import Sequence

from quantlab.report.comparison import BUDGET_TOLERANCE
from quantlab.report.html.markup import Html, tag
from quantlab.report.html.parts import Part
from quantlab.report.html.runs import Failure, Run
from quantlab.report.html.scores import (
    best_two,
    clear_winner,
    excess_bits,
    mean_ratio,
    ranked,
    rivals,
    texts,
    value,
)
from quantlab.report.html.tables import NOTHING, Cell, Column, table
from quantlab.report.summary import verdict as verdict_of_one
from quantlab.report.units import format_bytes, format_duration


def verdict(runs: Sequence[Run], failures: Sequence[Failure]) -> str:
    """The result in a few sentences."""
    if len(runs) == 1 and not failures:
        return verdict_of_one(runs[0].record)
    sentences = [_sentence(group, text) for group in _groups(runs) for text in texts(group)[:1]]
    if not any(sentences):
        sentences = ["No two runs of the same model and code width were evaluated on the same text."]
    lost = f"{len(failures)} {'cells have' if len(failures) > 1 else 'cell has'} no result." if failures else ""
    return " ".join(sentence for sentence in [*sentences, lost] if sentence)


def overview(runs: Sequence[Run], failures: Sequence[Failure]) -> Part:
    """All runs beside their float models."""
    content = [_tiles(runs[0])] if len(runs) == 1 else []
    content.append(_table(runs))
    content.append(
        tag(
            "p",
            tag(
                "small",
                "KL is the mean divergence from the float model in nats per token, ± its standard error. It is marked "
                "if it is lower than that of every other run of the same model and code width, its own with other "
                "seeds aside, by more than twice the standard error of the difference. Below bits per weight stands by "
                "how much they exceed the leanest of these runs. Loss/RTN is the loss of a layer as a multiple of "
                "round-to-nearest's at the same bits, the geometric mean over the layers.",
            ),
        )
    )
    return Part(key="summary", title="Summary", content=Html("".join([*content, *_failures(failures)])))


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same model and code width, where there are several."""
    groups = {id(group[0]): group for group in (rivals(run, runs) for run in runs)}
    return [group for group in groups.values() if len(group) > 1]


def _sentence(group: Sequence[Run], text: str) -> str:
    best = best_two(group, text)
    if best is None:
        return ""
    first, second = best
    low, high = value(first, text, "quantized"), value(first, text, "float")
    among = f"Of the {len(ranked(group, text))} runs at {first.manifest['bits']} bits on {first.model}"
    result = f"{among}, {first.label} is closest to the float model: KL {value(first, text, 'kl'):.4f} on {text}"
    perplexity = f"perplexity {low:.3f} against {high:.3f}"
    excess = excess_bits(first, group)
    budget = f", with {excess:.0%} more bits per weight than the leanest" if 1 + excess > BUDGET_TOLERANCE else ""
    runner_up = f"{second.label} follows with {value(second, text, 'kl'):.4f}"
    within = "" if clear_winner(group, text) else ", which is within the noise"
    return f"{result}, {perplexity}{budget}; {runner_up}{within}."


def _tiles(run: Run) -> Html:
    manifest = run.manifest
    tiles = [
        ("Bits per weight", f"{manifest['bits_per_weight']:.3f}", f"{run.record.source_bits_per_weight:.4g} in float"),
        (
            "Checkpoint",
            format_bytes(manifest["checkpoint_bytes"]),
            f"{manifest['source_bytes'] / manifest['checkpoint_bytes']:.1f} times smaller",
        ),
    ]
    for text in texts([run])[:1]:
        reference, quantized = value(run, text, "float"), value(run, text, "quantized")
        tiles.append((f"Perplexity, {text}", f"{quantized:.3f}", f"{quantized - reference:+.3f} from {reference:.3f}"))
        if value(run, text, "kl") >= 0:
            agreement = value(run, text, "top1_agreement")
            note = "nats per token" if math.isnan(agreement) else f"same likeliest token: {agreement:.1%}"
            tiles.append(("KL from float", f"{value(run, text, 'kl'):.4f}", note))
    if not math.isnan(mean_ratio(run)):
        tiles.append(("Loss against RTN", f"{mean_ratio(run):.3f} ×", "geometric mean of the layers"))
    tiles.append(("Quantization", format_duration(manifest["stages_s"]["quantize"]), _peak(run)))
    entries = (tag("div", tag("dt", name), tag("dd", figure, tag("small", note))) for name, figure, note in tiles)
    return tag("dl", *entries, class_="tiles")


def _table(runs: Sequence[Run]) -> Html:
    measured = texts(runs)
    columns = [Column(title="Run", numeric=False), Column(title="Bits/weight"), Column(title="Size")]
    for text in measured:
        columns += [Column(title="Perplexity", unit=text), Column(title="KL", unit=text)]
    with_tasks = any(run.record.mean_accuracy("quantized") is not None for run in runs)
    if with_tasks:
        columns.append(Column(title="Tasks", unit="mean accuracy"))
    with_speed = not all(math.isnan(run.record.tokens_per_s("quantized")) for run in runs)
    columns += [Column(title=title) for title in ("Loss/RTN", "Quantization", "Peak memory")]
    if with_speed:
        columns.append(Column(title="Tokens/s"))
    columns.append(Column(title="Fallbacks"))
    models = list(dict.fromkeys(run.model for run in runs))
    rows = []
    for model in models:
        own = [run for run in runs if run.model == model]
        rows.append(_float_row(own, measured, with_tasks, with_speed))
        rows += [_row(run, own, measured, with_tasks, with_speed, model if len(models) > 1 else None) for run in own]
    return table("All runs beside the float model. Select a heading to sort.", columns, rows)


def _float_row(runs: Sequence[Run], measured: Sequence[str], with_tasks: bool, with_speed: bool) -> list[Cell]:
    bits, size = runs[0].record.source_bits_per_weight, runs[0].manifest["source_bytes"]
    cells = [
        Cell(content="float", note=runs[0].model),
        Cell(content=f"{bits:.4g}", value=bits),
        Cell(content=format_bytes(size), value=size),
    ]
    for text in measured:
        known = [value(run, text, "float") for run in runs if value(run, text, "float") > 0]
        cells += [Cell(content=f"{known[0]:.3f}", value=known[0]) if known else NOTHING, NOTHING]
    if with_tasks:
        known = [accuracy for run in runs if (accuracy := run.record.mean_accuracy("float")) is not None]
        cells.append(Cell(content=f"{known[0]:.2%}", value=known[0]) if known else NOTHING)
    cells += [NOTHING] * 3
    if with_speed:
        speeds = [run.record.tokens_per_s("float") for run in runs]
        cells.append(_speed(next((speed for speed in speeds if not math.isnan(speed)), math.nan)))
    return [*cells, NOTHING]


def _row(
    run: Run, runs: Sequence[Run], measured: Sequence[str], with_tasks: bool, with_speed: bool, model: str | None
) -> list[Cell]:
    manifest = run.manifest
    bits, size = manifest["bits_per_weight"], manifest["checkpoint_bytes"]
    excess = excess_bits(run, rivals(run, runs))
    cells = [
        Cell(content=run.label, note=model),
        Cell(content=f"{bits:.3f}", value=bits, note=f"+{excess:.0%}" if 1 + excess > BUDGET_TOLERANCE else None),
        Cell(content=format_bytes(size), value=size),
    ]
    for text in measured:
        cells += [_perplexity(run, text), _divergence(run, runs, text)]
    if with_tasks:
        cells.append(_accuracy(run))
    ratio, seconds = mean_ratio(run), manifest["stages_s"]["quantize"]
    peak, fallbacks = manifest["peak_rss_bytes"], len(manifest["fallbacks"])
    return [
        *cells,
        NOTHING if math.isnan(ratio) else Cell(content=f"{ratio:.3f}", value=ratio),
        Cell(content=format_duration(seconds), value=seconds),
        Cell(content=format_bytes(peak), value=peak),
        *([_speed(run.record.tokens_per_s("quantized"), run.record.tokens_per_s("float"))] if with_speed else []),
        Cell(content=str(fallbacks), value=fallbacks),
    ]


def _speed(tokens_per_s: float, in_float: float = math.nan) -> Cell:
    if math.isnan(tokens_per_s):
        return NOTHING
    note = None if math.isnan(in_float) else f"{tokens_per_s / in_float:.2f} × float"
    return Cell(content=f"{tokens_per_s:.3g}", value=tokens_per_s, note=note)


def _perplexity(run: Run, text: str) -> Cell:
    quantized = value(run, text, "quantized")
    if math.isnan(quantized):
        return NOTHING
    return Cell(content=f"{quantized:.3f}", value=quantized, note=f"{quantized - value(run, text, 'float'):+.3f}")


def _accuracy(run: Run) -> Cell:
    own, reference = (run.record.mean_accuracy(model) for model in ("quantized", "float"))
    if own is None or reference is None:
        return NOTHING
    return Cell(content=f"{own:.2%}", value=own, note=f"{100 * (own - reference):+.2f} points")


def _divergence(run: Run, runs: Sequence[Run], text: str) -> Cell:
    divergence, error = value(run, text, "kl"), value(run, text, "kl_standard_error")
    if math.isnan(divergence):
        return NOTHING
    return Cell(
        content=f"{divergence:.4f}",
        value=divergence,
        note=None if math.isnan(error) else f"± {error:.4f}",
        marked=clear_winner(rivals(run, runs), text) is run,
    )


def _peak(run: Run) -> str:
    return f"peak memory {format_bytes(run.manifest['peak_rss_bytes'])}"


def _failures(failures: Sequence[Failure]) -> list[Html]:
    if not failures:
        return []
    items = (tag("li", tag("strong", failure.label), f": {failure.reason}") for failure in failures)
    return [tag("h3", "Without a result"), tag("ul", *items, class_="warning")]
