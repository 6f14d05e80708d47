"""The errors of single layers against plain forward passes of both whole models."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.api import CodebookSpec, QuantizerInfo
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.forward import CheckpointParts, FloatParts
from quantlab.engine.journal import Journal
from quantlab.engine.linears import weight_of
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.evaluate import layers as layers_module
from quantlab.evaluate.layers import measure_layers
from quantlab.experts import fused_experts, unfuse
from quantlab.progress import NoProgress
from quantlab.solvers.grid import round_to_nearest


@dataclass(frozen=True)
class Shrinking:
    """Rounds 0.9 times the weight, so that it is worse than rounding the weight itself."""

    info: ClassVar[QuantizerInfo] = QuantizerInfo(name="shrinking", summary="", paper="", bits=frozenset({4}))

    def quantize(self, problem):
        return round_to_nearest(0.9 * problem.weight, problem.spec)


def quantized_checkpoint(source, token_ids, folder, skipped):
    """A checkpoint of the model in `source` in which the layers called `skipped` are kept."""
    (folder / "work").mkdir()
    options = SolveOptions(quantizer=Shrinking(), spec=CodebookSpec(bits=4), allow_fallbacks=True)
    request = StreamRequest(
        source=source,
        calibration_ids=token_ids,
        dtype=torch.float32,
        options_of=lambda layer: None if skipped in layer else options,
    )
    writer = CheckpointWriter(folder / "model")
    with Journal.opened(folder / "work") as journal:
        result = quantize_model(request, writer, journal, folder / "work", NoProgress())
    quantization = QuantizationConfig(
        method={"name": "shrinking", "options": {}},
        producer={"name": "test", "version": "0"},
        modules=result.modules,
        unfused_experts=result.unfused_experts,
    )
    writer.finish(source, json.loads((source / "config.json").read_text()), quantization)
    return folder / "model", list(result.modules)


@torch.no_grad()
def inputs_of(model, names, ids):
    """What enters the layers in a plain forward of the whole model: (tokens, in_features) each."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].reshape(-1, args[0].shape[-1]).double()})
        )
        for name in names
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_errors_are_those_between_the_outputs_of_two_whole_models(
    model_folder, token_ids, tmp_path, monkeypatch, architecture
):
    monkeypatch.setattr(layers_module, "TOKENS_PER_BATCH", 48)
    monkeypatch.setattr(layers_module, "ROWS_PER_PIECE", 24)
    source = model_folder(architecture)
    texts = {"calibration": token_ids[:4], "held_out": token_ids[4:, :16]}
    checkpoint, names = quantized_checkpoint(source, token_ids[:4], tmp_path, "k_proj")
    work = tmp_path / "errors"
    found = measure_layers(FloatParts(source, torch.float32), CheckpointParts(checkpoint), texts, work, NoProgress())

    model, quantized = AutoModelForCausalLM.from_pretrained(source).eval(), load(checkpoint)
    unfuse(model, fused_experts(model))
    assert sorted(entry["name"] for entry in found) == sorted(names)
    assert not any(work.rglob("*.safetensors"))
    for text, ids in texts.items():
        inputs, behind = (inputs_of(each, names, ids) for each in (model, quantized))
        for entry in found:
            name, errors = entry["name"], entry[text]
            assert (entry["bits"], entry["group_size"]) == (4, None)
            if name not in inputs:
                assert set(errors.values()) == {None}
                continue
            weight = weight_of(model.get_submodule(name))
            stored = quantized.get_submodule(name).dequantize().double()
            rounded = round_to_nearest(weight.float(), CodebookSpec(bits=4)).dequantize().double()
            outputs = inputs[name] @ weight.double().T
            scale = outputs.square().sum()
            assert errors["error"] == pytest.approx(((outputs - inputs[name] @ stored.T).square().sum() / scale).item())
            rtn = (outputs - inputs[name] @ rounded.T).square().sum() / scale
            assert errors["rtn_error"] == pytest.approx(rtn.item(), rel=1e-4)
            assert errors["rtn_error"] < errors["error"]
            if ".experts." in name:
                assert errors["accumulated"] is None
                continue
            accumulated = (outputs - behind[name] @ stored.T).square().sum() / scale
            assert errors["accumulated"] == pytest.approx(accumulated.item(), rel=1e-4)


def test_figures_are_summed_up_by_the_place_of_a_layer_in_its_block():
    from quantlab.report.layer_errors import by_role

    def layer(name, error, rtn, accumulated):
        errors = {"error": error, "rtn_error": rtn, "accumulated": accumulated}
        return {"name": name, "calibration": {**errors, "error": error and error / 2}, "held_out": errors}

    rows = by_role(
        [
            layer("model.layers.0.mlp.experts.0.up_proj", 0.01, 0.02, None),
            layer("model.layers.1.mlp.experts.7.up_proj", 0.04, 0.04, None),
            layer("model.layers.1.mlp.experts.8.up_proj", None, None, None),
            layer("model.layers.1.self_attn.q_proj", 0.1, 0.4, 0.2),
        ]
    )
    assert [(row.name, row.count) for row in rows] == [
        ("mlp.experts.*.up_proj", 3),
        ("self_attn.q_proj", 1),
        ("all", 4),
    ]
    assert rows[0].held_out == pytest.approx(0.02)
    assert rows[0].calibration == pytest.approx(0.01)
    assert rows[0].against_rtn == pytest.approx(0.5**0.5)
    assert rows[0].cells()[3] == "–"
    assert rows[1].accumulated == 0.2
    assert rows[1].cells() == ["5.000e-02", "1.000e-01", "0.250", "2.00e-01"]
