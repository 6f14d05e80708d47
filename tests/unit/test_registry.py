"""Discovery, loading and configuration of methods, on distributions installed into a temporary folder."""

import itertools
import subprocess
import sys
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar, Literal

import pytest

from quantlab import registry
from quantlab.api import QuantizerInfo
from quantlab.errors import PluginError, RecipeError

SOUND = """
    from collections.abc import Callable
    from dataclasses import dataclass
    from typing import ClassVar, Literal, TYPE_CHECKING
    from quantlab.api import LayerProblem, QuantizedLayer, QuantizerInfo

    @dataclass(frozen=True, kw_only=True)
    class Method:
        iterations: int = 3
        damping: float = 0.01
        order: Literal["natural", "hessian_diagonal"] = "natural"
        info: ClassVar[QuantizerInfo] = QuantizerInfo(
            name="toy", summary="toy", paper="none", bits=frozenset({4}),
            presets={"slow": {"iterations": 9, "damping": 0.5}},
        )

        def __post_init__(self) -> None:
            if self.iterations < 1:
                raise ValueError(f"iterations={self.iterations} must be positive")

        def quantize(self, problem: LayerProblem) -> QuantizedLayer: ...
"""
module_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int = 1
    fraction: float = 0.5
    enabled: bool = False
    label: str = "a"
    order: Literal["natural", "hessian_diagonal"] = "natural"
    limit: int | None = None
    rule: Literal["auto"] | float = "auto"

    info: ClassVar = QuantizerInfo(name="options", summary="s", paper="p", bits=frozenset({4}))

    def quantize(self, problem): ...


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution that offers the class Method of a module with this source."""
    monkeypatch.delenv(registry.RESTRICTION_VARIABLE, raising=False)

    def install(source=SOUND, *, name="toy", distribution="toy-dist", version="1.5"):
        module = f"registry_toy_{next(module_numbers)}"
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{name} = {module}:Method\n")
        (folder / f"{module}.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(folder)
        return module

    return install


def sound_but(old, new):
    assert old in SOUND
    return SOUND.replace(old, new)


def test_available_lists_name_target_distribution_and_version(install):
    module = install()
    assert registry.available()["toy"] == registry.PluginEntry(
        name="toy", target=f"{module}:Method", distribution="toy-dist", version="1.5"
    )


def test_available_is_in_alphabetical_order(install):
    install(name="zebra")
    install(name="aardvark", distribution="other-dist")
    assert list(registry.available()) == sorted(registry.available())
    assert {"aardvark", "zebra"} <= set(registry.available())


def test_available_imports_neither_plugins_nor_torch(install):
    module = install("raise RuntimeError('imported')")
    assert "toy" in registry.available()
    assert module not in sys.modules
    code = "import sys; from quantlab import registry; registry.available(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sound_method_is_loaded(install):
    module = install()
    assert registry.load("toy") is sys.modules[module].Method


def test_unknown_method_is_refused_with_the_nearest_and_all_installed_names(install):
    install()
    with pytest.raises(PluginError, match=r"method 'toyy' is not installed; did you mean toy\?; installed .*toy"):
        registry.load("toyy")


def test_name_claimed_twice_is_refused_with_both_claimants(install):
    install()
    install(distribution="rival", version="2.0")
    assert "toy" not in registry.available()
    with pytest.raises(PluginError, match=r"claimed by (?=.*toy-dist 1\.5)(?=.*rival 2\.0).*; uninstall all but one"):
        registry.load("toy")


def test_environment_variable_restricts_what_is_found(install, monkeypatch):
    install()
    install(name="other", distribution="other-dist")
    monkeypatch.setenv(registry.RESTRICTION_VARIABLE, " toy ,")
    assert list(registry.available()) == ["toy"]
    with pytest.raises(PluginError, match="'other' is installed, but QUANTLAB_PLUGINS= toy , leaves it out"):
        registry.load("other")


def test_empty_environment_variable_restricts_nothing(install, monkeypatch):
    install()
    monkeypatch.setenv(registry.RESTRICTION_VARIABLE, "")
    assert "toy" in registry.available()


def test_environment_variable_that_names_an_unknown_method_is_refused(install, monkeypatch):
    install()
    monkeypatch.setenv(registry.RESTRICTION_VARIABLE, "toi")
    with pytest.raises(PluginError, match="QUANTLAB_PLUGINS names 'toi', which is not installed; did you mean toy"):
        registry.available()


def test_import_error_of_a_plugin_is_shown_with_its_origin(install):
    module = install("import a_module_that_is_missing")
    with pytest.raises(PluginError) as caught:
        registry.load("toy")
    assert f"method 'toy' ({module}:Method, from toy-dist 1.5) cannot be imported" in str(caught.value)
    assert "ModuleNotFoundError: No module named 'a_module_that_is_missing'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("source", ["1 / 0", "def broken(:", "x = 1"], ids=["raises", "syntax", "no class"])
def test_any_failure_to_import_is_the_plugin_s(install, source):
    install(source)
    with pytest.raises(PluginError, match=r"cannot be imported: (ZeroDivision|Syntax|Attribute)Error"):
        registry.load("toy")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frozen=True, ", "", r"expected @dataclass\(frozen=True\), got a mutable"),
        ("@dataclass(frozen=True, kw_only=True)", "", "class: expected a frozen dataclass, got <class"),
        ('name="toy"', 'name="tay"', "info.name: expected 'toy', as its entry point says, got 'tay'"),
        ("info: ClassVar", "information: ClassVar", "info: expected a class attribute .*, got None"),
        ("info: ClassVar[QuantizerInfo]", "info: QuantizerInfo", "option info: the name is reserved"),
        ("def quantize(", "def solve(", r"expected a method quantize\(self, problem.*got None"),
        ("problem: LayerProblem)", "weight: object)", r"got quantize\(self, weight: object\)"),
        ("problem: LayerProblem)", "problem: LayerProblem, *extra: int)", r"got quantize\(self, problem.*\*extra"),
        ("        def quantize", "        @staticmethod\n        def quantize", "expected a method .*staticmethod"),
        ("iterations: int = 3", "iterations: int", "option iterations: expected a default value, got none"),
        ("iterations: int = 3", "bits: int = 3\n        iterations: int = 3", "option bits: the name is reserved"),
        ("iterations: int", "iterations: tuple[int, ...]", r"expected int, float, .*got tuple\[int, \.\.\.\]"),
        ("iterations: int", "iterations: int | bytes", "expected int, float, .*got int or bytes"),
        ("iterations: int", "iterations: 'Missing'", "names that exist at run time, got NameError: .*Missing"),
    ],
)  # fmt: skip
def test_broken_rule_is_refused_with_expected_and_actual(install, old, new, message):
    install(sound_but(old, new))
    with pytest.raises(PluginError, match=r"'toy' \(.*:Method, from toy-dist 1\.5\) does not fulfil .*\n.*" + message):
        registry.load("toy")


def test_all_broken_rules_are_listed():
    @dataclass(kw_only=True)
    class Broken:
        bits: bytes

    violations = registry.class_violations(Broken)
    assert [violation.split(":")[0] for violation in violations] == [
        "class",
        "info",
        "quantize",
        "option bits",
        "option bits",
    ]


def test_defaults_are_configured_without_options(install):
    install()
    method = registry.configure("toy")
    assert (method.iterations, method.damping, method.order) == (3, 0.01, "natural")


def test_options_override_the_preset_which_overrides_defaults(install):
    install()
    method = registry.configure("toy", preset="slow", options={"damping": 1})
    assert (method.iterations, method.damping, method.order) == (9, 1, "natural")


def test_unknown_preset_is_refused_with_those_that_exist(install):
    install()
    with pytest.raises(RecipeError, match=r"'toy' has no preset 'slwo'; did you mean slow\?; its presets: slow"):
        registry.configure("toy", preset="slwo")


def test_all_wrong_options_are_listed(install):
    install()
    with pytest.raises(RecipeError, match=r"(?s)iterationz: unknown option.*damping: expected a finite float"):
        registry.configure("toy", options={"iterationz": 1, "damping": "x"})


def test_value_that_the_method_refuses_is_reported_in_its_words(install):
    install()
    with pytest.raises(RecipeError, match="'toy' does not accept its options: iterations=0 must be positive"):
        registry.configure("toy", options={"iterations": 0})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("count", 2), ("fraction", 0.25), ("fraction", 1), ("enabled", True), ("label", "b"), ("limit", None),
        ("limit", 3), ("order", "hessian_diagonal"), ("rule", "auto"), ("rule", 2),
    ],
)  # fmt: skip
def test_fitting_value_is_accepted(option, value):
    assert registry.option_errors(Options, {option: value}) == {}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("count", "2", "expected int, got str '2'"),
        ("count", 2.0, "expected int, got float 2.0"),
        ("count", True, "expected int, got bool True"),
        ("count", None, "expected int, got NoneType None"),
        ("fraction", False, "expected a finite float, got bool False"),
        ("fraction", float("nan"), "expected a finite float, got float nan"),
        ("fraction", float("inf"), "expected a finite float, got float inf"),
        ("enabled", 1, "expected bool, got int 1"),
        ("enabled", "yes", "expected bool, got str 'yes'"),
        ("label", 1, "expected str, got int 1"),
        ("limit", "3", "expected int or null, got str '3'"),
        ("limit", [3], "expected int or null, got list [3]"),
        (
            "order",
            "hesian_diagonal",
            "expected one of 'natural', 'hessian_diagonal', got str 'hesian_diagonal'; did you mean hessian_diagonal?",
        ),
        ("rule", "aut", "expected one of 'auto' or a finite float, got str 'aut'; did you mean auto?"),
        (
            "cuont",
            1,
            "unknown option; did you mean count?; valid options: count, enabled, fraction, label, limit, order, rule",
        ),
    ],
)
def test_wrong_value_is_explained(option, value, message):
    assert registry.option_errors(Options, {option: value}) == {option: message}


def test_unknown_option_of_a_method_without_options_says_so():
    @dataclass(frozen=True)
    class Plain:
        pass

    assert registry.option_errors(Plain, {"a": 1}) == {
        "a": "unknown option; valid options: none, this method has no options"
    }
