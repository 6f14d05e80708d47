"""Mixtures of experts through the whole engine: quantized, written, and loaded back."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from quantlab.api import CodebookSpec, QuantizerInfo, Statistic
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.journal import Journal
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.progress import NoProgress
from quantlab.solvers.grid import round_to_nearest

BLOCKS_WITH_EXPERTS = {
    "mixtral": 3,
    "qwen3_moe": 3,
    "gpt_oss": 3,
    "deepseek_v3": 2,
    "llama4_text": 3,
    "dbrx": 3,
    "longcat_flash": 2,
}


@dataclass(frozen=True)
class Rounding:
    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="rounding", summary="", paper="", bits=frozenset({4}), needs=frozenset({Statistic.HESSIAN})
    )

    def quantize(self, problem):
        return round_to_nearest(problem.weight, problem.spec)


@pytest.mark.parametrize("architecture", BLOCKS_WITH_EXPERTS)
@torch.no_grad()
def test_a_mixture_of_experts_is_quantized_and_loads_back_bit_for_bit(model_folder, token_ids, tmp_path, architecture):
    folder, work = model_folder(architecture), tmp_path / "work"
    work.mkdir()
    options = SolveOptions(quantizer=Rounding(), spec=CodebookSpec(bits=4), allow_fallbacks=True)
    request = StreamRequest(
        source=folder, calibration_ids=token_ids, dtype=torch.float32, options_of=lambda layer: options
    )
    writer = CheckpointWriter(tmp_path / "model")
    with Journal.opened(work) as journal:
        result = quantize_model(request, writer, journal, work, NoProgress())
    quantization = QuantizationConfig(
        method={"name": "rounding", "options": {}},
        producer={"name": "test", "version": "0"},
        modules=result.modules,
        unfused_experts=result.unfused_experts,
    )
    writer.finish(folder, json.loads((folder / "config.json").read_text()), quantization)

    model = load(tmp_path / "model")
    assert torch.equal(model(input_ids=result.check_ids, use_cache=False).logits, result.check_logits)
    experts = [layer for layer in result.layers if ".experts." in layer.name]
    assert len(experts) == BLOCKS_WITH_EXPERTS[architecture] * 4 * 3
    down = [layer for layer in experts if layer.name.endswith("down_proj")]
    routed = sum(layer.diagnostics.get("routed_tokens", layer.num_tokens) for layer in down)
    picks = BLOCKS_WITH_EXPERTS[architecture] * 2 * token_ids.numel()  # two experts per token
    assert routed == picks if architecture != "longcat_flash" else 0 < routed < picks  # some return their input
    assert not any(".router" in layer.name or layer.name.endswith("mlp.gate") for layer in result.layers)
