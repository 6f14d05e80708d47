import csv
import io
import math
from pathlib import Path

import pytest

from quantlab.errors import UsageError
from quantlab.report.comparison import (
    ComparisonRow,
    FloatRow,
    Value,
    best_row,
    caption,
    comparison_row,
    csv_table,
    json_rows,
    mark_budgets,
    markdown_table,
    table_rows,
)
from quantlab.report.record import RunRecord


def record(perplexity=9.0, kl=0.1, bits_per_weight=4.0, fallbacks=(), **measured):
    return RunRecord(
        folder=Path("runs/one"),
        manifest={
            "model": {"path": "demo", "parameters": 4000},
            "bits_per_weight": bits_per_weight,
            "checkpoint_bytes": 1000,
            "source_bytes": 8000,
            "stages_s": {"quantize": 2.0},
            "memory": {"quantize_peak_rss_bytes": 5000},
            "fallbacks": list(fallbacks),
        },
        perplexity={"stdlib": {"float": 8.0, "quantized": perplexity, "kl": kl, "kl_standard_error": 0.01}},
        **measured,
    )


def task(float_accuracy, accuracy, error):
    return {
        "float": {"acc": {"value": float_accuracy, "standard_error": error}},
        "quantized": {"acc": {"value": accuracy, "standard_error": error}},
    }


def row(variant="a", bits=4, kl=0.1, error=0.001, bits_per_weight=4.0, seeds=1, **values):
    return ComparisonRow(
        variant=variant,
        bits=bits,
        seeds=seeds,
        bits_per_weight=bits_per_weight,
        quantize_s=1.0,
        perplexity={"t": Value(mean=9.0, standard_error=math.nan)},
        kl={"t": Value(mean=kl, standard_error=error)},
        reference=FloatRow(bits_per_weight=16, checkpoint_bytes=8000, perplexity={"t": 8.0}),
        **values,
    )


def test_seeds_become_a_mean_and_its_standard_error():
    result = comparison_row("ganq", 4, [record(9.0, 0.1), record(9.2, 0.2), record(9.4, 0.3)], None)
    assert (result.seeds, result.variant, result.bits) == (3, "ganq", 4)
    assert result.perplexity["stdlib"].mean == pytest.approx(9.2)
    assert result.perplexity["stdlib"].standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert result.kl["stdlib"].standard_error == pytest.approx(0.1 / math.sqrt(3))


def test_what_no_seed_changes_has_the_error_of_one_run():
    same = comparison_row("rtn", 4, [record(), record(), record()], None)
    assert same.kl["stdlib"] == Value(mean=pytest.approx(0.1), standard_error=0.01)
    assert math.isnan(same.perplexity["stdlib"].standard_error)
    assert "over windows of text and questions where seeds change nothing" in caption([same])


def test_one_seed_has_an_error_of_the_divergence_only():
    result = comparison_row("ganq", 4, [record()], None)
    assert math.isnan(result.perplexity["stdlib"].standard_error)
    assert result.kl["stdlib"].standard_error == 0.01


def test_the_best_is_marked_only_beyond_the_noise():
    def kl(other):
        return other.kl["t"]

    clear, close = [row(kl=0.1), row(kl=0.2)], [row(kl=0.1, error=0.05), row(kl=0.2, error=0.05)]
    assert best_row(clear, kl) is clear[0]
    assert best_row(close, kl) is None
    assert best_row(clear, lambda other: other.perplexity["t"]) is None  # its noise is not known
    assert best_row(clear[:1], kl) is None


def test_widths_are_judged_by_themselves():
    rows = [row("a", 4, 0.1), row("b", 4, 0.2), row("a", 3, 0.5), row("b", 3, 0.3)]
    marked = [line[0] + line[1] for line in table_rows(rows)[1:] if any(cell.endswith("*") for cell in line)]
    assert marked == ["a4", "b3"]


def test_methods_above_the_budget_are_marked():
    rows = mark_budgets([row("lean"), row("fat", bits_per_weight=4.3), row("other", 3, bits_per_weight=9.0)])
    assert [line.over_budget for line in rows] == [False, True, False]
    assert "+ stores over 5% more" in caption(rows)
    assert "4.300 +" in markdown_table(rows)


def test_a_failed_method_is_a_row_with_its_reason():
    failed = comparison_row("gptq", 4, [], "the Hessian | is singular")
    lines = markdown_table([row(), failed])
    assert "the Hessian \\| is singular" in lines
    assert csv_table([row(), failed]).count("singular") == 1


def test_csv_and_json_hold_the_same_values():
    rows = [comparison_row("ganq", 4, [record()], None)]
    line = next(csv.DictReader(io.StringIO(csv_table(rows))))
    plain = json_rows(rows)[0]
    assert float(line["kl stdlib"]) == plain["kl"]["stdlib"]["mean"] == 0.1
    assert plain["perplexity"]["stdlib"]["standard_error"] is None


def test_the_float_model_is_the_first_row():
    header, reference, *_ = table_rows([comparison_row("ganq", 4, [record()], None)])
    shown = dict(zip(header, reference, strict=True))
    assert (shown["method"], shown["bits/weight"], shown["size"]) == ("float", "16", "8 kB")
    assert shown["perplexity stdlib"] == "8.000"


def test_what_was_not_measured_is_a_dash_and_the_caption_says_how_to_measure_it():
    rows = [comparison_row("ganq", 4, [record()], None)]
    shown = dict(zip(*[table_rows(rows)[index] for index in (0, 2)], strict=True))
    assert shown["tasks"] == shown["tokens/s"] == "—"
    assert "— not measured (--tasks, --profile)" in caption(rows)
    line = next(csv.DictReader(io.StringIO(csv_table(rows))))
    assert line["accuracy"] == line["tokens_per_s"] == ""


def test_a_method_without_a_result_is_no_reason_to_call_something_unmeasured():
    profile = {"models": {"demo": {"tokens_per_s": 50.0}, "runs/one": {"tokens_per_s": 123.4}}}
    measured = comparison_row("ganq", 4, [record(tasks={"one": task(0.9, 0.6, 0.03)}, profile=profile)], None)
    rows = [measured, comparison_row("gptq", 4, [], "singular")]
    assert "not measured" not in caption(rows)
    line, failed = csv.DictReader(io.StringIO(csv_table(rows)))
    names = ("tokens_per_s", "float_tokens_per_s", "accuracy", "accuracy_se", "float_accuracy", "float stdlib")
    assert [float(line[name]) for name in names] == [123.4, 50.0, 0.6, 0.03, 0.9, 8.0]
    assert [failed["failure"], failed["accuracy"], failed["kl stdlib"]] == ["singular", None, None]


def test_accuracy_is_the_mean_over_tasks_with_the_error_over_questions():
    tasks = {"one": task(0.9, 0.6, 0.03), "two": task(0.7, 0.8, 0.04)}
    result = comparison_row("ganq", 4, [record(tasks=tasks)], None)
    assert result.accuracy == Value(mean=pytest.approx(0.7), standard_error=pytest.approx(0.025))
    assert result.reference.accuracy == pytest.approx(0.8)
    _, reference, own = table_rows([result])
    assert "80.0%" in reference
    assert "70.0% ± 2.5" in own


def test_the_highest_accuracy_is_the_best():
    low, high = (Value(mean=mean, standard_error=0.01) for mean in (0.5, 0.6))
    lines = table_rows([row("a", accuracy=low), row("b", accuracy=high)])
    assert [line[0] for line in lines if any(cell.endswith("± 1.0 *") for cell in line)] == ["b"]


def test_speed_is_that_of_the_last_model_of_the_profile():
    profile = {"models": {"demo": {"tokens_per_s": 50.0}, "runs/one": {"tokens_per_s": 123.4}}}
    result = comparison_row("ganq", 4, [record(), record(profile=profile)], None)  # of two seeds one was measured
    assert (result.tokens_per_s, result.reference.tokens_per_s) == (123.4, 50.0)
    assert table_rows([result])[2][-2] == "123 (2.47 ×)"


def test_a_damaged_profile_is_one_clear_error():
    with pytest.raises(UsageError, match=r"cannot read runs/one/profile\.json"):
        comparison_row("ganq", 4, [record(profile={"models": {"runs/one": {}}})], None)
