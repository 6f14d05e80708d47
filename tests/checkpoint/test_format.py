import copy
import json
from dataclasses import replace

import pytest

from quantlab.checkpoint.format import QuantizationConfig
from quantlab.errors import CheckpointError
from quantlab.runtime import ModuleSpec

SPEC = ModuleSpec(out_features=8, in_features=64, bits=4, group_size=32, codebook="uniform", outliers=3, bias=True)
CONFIG = QuantizationConfig(
    method={"name": "ganq", "options": {"iterations": 10}},
    producer={"name": "quantlab-ptq", "version": "0.1.0"},
    modules={"model.layers.0.mlp.up_proj": SPEC},
    unfused_experts=("model.layers.1.mlp.experts",),
)
MODULE = ("modules", "model.layers.0.mlp.up_proj")


def damaged(path, value):
    section = copy.deepcopy(CONFIG.to_dict())
    inner = section
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return section


def test_the_section_survives_json():
    assert QuantizationConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_the_section_names_its_method_and_versions():
    section = CONFIG.to_dict()
    assert (section["quant_method"], section["format_version"], section["min_reader"]) == ("quantlab", 2, 2)
    assert replace(CONFIG, unfused_experts=()).to_dict()["min_reader"] == 1


def test_bits_per_weight_count_codes_codebooks_and_outliers():
    rows, words = 8, 4 * 2  # four planes of two words
    bits = 32 * rows * words + 2 * 16 * rows * 2 + 32 * (rows + 1) + 3 * (32 + 16)
    assert CONFIG.to_dict()["bits_per_weight"] == CONFIG.bits_per_weight == bits / (rows * 64)
    assert replace(CONFIG, modules={}).bits_per_weight == 0


def test_format_1_is_read_without_the_keys_that_are_new():
    section = CONFIG.to_dict() | {"format_version": 1, "min_reader": 1}
    with pytest.raises(CheckpointError, match=r"unknown keys \['bits_per_weight', 'unfused_experts'\]"):
        QuantizationConfig.from_dict(section)
    del section["bits_per_weight"], section["unfused_experts"]
    assert QuantizationConfig.from_dict(section) == replace(CONFIG, unfused_experts=())


def test_groups_follow_from_the_group_size():
    assert SPEC.groups == 2
    assert ModuleSpec(8, 64, 4, None, "lut", 0, False).groups == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), "gptq", "quant_method is 'gptq'"),
        (("quant_method",), KeyError, "quant_method is None"),
        (("format_version",), KeyError, "format_version None"),
        (("format_version",), True, "format_version True"),
        (("min_reader",), 0, "min_reader 0"),
        (("min_reader",), 3, "1 <= min_reader <= format_version"),
        (("bits_per_weight",), KeyError, "has no 'bits_per_weight'"),
        (("bits_per_weight",), 4.0, "bits_per_weight is 4.0; the modules take 5.8"),
        (("bits_per_weight",), "4", "bits_per_weight is '4'; the modules take"),
        (("unfused_experts",), KeyError, "has no 'unfused_experts'"),
        (("modules", "a\x1b"), {}, "'a.x1b' cannot be the name of a module"),
        (("unfused_experts",), ["a\n"], "expected a list of different module names"),
        (("unfused_experts",), "a", "unfused_experts is 'a'; expected a list"),
        (("unfused_experts",), [1], "expected a list of different module names"),
        (("unfused_experts",), ["a", "a"], "expected a list of different module names"),
        (("methods",), {}, r"unknown keys \['methods'\]"),
        (("method",), KeyError, "has no 'method'"),
        (("method", "name"), 3, "method.name is 3; expected str"),
        (("method", "version"), "1", r"method has unknown keys \['version'\]"),
        (("producer", "version"), KeyError, "producer has no 'version'"),
        (("modules",), [], "modules is .*expected a JSON object"),
        (MODULE, 4, "up_proj'. is 4; expected a JSON object"),
        ((*MODULE, "bits"), 9, "up_proj.*bits=9 must be between 2 and 8"),
        ((*MODULE, "bits"), "4", "bits is '4'; expected int"),
        ((*MODULE, "bits"), 4.0, "bits is 4.0; expected int"),
        ((*MODULE, "bits"), True, "bits is True; expected int"),
        ((*MODULE, "bias"), 1, "bias is 1; expected bool"),
        ((*MODULE, "group_size"), 24, "group_size=24 must divide in_features=64"),
        ((*MODULE, "group_size"), 0, "group_size=0 must divide"),
        ((*MODULE, "group_size"), "32", "group_size is '32'; expected int or NoneType"),
        ((*MODULE, "codebook"), "nf4", "codebook='nf4' must be"),
        ((*MODULE, "outliers"), -1, "outliers=-1 must be"),
        ((*MODULE, "outliers"), 513, "outliers=513 must be"),
        ((*MODULE, "out_features"), 0, r"\(0, 64\) is empty"),
        ((*MODULE, "out_features"), KeyError, "has no 'out_features'"),
        ((*MODULE, "scale"), 1, r"unknown keys \['scale'\]"),
    ],
)
def test_a_damaged_section_is_refused_with_the_place_and_the_value(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        QuantizationConfig.from_dict(damaged(path, value))


@pytest.mark.parametrize("section", [None, [], "quantlab"])
def test_a_section_that_is_not_an_object_is_refused(section):
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        QuantizationConfig.from_dict(section)


def test_a_checkpoint_that_needs_a_newer_reader_says_so():
    section = CONFIG.to_dict() | {"format_version": 4, "min_reader": 3}
    with pytest.raises(CheckpointError, match="needs a reader of format 3; this quantlab reads format 2: upgrade"):
        QuantizationConfig.from_dict(section)


def test_a_newer_format_that_older_readers_may_read_is_read():
    section = CONFIG.to_dict() | {"format_version": 3, "a_new_remark": "fine"}
    assert QuantizationConfig.from_dict(section) == CONFIG
