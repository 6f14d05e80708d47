"""The plugin for vLLM, against a stand-in with the parts of its interface that the plugin touches."""

import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import linear as multiply

from quantlab.checkpoint import vllm
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.errors import CheckpointError
from quantlab.runtime import ModuleSpec

ATTENTION = "model.layers.0.self_attn"


class LinearBase(torch.nn.Module):
    pass


class LinearMethodBase:
    pass


class UnquantizedLinearMethod:
    pass


class BaseConfig:
    def __init__(self):
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for the modules of vLLM; yields what has been registered with it."""
    registered = {}
    names = ["vllm", "vllm.model_executor", "vllm.model_executor.layers"]
    layers = "vllm.model_executor.layers"
    modules = {name: ModuleType(name) for name in [*names, f"{layers}.linear", f"{layers}.quantization"]}
    base_config = modules[f"{layers}.quantization.base_config"] = ModuleType("base_config")
    linear, quantization = modules[f"{layers}.linear"], modules[f"{layers}.quantization"]
    modules[layers].linear, modules[layers].quantization = linear, quantization
    quantization.base_config, base_config.QuantizationConfig = base_config, BaseConfig
    linear.LinearBase, linear.LinearMethodBase = LinearBase, LinearMethodBase
    linear.UnquantizedLinearMethod = UnquantizedLinearMethod
    quantization.QUANTIZATION_METHODS = registered.keys()
    quantization.register_quantization_config = lambda name: lambda kind: registered.setdefault(name, kind)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def spec(**changes):
    values = {"out_features": 16, "in_features": 16, "bits": 3, "group_size": 8, "codebook": "lut", "outliers": 0}
    return ModuleSpec(**{**values, "bias": False, **changes})


def section(**modules):
    names = {f"{ATTENTION}.{name}": value for name, value in modules.items()}
    return QuantizationConfig(
        method={"name": "t", "options": {}}, producer={"name": "quantlab-ptq", "version": "0"}, modules=names
    ).to_dict()


def test_without_vllm_registering_does_nothing():
    assert "vllm" not in sys.modules
    vllm.register()


def test_the_entry_point_leads_to_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"quantlab": "quantlab.checkpoint.vllm:register"}


def test_the_method_is_registered_once(registry):
    vllm.register()
    kind = registry["quantlab"]
    vllm.register()
    assert registry == {"quantlab": kind}
    assert kind.get_name() == "quantlab"
    assert kind.get_config_filenames() == []
    assert torch.bfloat16 in kind.get_supported_act_dtypes()


def test_layers_get_the_method_that_the_checkpoint_lists(registry):
    vllm.register()
    config = registry["quantlab"].from_config(section(o_proj=spec()))
    assert config.get_quant_method(LinearBase(), f"{ATTENTION}.o_proj").spec == spec()
    assert isinstance(config.get_quant_method(LinearBase(), f"{ATTENTION}.other"), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "one layer, but they are stored differently"),
        ({"codebook": "uniform"}, "one layer, but they are stored differently"),
        ({"outliers": 2}, "sparse outliers are not supported on vLLM"),
    ],
)
def test_parts_that_cannot_be_stacked_are_refused(registry, changes, message):
    vllm.register()
    modules = {f"{name}_proj": spec(**(changes if name == "k" else {})) for name in "qkv"}
    config = registry["quantlab"].from_config(section(**modules))
    with pytest.raises(CheckpointError, match=message):
        config.get_quant_method(LinearBase(), f"{ATTENTION}.qkv_proj")


@pytest.mark.parametrize("kind", ["lut", "uniform"])
def test_stacked_parts_compute_what_the_layers_compute(registry, fixture_model, kind):
    vllm.register()
    name, rows, columns = fixture_model[kind]
    layer = fixture_model["model"].get_submodule(name)
    parts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), layer.spec)
    config = registry["quantlab"].from_config(section(**parts))
    method = config.get_quant_method(LinearBase(), f"{ATTENTION}.qkv_proj")
    stacked = LinearBase()
    method.create_weights(stacked, columns, [rows] * 3, columns, 3 * rows, torch.float32, weight_loader="loader")
    for key, parameter in stacked.named_parameters():
        assert parameter.weight_loader == "loader"
        part = layer.get_buffer(key)
        parameter.copy_(torch.cat([part] * 3, dim=parameter.output_dim))
    x, bias = torch.randn(2, columns), torch.randn(3 * rows)
    expected = multiply(x, layer.dequantize().repeat(3, 1), bias)
    torch.testing.assert_close(method.apply(stacked, x, bias), expected)


@pytest.fixture(scope="module")
def fixture_model():
    model = load(Path(__file__).parent / "fixtures" / "format-2" / "model")
    layers = {"lut": f"{ATTENTION}.q_proj", "uniform": f"{ATTENTION}.k_proj"}
    sizes = {kind: (name, *model.get_submodule(name).dequantize().shape) for kind, name in layers.items()}
    return {"model": model, **sizes}


def test_dividing_the_inputs_of_a_layer_among_devices_is_refused(registry):
    vllm.register()
    config = registry["quantlab"].from_config(section(o_proj=spec()))
    method = config.get_quant_method(LinearBase(), f"{ATTENTION}.o_proj")
    with pytest.raises(CheckpointError, match="run vLLM with tensor_parallel_size=1"):
        method.create_weights(LinearBase(), 8, [16], 16, 16, torch.float16)
