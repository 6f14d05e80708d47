import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import UsageError
from quantlab.models import resolve_model
from quantlab.report.html.codebooks import codebooks
from quantlab.report.html.convergence import convergence, convergence_of_methods, curves
from quantlab.report.html.experts import experts
from quantlab.report.html.layers import grid
from quantlab.report.html.outputs import outputs
from quantlab.report.html.overview import overview
from quantlab.report.html.page import render_page
from quantlab.report.html.published import find_published, published, read_published, recipe_of
from quantlab.report.html.resources import resources
from quantlab.report.html.runs import find_runs
from quantlab.report.html.weights import RunWeights

LAYER = "model.layers.1.mlp.up_proj"
TABLES = """
- paper: A paper, Table 2
  metric: perplexity
  protocol: wikitext2
  sequence_length: 2048
  models: [opt-125m, llama-7b]
  float: [27.66, 5.68]
  ganq_w4: [28.58, 5.83]
- paper: A paper, Table 3
  metric: accuracy
  tasks: [rte]
  models: [llama-7b]
  float: [[65.70]]
  ganq_w4: [[63.18]]
- paper: A paper, Table 5
  metric: generation
  models: [llama-7b]
  float: [{cuda_s: 17.86, peak_gb: 13.06}]
  ganq_w4: [{cuda_s: 8.46, peak_gb: 4.14}]
"""


def the_run(folder):
    (run,), _ = find_runs([folder])
    return run


def edit(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    return the_run(folder)


def test_codebook_is_shown_over_the_float_weights(run_folder):
    view = RunWeights(run_folder, "demo").view(LAYER)
    assert view.is_original
    assert view.weights.shape == (192,)
    torch.testing.assert_close(view.levels, view.grid, rtol=1e-3, atol=1e-3)  # the checkpoint is rounded to nearest
    distance = (view.weights[:, None] - view.levels).abs().amin(1)
    assert distance.max() <= 0.51 * view.levels.diff().max()


def test_without_the_float_model_the_dequantized_weights_are_shown_and_named_so(run_folder):
    assert set(RunWeights(run_folder, "somebody/else").view(LAYER).weights.tolist()) == set(
        RunWeights(run_folder, "somebody/else").view(LAYER).levels.tolist()
    )
    run = edit(run_folder, lambda content: content["model"].update(path="somebody/else"))
    content = codebooks(run, "").content
    assert "192 dequantized weights" in content
    assert "not on this machine" in content


def test_weights_of_another_model_are_not_taken_for_the_original(run_folder, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(resolve_model("demo"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].flip(0).clone()
    save_file(tensors, source / "model.safetensors")
    assert not RunWeights(run_folder, str(source)).view(LAYER).is_original


def test_run_without_its_checkpoint_says_so(run_folder):
    shutil.rmtree(run_folder / "model")
    assert "They cannot be shown" in codebooks(the_run(run_folder), "").content


def test_checkpoint_of_other_layers_says_so(run_folder):
    def rename(content):
        for layer in content["layers"]:
            layer["name"] = f"other.{layer['name']}"

    assert "holds none of them" in codebooks(edit(run_folder, rename), "").content


def test_damaged_layer_is_reported_not_shown(run_folder):
    shard = next((run_folder / "model").glob("*part-2*"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "They cannot be shown" in codebooks(the_run(run_folder), "").content


def test_heat_map_shows_the_worst_expert_and_layers_outside_blocks(run_folder):
    def add_experts(content):
        template = content["layers"][0]
        content["layers"] = [
            {**template, "name": "lm_head"},
            {**template, "name": "model.layers.3.mlp.experts.0.up_proj", "relative_loss": 0.02},
            {**template, "name": "model.layers.3.mlp.experts.1.up_proj", "relative_loss": 0.03},
            {**template, "name": "model.layers.3.mlp.experts.2.up_proj", "relative_loss": 0.01},
        ]

    cells = grid(edit(run_folder, add_experts).layers)
    assert {place: layer.name for place, layer in cells.items()} == {
        ("–", "lm_head"): "lm_head",
        ("3", "mlp.experts.*.up_proj"): "model.layers.3.mlp.experts.1.up_proj",
    }


def test_coverage_of_experts_lists_the_least_covered(run_folder):
    assert experts(the_run(run_folder), "") is None

    def add_experts(content):
        template = content["layers"][0]
        names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in (0, 1) for expert in range(8)]
        content["layers"] = [{**template, "name": name, "num_tokens": 7 * i} for i, name in enumerate(names)]

    part = experts(edit(run_folder, add_experts), "")
    assert "From 0 to 105 tokens per expert in 2 blocks; 192 inputs." in part.content
    assert part.content.index("experts.<wbr>0.") < part.content.index("experts.<wbr>1.")


def test_convergence_is_drawn_for_methods_that_report_it(run_folder):
    assert convergence(the_run(run_folder), "") is None

    def add_losses(content):
        for layer in content["layers"]:
            layer["diagnostics"] = {f"loss_{iteration}": 8 / (1 + iteration) for iteration in range(12)}

    part = convergence(edit(run_folder, add_losses), "")
    assert "1 curves end at 0.083 to 0.083 of their first loss, the median at 0.083." in part.content  # solved together


def test_groups_of_layers_have_a_curve_each_and_their_median(run_folder):
    def add_losses(content):
        for block, layer in enumerate(content["layers"]):
            fall = 0.5 if block < 4 else 0.1  # q, up, down and q again were solved together
            layer["diagnostics"] = {"loss_0": 8.0, "loss_1": 8 * fall, "damping": 0.01, "loss_x": 3.0}

    run = edit(run_folder, add_losses)
    assert [curve.losses for curve in curves(run.layers)] == [(8.0, 4.0), (8.0, 0.8)]
    assert [curve.ratio for curve in curves(run.layers)] == [pytest.approx(0.3125), pytest.approx(0.5)]
    assert "2 curves end at 0.100 to 0.500 of their first loss, the median at 0.300." in convergence(run, "").content


def test_runs_of_a_comparison_come_in_order_of_merit(comparison):
    narrow = comparison / "cells" / "ganq-w3-s0"
    shutil.copytree(comparison / "cells" / "ganq-w4-s0", narrow)
    edit_bits = json.loads((narrow / "manifest.json").read_text()) | {"bits": 3}
    (narrow / "manifest.json").write_text(json.dumps(edit_bits))
    shutil.copytree(comparison / "cells" / "rtn-w4-s0", comparison / "cells" / "a-w4-s0")  # the first by name
    runs, _ = find_runs([comparison])
    assert [run.variant for run in runs] == ["ganq", "gptq", "a", "rtn", "ganq"]
    assert runs[-1].manifest["bits"] == 3


def test_methods_converge_side_by_side_as_multiples_of_round_to_nearest(comparison):
    for name, losses in (("ganq", [8.0, 4.0, 2.0]), ("gptq", [3.0, 3.0])):
        path = comparison / "cells" / f"{name}-w4-s0" / "manifest.json"
        content = json.loads(path.read_text())
        for layer in content["layers"]:
            layer |= {"relative_loss": 0.01, "rtn_relative_loss": 0.04}
            layer["diagnostics"] = {f"loss_{step}": loss for step, loss in enumerate(losses)}
        path.write_text(json.dumps(content))
    runs, _ = find_runs([comparison])
    content = convergence_of_methods(runs).content
    assert "Loss by step, 4 bits" in content
    assert "ganq from 1.000 to 0.250; gptq from 0.250 to 0.250." in content
    assert convergence_of_methods(runs[:1]) is None


def test_memory_over_time_has_the_budget_and_every_stage(run_folder):
    content = resources(the_run(run_folder), "").content
    listed = "read text up to 300 MB; quantize up to 650 MB; evaluate up to 812 MB; budget 900 MB."
    assert listed in content
    run = edit(run_folder, lambda content: content["memory"].update(budget_bytes=None))
    assert "No budget was set" in resources(run, "").content
    run = edit(run_folder, lambda content: content["memory"].pop("timeline"))  # of a former version, or not on Linux
    assert "Memory over time" not in resources(run, "").content


@pytest.mark.parametrize(
    "timeline",
    [
        {"interval_s": 0, "bytes": [1], "stages": {}},
        {"interval_s": "1", "bytes": [1], "stages": {}},
        {"interval_s": 1.0, "bytes": ["<b>"], "stages": {}},
        {"interval_s": 1.0, "bytes": [1], "stages": {"quantize": None}},
        {"bytes": [1]},
    ],
)
def test_a_timeline_that_cannot_be_drawn_is_one_clear_error(run_folder, timeline):
    with pytest.raises(UsageError, match="cannot show"):
        edit(run_folder, lambda content: content["memory"].update(timeline=timeline))


def test_speed_of_generation_is_a_column_where_it_was_measured(comparison):
    runs, _ = find_runs([comparison])
    assert "Tokens/s" not in overview(runs, []).content
    models = {"demo": {"tokens_per_s": 321.4}, "mine": {"tokens_per_s": 654.3}}
    (runs[0].folder / "profile.json").write_text(json.dumps({"models": models}))
    runs, _ = find_runs([comparison])
    content = overview(runs, []).content
    assert "Tokens/s" in content
    assert content.count(">321<") == content.count(">654<") == 1


def test_budget_and_measured_peak_stand_beside_the_expected_parts(run_folder):
    content = resources(the_run(run_folder), "").content
    assert "Expected peak 700 MB; measured while quantizing 650 MB; budget 900 MB; whole run 812 MB." in content
    assert "runtime 500 MB; weights 200 MB; measured while quantizing 650 MB; budget 900 MB." in content
    run = edit(run_folder, lambda content: content["memory"].update(budget_bytes=None))
    assert "budget 9" not in resources(run, "").content


def test_time_that_the_engine_does_not_account_for_is_shown(run_folder):
    assert (
        "quantize: forward 5.0 s; quantize: solve 6.5 s; quantize: other 0.5 s"
        in resources(the_run(run_folder), "").content
    )


@pytest.fixture
def tables(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text(TABLES)
    return read_published(path)


@pytest.mark.parametrize(
    ("recipe", "model", "found"),
    [
        ("ganq_w4", "opt-125m", [28.58]),
        ("ganq_w4_opt", "facebook/opt-125m", [28.58]),
        ("ganq_w4_llama", "llama-7b", [5.83, 63.18, 8.46, 4.14]),
        ("ganq_w3", "llama-7b", []),
        ("models", "llama-7b", []),
        ("float", "llama-7b", []),
        ("ganq_w4", "demo", []),
    ],
)
def test_published_figures_are_found_by_recipe_and_model(tables, recipe, model, found):
    assert [figure.quantized for figure in find_published(recipe, model, tables)] == found


def test_tables_that_quantlab_comes_with_name_the_recipe_and_the_model():
    figures = list(find_published("ganq_w4_opt", "opt-125m", read_published()))
    assert ("wikitext2", 2048, 28.58, 27.66) in [
        (figure.name, figure.sequence_length, figure.quantized, figure.reference) for figure in figures
    ]


def test_every_figure_that_quantlab_comes_with_has_that_of_the_float_model_beside_it():
    figures = list(find_published("ganq_w4_llama", "llama-2-7b", read_published()))
    assert [(figure.name, figure.quantized, figure.reference) for figure in figures if figure.metric == "accuracy"] == [
        ("hellaswag", 56.10, 57.12),
        ("boolq", 77.31, 77.68),
        ("rte", 65.70, 63.18),
        ("winogrande", 68.75, 69.06),
        ("arc_easy", 74.96, 76.35),
        ("arc_challenge", 42.58, 43.43),
    ]
    figures = find_published("ganq_w3_opt", "opt-6.7b", read_published())
    assert {(f.name, f.quantized, f.reference) for f in figures if f.metric == "generation"} == {
        ("cuda_s", 6.51, 16.76),
        ("peak_gb", 4.10, 12.91),
    }


def test_missing_tables_are_no_error(tmp_path):
    assert read_published(tmp_path / "published.yaml") == []


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("quantlab run recipes/paper/ganq_w4_opt.yaml --model opt-125m", "ganq_w4_opt"),
        ("quantlab run paper/ganq_w4_opt --set seed=1", "ganq_w4_opt"),
        ("quantlab run ganq_w4", ""),  # ours, not the one of a paper
        ("quantlab run 'unbalanced", ""),
        ("rm -rf /", ""),
        ("quantlab run", ""),
    ],
)
def test_recipe_is_read_from_the_command(run_folder, command, recipe):
    assert recipe_of(edit(run_folder, lambda content: content.update(command=command))) == recipe


def test_our_figures_stand_beside_the_published_ones(run_folder, tables, monkeypatch):
    monkeypatch.setattr("quantlab.report.html.published.read_published", lambda: tables)
    assert published([the_run(run_folder)]) is None
    scores = json.loads((run_folder / "eval.json").read_text())["perplexity"]["stdlib"]
    values = {**scores, "quantized": 28.7, "float": 27.65, "sequence_length": 2048}
    (run_folder / "eval.json").write_text(json.dumps({"perplexity": {"wikitext2": values}}))
    edit(run_folder, lambda content: content.update(command="quantlab run paper/ganq_w4_opt"))
    run = edit(run_folder, lambda content: content["model"].update(path="opt-125m"))
    content = published([run]).content
    for expected in ("28.70", "28.58", "+0.12", "27.65", "27.66", "A paper, Table 2", "4 windows"):
        assert expected in content
    (run_folder / "eval.json").write_text(json.dumps({"perplexity": {"wikitext2": {**values, "sequence_length": 512}}}))
    assert published([the_run(run_folder)]) is None  # other windows are another figure


@pytest.fixture
def paper_run(run_folder, tables, monkeypatch):
    """The folder of a run of a paper's recipe without any evaluation."""
    monkeypatch.setattr("quantlab.report.html.published.read_published", lambda: tables)
    (run_folder / "eval.json").write_text(json.dumps({"perplexity": {}}))
    edit(run_folder, lambda content: content.update(command="quantlab run paper/ganq_w4_llama"))
    edit(run_folder, lambda content: content["model"].update(path="llama-7b"))
    return run_folder


def write_task(folder, **changes):
    measured = {"float": {"acc": {"value": 0.6606}}, "quantized": {"acc": {"value": 0.6282}}}
    task = {"samples": 277, "num_fewshot": 0, **measured, **changes}
    (folder / "eval.json").write_text(json.dumps({"perplexity": {}, "tasks": {"rte": task}}))


def test_our_accuracies_stand_beside_the_published_ones_in_percent(paper_run):
    assert published([the_run(paper_run)]) is None
    write_task(paper_run)
    content = published([the_run(paper_run)]).content
    for expected in ("62.82", "63.18", "-0.36", "66.06", "65.7<", "rte", "277 questions", "A paper, Table 3"):
        assert expected in content
    assert "Perplexity" not in content


@pytest.mark.parametrize(
    "changes",
    [
        {"num_fewshot": 5},
        {"float": {"exact_match": {"value": 0.5}}, "quantized": {"exact_match": {"value": 0.5}}},
    ],
    ids=["few-shot", "another-metric"],
)
def test_another_kind_of_accuracy_is_not_compared(paper_run, changes):
    write_task(paper_run, **changes)
    assert published([the_run(paper_run)]) is None


def write_profile(folder, **changes):
    models = {
        "llama-7b": {"tokens_per_s": 30.0, "cuda_s": 9.9, "device_peak_bytes": 13 << 30},
        "runs/mine": {"tokens_per_s": 90.0, "cuda_s": 3.3, "device_peak_bytes": 5 << 30},
    }
    profile = {"models": models, "new_tokens": 1024, "device": "cuda:0", "device_name": "A device", **changes}
    (folder / "profile.json").write_text(json.dumps(profile))


def test_our_generation_stands_beside_the_published_one(paper_run):
    write_profile(paper_run)
    content = published([the_run(paper_run)]).content
    for expected in ("cuda_s", "3.30", "8.46", "-5.16", "9.90", "17.86", "A device", "A paper, Table 5"):
        assert expected in content
    for expected in ("peak_gb", "5.00", "4.14", "+0.86", "13.00", "13.06"):
        assert expected in content


def test_a_profile_beside_another_model_has_no_float_figure_of_ours(paper_run):
    models = {
        "gptq": {"tokens_per_s": 40.0, "cuda_s": 7.77, "device_peak_bytes": 1},
        "mine": {"tokens_per_s": 90.0, "cuda_s": 3.3, "device_peak_bytes": 1},
    }
    write_profile(paper_run, models=models)
    content = published([the_run(paper_run)]).content
    assert "3.30" in content
    assert "7.77" not in content


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"new_tokens": 64}], ids=["cpu", "fewer-tokens"])
def test_another_kind_of_generation_is_not_compared(paper_run, changes):
    write_profile(paper_run, **changes)
    assert published([the_run(paper_run)]) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"device": "cuda", "new_tokens": 1024, "models": {}}'])
def test_a_damaged_profile_is_one_clear_error(paper_run, content):
    (paper_run / "profile.json").write_text(content)
    with pytest.raises(UsageError, match=r"cannot read .*profile\.json: .*`quantlab profile .*` writes it anew"):
        published([the_run(paper_run)])


def test_output_errors_are_shown_where_they_were_measured(run_folder):
    assert outputs(find_runs([run_folder])[0][0]) is None
    errors = {"error": 0.002, "rtn_error": 0.008, "accumulated": None}
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    texts = {name: {"source": "stdlib", "windows": 2, "sequence_length": 64} for name in ("calibration", "held_out")}
    layers = [{"name": name, "calibration": {**errors, "error": 0.001}, "held_out": errors} for name in names]
    path = run_folder / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": {"texts": texts, "layers": layers}}))
    part = outputs(find_runs([run_folder])[0][0])
    for figure in ("mlp.up_proj", "1.000e-03", "2.000e-03", "0.250", "held-out text stdlib, 2 x 64 tokens"):
        assert figure in part.content
    assert "Errors on held-out text" in render_page(*find_runs([run_folder]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": {"layers": [{"name": "x"}]}}))
    with pytest.raises(UsageError, match="has a record that this version of quantlab cannot show"):
        find_runs([run_folder])
