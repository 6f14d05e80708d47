import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantlab.api import CodebookSpec, QuantizerInfo, Statistic
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.linears import find_linears
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import quantize_model
from quantlab.errors import ModelError
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


def quantize(folder, target, token_ids, dtype=torch.float32):
    method = Rounding({})
    writer = CheckpointWriter(target)
    options = SolveOptions(quantizer=method, spec=SPEC)
    result = quantize_model(folder, writer, options, token_ids, dtype, NoProgress())
    config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    section = QuantizationConfig(
        method={"name": "rounding", "options": {}},
        producer={"name": "test", "version": "0"},
        modules=result.modules,
    )
    writer.finish(folder, config, section)
    return result, method.seen


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


def test_a_mixture_of_experts_is_refused_before_anything_is_written(model_folder, token_ids, tmp_path):
    with pytest.raises(ModelError, match="fused mixture-of-experts"):
        quantize(model_folder("mixtral"), tmp_path / "model", token_ids)
    assert not list(Path(tmp_path / "model").glob("*"))
