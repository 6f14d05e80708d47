import json
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantlab.api import CodebookSpec, QuantizerInfo, Statistic
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine import memory, stream
from quantlab.engine.journal import Journal
from quantlab.engine.linears import find_linears
from quantlab.engine.memory import RUNTIME_BYTES, plan_memory
from quantlab.engine.options import EngineOptions, single_threaded
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import StatisticsOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.engine.survey import survey_model
from quantlab.errors import QualityError, RecipeError
from quantlab.progress import NoProgress
from quantlab.skeleton import find_blocks
from quantlab.solvers.grid import round_to_nearest

ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3"]
SPEC = CodebookSpec(bits=4)


@dataclass(frozen=True)
class Rounding:
    """Round-to-nearest; keeps the Hessians it is given."""

    seen: dict
    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="rounding", summary="", paper="", bits=frozenset({4}), needs=frozenset({Statistic.HESSIAN})
    )

    def quantize(self, problem):
        self.seen[problem.name] = problem.statistics.hessian
        return round_to_nearest(problem.weight, problem.spec)


@dataclass(frozen=True)
class AnyBits(Rounding):
    info: ClassVar[QuantizerInfo] = replace(Rounding.info, bits=frozenset({4, 8}))


def quantize(folder, target, token_ids, dtype=torch.float32, **settings):
    method = Rounding({})
    settings = {"options_of": lambda layer: SolveOptions(quantizer=method, spec=SPEC)} | settings
    request = StreamRequest(source=folder, calibration_ids=token_ids, dtype=dtype, **settings)
    work = target.parent / f"{target.name}-work"
    work.mkdir()
    writer = CheckpointWriter(target)
    with Journal.opened(work) as journal:
        result = quantize_model(request, writer, journal, work, NoProgress())
    config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    section = QuantizationConfig(
        method={"name": "rounding", "options": {}},
        producer={"name": "test", "version": "0"},
        modules=result.modules,
        unfused_experts=result.unfused_experts,
    )
    writer.finish(folder, config, section)
    return result, method.seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_that_are_not_run_again_change_nothing_but_the_time(
    model_folder, token_ids, tmp_path, monkeypatch, architecture
):
    kept = []
    keep = stream.Recall.begin_last_pass
    monkeypatch.setattr(stream.Recall, "begin_last_pass", lambda recall: kept.append(len(recall._kept)) or keep(recall))
    recalled, hessians = quantize(model_folder(architecture), tmp_path / "recalled", token_ids)
    assert kept
    assert all(kept)
    monkeypatch.setattr(stream, "RECALLED_BYTES", 0)
    plain, plain_hessians = quantize(model_folder(architecture), tmp_path / "plain", token_ids)
    assert torch.equal(recalled.check_logits, plain.check_logits)
    assert all(torch.equal(hessians[name], plain_hessians[name]) for name in plain_hessians)
    assert recalled.layers == plain.layers
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "recalled" / path.name).read_bytes()


def test_within_a_memory_budget_nothing_is_kept(model_folder, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "Recall", None)
    quantize(model_folder("llama"), tmp_path / "model", token_ids, engine=EngineOptions(memory_budget_bytes=2**31))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_checkpoint_reproduces_the_streamed_model_bit_for_bit(model_folder, token_ids, tmp_path, architecture):
    result, _ = quantize(model_folder(architecture), tmp_path / "model", token_ids)
    model = load(tmp_path / "model")
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "LutLinear"}
    assert quantized == set(result.modules) == {layer.name for layer in result.layers}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_layer_inside_the_blocks_is_rounded_and_nothing_else_changes(
    model_folder, token_ids, tmp_path, architecture
):
    result, _ = quantize(model_folder(architecture), tmp_path / "model", token_ids)
    expected = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    for block in find_blocks(expected)[1]:
        for linear in find_linears(block).values():
            weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
            weight.copy_(round_to_nearest(weight, SPEC).dequantize())
    logits = expected(input_ids=result.check_ids, use_cache=False).logits
    torch.testing.assert_close(result.check_logits, logits, rtol=1e-2, atol=1e-3)  # scales are stored in float16


@torch.no_grad()
def test_statistics_come_from_the_quantized_prefix(model_folder, token_ids, tmp_path):
    _, hessians = quantize(model_folder("llama"), tmp_path / "model", token_ids)
    model = load(tmp_path / "model")
    reference = {}

    def remember(name):
        def hook(_, args):
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            reference[name] = tokens.T @ tokens / len(tokens)

        return hook

    for name, module in model.named_modules():
        if type(module).__name__ == "LutLinear":
            module.register_forward_pre_hook(remember(name))
    model(input_ids=token_ids, use_cache=False)
    assert len(hessians) == 4 * 3
    for stack, hessian in hessians.items():
        expected = reference[stack.partition(" + ")[0]]
        torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-6)


def test_two_runs_write_identical_files(model_folder, token_ids, tmp_path):
    for name in ("first", "second"):
        quantize(model_folder("qwen3"), tmp_path / name, token_ids)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")]
    assert files[0] == files[1]


def test_kept_weights_return_to_the_dtype_of_the_source(model_folder, token_ids, tmp_path):
    source = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(source)
    quantize(source, tmp_path / "model", token_ids)
    rest = load_file(next((tmp_path / "model").glob("quantlab-rest*")))
    assert rest["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert load(tmp_path / "model").model.embed_tokens.weight.dtype == torch.float32


@torch.no_grad()
def test_a_bfloat16_run_is_reproduced_by_its_checkpoint(model_folder, token_ids, tmp_path):
    result, _ = quantize(model_folder("llama"), tmp_path / "model", token_ids, dtype=torch.bfloat16)
    model = load(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)


def test_a_tied_output_head_is_stored_once_and_tied_after_loading(model_folder, token_ids, tmp_path):
    quantize(model_folder("llama-tied"), tmp_path / "model", token_ids)
    rest = load_file(next((tmp_path / "model").glob("quantlab-rest*")))
    assert "lm_head.weight" not in rest
    model = load(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_one_block_has_weights_at_a_time_and_nothing_outside_it(model_folder, token_ids, tmp_path, monkeypatch):
    models, loaded = [], []
    build, solve = stream.build_skeleton, stream.quantize_block
    monkeypatch.setattr(stream, "build_skeleton", lambda *args: models.append(build(*args)) or models[-1])

    def spy(job):
        loaded.append({name[:14] for name, parameter in models[0].named_parameters() if not parameter.is_meta})
        return solve(job)

    monkeypatch.setattr(stream, "quantize_block", spy)
    quantize(model_folder("llama-tied"), tmp_path / "model", token_ids)
    assert loaded == [{"model.layers.0"}, {"model.layers.1"}, {"model.layers.2"}]


def small_budget(folder):
    """The smallest budget with which a model can be quantized, more or less."""
    sizes = survey_model(AutoConfig.from_pretrained(folder), torch.float32).sizes
    for budget in range(RUNTIME_BYTES, 2 * RUNTIME_BYTES, 1 << 14):
        options = EngineOptions(memory_budget_bytes=budget)
        with suppress(RecipeError):
            plan_memory(sizes, 12, 24, options, StatisticsOptions())
            return options
    raise AssertionError


def test_a_small_budget_cuts_the_work_and_gives_nearly_the_same(model_folder, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MIN_ROWS", 8)
    monkeypatch.setattr(memory, "ROWS_RESERVE", 64)  # so that rows need more than a batch even in a tiny model
    folder = model_folder("llama")
    whole, _ = quantize(folder, tmp_path / "whole", token_ids)
    cut, hessians = quantize(folder, tmp_path / "cut", token_ids, engine=small_budget(folder))
    assert cut.memory.max_rows is not None
    assert any("[0:" in name for name in hessians)
    torch.testing.assert_close(cut.check_logits, whole.check_logits, rtol=1e-4, atol=1e-5)


def test_where_hidden_states_are_kept_changes_nothing(model_folder, token_ids, tmp_path):
    for place in ("ram", "disk"):
        engine = EngineOptions(activations=place)
        result, _ = quantize(model_folder("qwen3"), tmp_path / place, token_ids, engine=engine)
        assert result.memory.activations_in_memory == (place == "ram")
    files = [{path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} for place in ("ram", "disk")]
    assert files[0] == files[1]


def test_layers_without_options_keep_their_weights(model_folder, token_ids, tmp_path):
    def options_of(layer):
        bits = 8 if "o_proj" in layer else 4
        options = SolveOptions(quantizer=AnyBits({}), spec=CodebookSpec(bits=bits))
        return None if "k_proj" in layer or "layers.1." in layer else options

    result, _ = quantize(model_folder("llama"), tmp_path / "model", token_ids, options_of=options_of)
    assert {(spec.bits, "o_proj" in name) for name, spec in result.modules.items()} == {(8, True), (4, False)}
    assert len(result.layers) == 2 * 6
    model = load(tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(model.state_dict()[name], original.state_dict()[name])
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)


@pytest.mark.parametrize("statistics", [{"inputs": "float"}, {"target_alpha": 1.0}, {"saliency_groups": 2}])
@torch.no_grad()
def test_other_statistics_give_another_checkpoint_that_is_reproduced(model_folder, token_ids, tmp_path, statistics):
    options = StatisticsOptions(**statistics)
    result, hessians = quantize(model_folder("llama"), tmp_path / "model", token_ids, statistics=options)
    _, usual = quantize(model_folder("llama"), tmp_path / "usual", token_ids)
    model = load(tmp_path / "model")
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)
    layer = "model.layers.1.self_attn.o_proj"
    changed = result.layers[0].target_shift > 0 or not torch.equal(first_of(hessians, layer), first_of(usual, layer))
    assert changed or any(block.target_shift > 0 for block in result.layers)


def first_of(hessians, layer):
    return next(hessian for name, hessian in hessians.items() if name.startswith(layer))


def test_float_inputs_are_those_of_the_float_model(model_folder, token_ids, tmp_path):
    _, hessians = quantize(
        model_folder("llama"), tmp_path / "model", token_ids, statistics=StatisticsOptions(inputs="float")
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    seen = []
    layer = "model.layers.2.mlp.down_proj"
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(input_ids=token_ids, use_cache=False)
    tokens = seen[0].reshape(-1, 64).double()
    torch.testing.assert_close(
        first_of(hessians, layer).double(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
def test_experts_are_quantized_with_the_tokens_routed_to_them(model_folder, token_ids, tmp_path):
    result, _ = quantize(model_folder("mixtral"), tmp_path / "model", token_ids)
    experts = [layer for layer in result.layers if ".experts." in layer.name]
    assert len(experts) == 3 * 4 * 3
    for block in range(3):  # each token goes to two experts
        tokens = [layer.num_tokens for layer in experts if f"layers.{block}." in layer.name and "down" in layer.name]
        assert sum(tokens) == 2 * token_ids.numel()
        assert len(set(tokens)) > 1
    model = load(tmp_path / "model")
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)


def test_experts_without_enough_tokens_are_refused_or_widened_and_counted(model_folder, token_ids, tmp_path):
    few = token_ids[:1, :4]
    with pytest.raises(QualityError, match=r"only \d+ calibration tokens are routed to this expert"):
        quantize(model_folder("mixtral"), tmp_path / "refused", few)
    options = SolveOptions(quantizer=Rounding({}), spec=SPEC, allow_fallbacks=True)
    result, _ = quantize(model_folder("mixtral"), tmp_path / "model", few, options_of=lambda layer: options)
    widened = [layer for layer in result.layers if layer.diagnostics.get("fallbacks")]
    assert widened
    assert all(layer.num_tokens == 4 and layer.diagnostics["routed_tokens"] < 8 for layer in widened)


def test_the_time_is_accounted_for(model_folder, token_ids, tmp_path):
    result, _ = quantize(model_folder("llama"), tmp_path / "model", token_ids)
    assert set(result.seconds) == {"load", "forward", "statistics", "solve", "write"}
    assert all(value > 0 for value in result.seconds.values())


def test_random_state_and_settings_of_torch_are_left_alone(model_folder, token_ids, tmp_path):
    def state():
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            random.getstate(),
            torch.get_rng_state().tolist(),
        )

    before = state()
    quantize(model_folder("llama"), tmp_path / "model", token_ids)
    assert state() == before


def test_one_thread_means_one_thread_and_only_inside():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single_threaded(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with single_threaded(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
