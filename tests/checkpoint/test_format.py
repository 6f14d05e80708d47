import copy
import json

import pytest

from quantlab.checkpoint.format import QuantizationConfig
from quantlab.errors import CheckpointError
from quantlab.runtime import ModuleSpec

SPEC = ModuleSpec(out_features=8, in_features=64, bits=4, group_size=32, codebook="uniform", outliers=3, bias=True)
CONFIG = QuantizationConfig(
    method={"name": "ganq", "options": {"iterations": 10}},
    producer={"name": "quantlab-ptq", "version": "0.1.0"},
    modules={"model.layers.0.mlp.up_proj": SPEC},
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
    assert (section["quant_method"], section["format_version"], section["min_reader"]) == ("quantlab", 1, 1)


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
        (("min_reader",), 2, "1 <= min_reader <= format_version"),
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
    section = CONFIG.to_dict() | {"format_version": 3, "min_reader": 2}
    with pytest.raises(CheckpointError, match="needs a reader of format 2; this quantlab reads format 1: upgrade"):
        QuantizationConfig.from_dict(section)


def test_a_newer_format_that_older_readers_may_read_is_read():
    section = CONFIG.to_dict() | {"format_version": 2, "a_new_remark": "fine"}
    assert QuantizationConfig.from_dict(section) == CONFIG
