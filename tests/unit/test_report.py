import json

import pytest
from rich.console import Console

from quantlab.errors import UsageError
from quantlab.report.markdown import write_markdown
from quantlab.report.record import read_record
from quantlab.report.summary import profile_line, summary_table, verdict
from quantlab.report.units import format_bytes, format_count, format_duration


def example_manifest():
    clear = [("a.q_proj", 0.01, 0.04), ("a.k_proj", 0.05, 0.04)]
    layers = [*clear, ("a.v_proj", 0.0399, 0.04), ("a.o_proj", 0.0401, 0.04), ("a.dead", 0.0, 0.0)]
    return {
        "model": {"path": "demo", "architecture": "Llama", "parameters": 2_000_000, "quantized_parameters": 1_900_000},
        "method": {"name": "ganq", "options": {"iterations": 10}, "distribution": "quantlab-ptq", "version": "0.1.0"},
        "bits": 4,
        "group_size": None,
        "bits_per_weight": 4.25,
        "checkpoint_bytes": 1_250_000,
        "source_bytes": 4_030_000,
        "peak_rss_bytes": 812_000_000,
        "wall_s": 75.0,
        "stages_s": {"quantize": 12.34, "evaluate": 62.0},
        "layers": [
            {"name": name, "bits": 4, "relative_loss": loss, "rtn_relative_loss": baseline, "diagnostics": {}}
            for name, loss, baseline in layers
        ],
        "fallbacks": [],
        "calibration": {
            "name": "stdlib", "num_samples": 8, "sequence_length": 64, "tokens": 512, "token_sha256": "ab" * 32
        },
        "versions": {"torch": "2.13.0"},
        "command": "quantlab run ganq_w4",
        "files": {},
    }  # fmt: skip


def example_evaluation():
    values = {
        "float": 10.0,
        "quantized": 10.5,
        "kl": 0.05,
        "tokens": 256,
        "windows": 4,
        "sequence_length": 64,
        "token_sha256": "cd",
    }
    return {"perplexity": {"stdlib": values}}


@pytest.fixture
def write(tmp_path):
    def write_run(manifest=None, evaluation=None):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest or example_manifest()))
        (tmp_path / "eval.json").write_text(json.dumps(evaluation or example_evaluation()))
        return tmp_path

    return write_run


def rendered(folder):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(summary_table(read_record(folder)))
    return capture.get()


def test_table_compares_the_float_and_the_quantized_model(write):
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rendered(write()).splitlines() if "│" in line]
    assert cells == [
        ["float", "16", "4.03 MB", "10.000", "", "", ""],
        ["ganq 4-bit", "4.250", "1.25 MB", "10.500 (+0.500)", "0.0500", "12.3 s", "812 MB"],
    ]


def test_table_has_one_column_per_corpus(write):
    evaluation = example_evaluation()
    evaluation["perplexity"]["file:a.txt"] = {**evaluation["perplexity"]["stdlib"], "quantized": 9.0}
    table = rendered(write(evaluation=evaluation))
    assert "perplexity file:a.txt" in table
    assert "9.000 (-1.000)" in table


def test_groups_are_part_of_the_label(write):
    assert read_record(write({**example_manifest(), "group_size": 128})).label == "ganq 4-bit g128"


def test_width_of_the_float_model_is_shown_exactly_where_it_is_mixed(write):
    assert read_record(write({**example_manifest(), "source_bytes": 6_000_000})).source_bits_per_weight == 24


def test_verdict_states_size_perplexity_and_layers(write):
    text = verdict(read_record(write()))
    assert "4.250 bits each" in text
    assert "3.2 times smaller" in text
    assert "from 10.000 to 10.500 (+5.00%) on stdlib" in text
    assert "1% lower in 1 of 5 layers and more than 1% higher in 1." in text
    assert "fallback" not in text


def test_the_profile_names_the_largest_part_first_and_what_no_part_accounts_for(write):
    manifest = {**example_manifest(), "engine_s": {"load": 0.1, "forward": 4.34, "solve": 6.9}}
    assert profile_line(read_record(write(manifest))) == "solve 56%, forward 35%, other 8%, load 1%"


def test_memory_of_a_gpu_is_told_if_there_was_one(write):
    assert "GPU" not in write_markdown(write()).read_text()
    memory = {"device_peak_bytes": 3_000_000_000, "expected_device_peak_bytes": 4_000_000_000}
    page = write_markdown(write({**example_manifest(), "memory": memory})).read_text()
    assert "| peak GPU memory | 3 GB of tensors, expected 4 GB in all |" in page


def test_verdict_says_so_if_nothing_was_evaluated(write):
    assert "perplexity was not measured" in verdict(read_record(write(evaluation={"perplexity": {}})))


def test_fallbacks_are_never_hidden(write):
    folder = write({**example_manifest(), "fallbacks": ["a.q_proj: damping raised"]})
    assert "1 fallbacks were used" in verdict(read_record(folder))
    assert "- a.q_proj: damping raised" in write_markdown(folder).read_text()


def test_page_has_layers_provenance_and_command(write):
    text = write_markdown(write()).read_text(encoding="utf-8")
    assert text.startswith("# ganq 4-bit on demo\n")
    assert "| a.q_proj | 4 | 1.000e-02 | 4.000e-02 | 0.250 |" in text
    assert "| a.dead | 4 | 0.000e+00 | 0.000e+00 | – |" in text
    assert "| options | iterations=10 |" in text
    assert f"8 x 64 tokens, sha256 {'ab' * 32}" in text
    assert text.endswith("    quantlab run ganq_w4\n")


def test_names_cannot_inject_markup(write):
    manifest = example_manifest()
    manifest["model"]["path"] = "<script>|[x](y)\n# title"
    manifest["command"] = "quantlab run 'a\n# b'"
    text = write_markdown(write(manifest)).read_text()
    assert "<script>" not in text.replace("\\<", "")
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    assert "\\|\\[x\\]" in text


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"not the folder of a finished run: cannot read manifest.json"):
        write_markdown(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (4_334_640, "4.33 MB"), (13.5e9, "13.5 GB"), (2e12, "2 TB")],
)
def test_sizes_read_well(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (2_164_800, "2.16 M"), (6.74e9, "6.74 B")])
def test_counts_read_well(count, text):
    assert format_count(count) == text
