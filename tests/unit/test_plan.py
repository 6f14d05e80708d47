import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from quantlab.calibration.tokens import window_length
from quantlab.errors import RecipeError
from quantlab.estimate import MethodProbe, block_seconds, estimate_run, probe, stored_bytes
from quantlab.known_configs import KNOWN_CONFIGS
from quantlab.models import ALIASES, DEMO, resolve_config, resolve_model
from quantlab.plan import plan_run
from quantlab.recipe import load_recipe
from quantlab.recipe.layers import assign_methods

TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def planned(*overrides, recipe="rtn_w4", config=None):
    overrides = ["calibration.sequence_length=32", "evaluation.sequence_length=32", *overrides]
    return plan_run(assign_methods(load_recipe(recipe, overrides)), config or LlamaConfig(**TINY))


def test_every_alias_has_known_dimensions():
    assert {*KNOWN_CONFIGS, DEMO} == {*ALIASES}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-125m", 125_239_296),
        ("llama-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("gpt2", 124_439_808),
    ],
)
def test_models_are_planned_from_their_known_dimensions(name, parameters):
    plan = planned("model.dtype=auto", config=resolve_config(name))
    assert plan.parameters == parameters
    assert plan.quantized_parameters > 0.3 * parameters


def test_windows_are_as_long_as_asked_or_as_the_context_allows():
    assert window_length(None, LlamaConfig(max_position_embeddings=512)) == 512
    assert window_length(None, LlamaConfig(max_position_embeddings=8192)) == 2048
    assert window_length(64, LlamaConfig(max_position_embeddings=512)) == 64


def test_layer_rules_change_what_is_planned():
    plan = planned('layers=[{match: "*.down_proj", bits: 8}, {match: "model.layers.0.*", skip: true}]')
    by_name = {layer.name: layer.method for layer in plan.layers}
    assert by_name["model.layers.0.mlp.down_proj"] is None
    assert by_name["model.layers.1.mlp.down_proj"].spec.bits == 8
    assert by_name["model.layers.1.mlp.up_proj"].spec.bits == 4
    assert len(plan.quantized) == 7


def test_every_problem_is_found_at_once():
    with pytest.raises(RecipeError) as caught:
        planned(
            "method.group_size=48",
            'layers=[{match: "*.nothing", bits: 3}]',
            "calibration.name=file:a.txt",
            "evaluation.perplexity=[file:a.txt]",
            "evaluation.sequence_length=4096",
            "engine.memory_budget=1MiB",
        )
    message = str(caught.value)
    for part in (
        "cannot be run on this model: 5 problems",
        "model.layers.0.self_attn.q_proj and 11 more: in_features=64 is not a multiple of group_size=48",
        "layers[0].match '*.nothing' matches no layer",
        "calibration and evaluation both read file:a.txt",
        "evaluation.sequence_length=4096 is longer than the model's context of 2048",
        "engine.memory_budget=1 MiB is too small",
    ):
        assert part in message


def test_statistics_that_experts_cannot_give_are_refused_before_any_work():
    config = MixtralConfig(**TINY, num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(RecipeError, match="is a mixture of experts"):
        planned("calibration.target_alpha=0.5", config=config, recipe="gptq_w4")


def test_rules_that_keep_every_layer_leave_nothing_to_do():
    with pytest.raises(RecipeError, match="nothing is left to quantize"):
        planned('layers=[{match: "*", skip: true}]')


@pytest.mark.parametrize("recipe", ["rtn_w4", "ganq_w4", "kmeans_w4"])
def test_expected_storage_is_what_a_run_stores(recipe, tmp_path):
    overrides = ["calibration.num_samples=1", "calibration.sequence_length=32", "evaluation.perplexity=[]"]
    assignment = assign_methods(load_recipe(recipe, overrides))
    config = resolve_config("demo")
    estimate = estimate_run(plan_run(assignment, config), config, torch.float32, None)
    rows = 512  # of down_proj's input, the widest layer of the demo model
    assert estimate.bits_per_weight == pytest.approx(
        sum(estimate.layer_bytes.values()) * 8 / plan_run(assignment, resolve_config("demo")).quantized_parameters
    )
    per_layer = stored_bytes((192, rows), assignment.default, probe(assignment.default))
    assert estimate.layer_bytes["model.layers.0.mlp.down_proj"] == per_layer
    assert all(seconds > 0 for seconds in estimate.seconds.values())


@pytest.mark.parametrize("name", ["opt-125m", "gpt2", "mixtral"])
def test_the_time_of_a_block_is_measured_without_weights(name):
    config = (
        MixtralConfig(**TINY, num_local_experts=4, num_key_value_heads=2) if name == "mixtral" else resolve_config(name)
    )
    assert block_seconds(config, torch.float32) > 0


def test_the_time_to_solve_grows_with_the_inputs_of_a_layer():
    probed = MethodProbe(codebook="lut", outlier_share=0.0, weight_s=1e-6, weight_input_s=1e-9)
    assert probed.seconds((10, 100)) == pytest.approx(1000 * (1e-6 + 1e-7))
    assert probed.seconds((10, 10_000)) == pytest.approx(100_000 * (1e-6 + 1e-5))


def test_times_are_scaled_from_a_run_by_the_work_of_both(tmp_path):
    overrides = ["calibration.num_samples=2", "calibration.sequence_length=32", "evaluation.perplexity=[]"]
    config = resolve_config("demo")
    plan = plan_run(assign_methods(load_recipe("rtn_w4", overrides)), config)
    seconds = {"load": 1.0, "forward": 8.0, "statistics": 4.0, "solve": 2.0, "write": 3.0}
    record = {
        "layers": [{"shape": list(layer.shape)} for layer in plan.quantized],
        "calibration": {"tokens": plan.calibration_tokens // 2},
        "written_bytes": (plan.hidden_states_written + 2_000_000) // 2,
        "engine_s": seconds,
        "method": {"name": "rtn"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    estimate = estimate_run(plan, config, torch.float32, tmp_path)
    assert estimate.seconds["forward"] == pytest.approx(16)
    assert estimate.seconds["statistics"] == pytest.approx(8)
    assert estimate.seconds["solve"] == pytest.approx(2)
    assert estimate.seconds["write"] == pytest.approx(6, rel=0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of different sizes: the demo, a wide one, and one with a large vocabulary."""
    folders = {"demo": resolve_model("demo")}
    sizes = {
        "wide": {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 1024},
        "vocabulary": {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 64_000},
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_model("demo"))
    for name, size in sizes.items():
        torch.manual_seed(0)
        config = LlamaConfig(**size, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=512)
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "wide", "vocabulary"])
def test_the_planned_peak_memory_is_within_a_quarter_of_the_measured_one(models, name, tmp_path):
    command = [sys.executable, "-m", "quantlab", "run", "gptq_w4", "--model", str(models[name]), "-q"]
    settings = ["calibration.num_samples=64", "calibration.sequence_length=512", "evaluation.perplexity=[]"]
    command += [f"--set={setting}" for setting in settings]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True, capture_output=True)
    memory = json.loads((tmp_path / "run" / "manifest.json").read_text())["memory"]
    assert memory["expected_peak_bytes"] == pytest.approx(memory["quantize_peak_rss_bytes"], rel=0.25)
