"""Quantization methods by name: discovery, loading, and the rules a method's class and options must obey.

A distribution offers a method through an entry point of the group `quantlab.quantizers`, `name = "module:Class"`.
Listing reads installation metadata only; a method's module, and with it torch, is imported when it is loaded.
The environment variable QUANTLAB_PLUGINS=ganq,rtn restricts what is found to the methods it names.
"""

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

from quantlab.errors import PluginError, RecipeError, did_you_mean

if typing.TYPE_CHECKING:
    from quantlab.api import LayerQuantizer

ENTRY_POINT_GROUP = "quantlab.quantizers"
RESTRICTION_VARIABLE = "QUANTLAB_PLUGINS"
RESERVED_OPTIONS = frozenset({"name", "bits", "group_size", "preset", "match", "skip"})
"""Keys of a recipe's `method` section and of its layer rules, where options stand beside them: no option may be one."""

_SCALARS = (int, float, bool, str)
_SCALAR_RULE = "int, float, bool, str, Literal[...], or one of these | None"
_SIGNATURE = "quantize(self, problem: LayerProblem) -> QuantizedLayer"


@dataclass(frozen=True, kw_only=True)
class PluginEntry:
    """A method as its distribution advertises it.

    Attributes:
        name: the method's name in recipes.
        target: where its class is, "module:Class".
        distribution: the installed distribution that offers it.
        version: that distribution's version.
    """

    name: str
    target: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.target}, from {self.distribution} {self.version})"


def available() -> dict[str, PluginEntry]:
    """The methods that can be loaded, by name in alphabetical order; imports none of them.

    A name claimed by two distributions is left out, and `load` says why.

    Raises:
        PluginError: QUANTLAB_PLUGINS names a method that is not installed.
    """
    return {name: claims[0] for name, claims in _permitted_claims().items() if len(claims) == 1}


def claimed() -> list[str]:
    """Every name that a distribution claims, also where two do; in alphabetical order.

    Raises:
        PluginError: as for `available`.
    """
    return list(_permitted_claims())


def unreadable() -> dict[str, str]:
    """Why the methods of some distributions cannot be found, by distribution: their entry points cannot be read."""
    reasons = {}
    for distribution in distributions():
        try:
            _entries_of(distribution)
        except Exception as error:  # as in `_all_claims`
            reasons[_name_of(distribution)] = f"{type(error).__name__}: {error}"
    return reasons


def load(name: str) -> type["LayerQuantizer"]:
    """Import one method's class and check it against the contract.

    Raises:
        PluginError: no such method, two distributions claim the name, its import fails, or its class breaks the
            contract; every broken rule is listed with what was expected and what was found.
    """
    entry = _find(name)
    try:
        method_class = EntryPoint(name=name, value=entry.target, group=ENTRY_POINT_GROUP).load()
    except (Exception, SystemExit) as error:  # whatever a third party's module raises on import is that plugin's fault
        raise PluginError(f"method {entry} cannot be imported: {type(error).__name__}: {error}") from error
    violations = class_violations(method_class)
    if not violations and method_class.info.name != name:
        violations = [f"info.name: expected {name!r}, as its entry point says, got {method_class.info.name!r}"]
    if violations:
        raise PluginError(f"method {entry} does not fulfil the contract:\n  " + "\n  ".join(violations))
    return typing.cast("type[LayerQuantizer]", method_class)


def configure(
    name: str, *, preset: str | None = None, options: Mapping[str, object] = types.MappingProxyType({})
) -> "LayerQuantizer":
    """A method with its options set: the preset's values, overridden by `options`; defaults for the rest.

    Raises:
        PluginError: as for `load`.
        RecipeError: unknown preset, unknown option, or a value that the option or the method does not accept.
    """
    method_class = load(name)
    values = {**_preset_values(method_class, preset), **options}
    errors = option_errors(method_class, values)
    if errors:
        details = "\n  ".join(f"{option}: {message}" for option, message in errors.items())
        raise RecipeError(f"method {name!r} does not accept these options:\n  {details}")
    try:
        return method_class(**values)
    except ValueError as error:
        raise RecipeError(f"method {name!r} does not accept its options: {error}") from error


def option_errors(method_class: type["LayerQuantizer"], options: Mapping[str, object]) -> dict[str, str]:
    """What is wrong with a method's options, by option name; empty if nothing is.

    An int is accepted where a float is expected; a bool is not an int; floats must be finite.
    """
    annotations = _option_annotations(method_class)
    errors = {}
    for option, value in options.items():
        if option not in annotations:
            hint = did_you_mean(option, annotations)
            valid = ", ".join(sorted(annotations)) or "none, this method has no options"
            errors[option] = f"unknown option{hint}; valid options: {valid}"
        elif not _fits(value, annotations[option]):
            expected = _describe(annotations[option])
            hint = did_you_mean(value, _literal_values(annotations[option]))
            errors[option] = f"expected {expected}, got {type(value).__name__} {value!r}{hint}"
    return errors


def class_violations(method_class: object) -> list[str]:
    """The rules of the contract that a method's class breaks, each with expected and actual; empty if none.

    The rules: a frozen dataclass; a class attribute `info`; `quantize` with the contract's signature; every option
    with a default, of a type that a recipe can express, and not named like a key of the `method` section.
    """
    if not isinstance(method_class, type) or not dataclasses.is_dataclass(method_class):
        return [f"class: expected a frozen dataclass, got {method_class!r}"]
    violations = []
    if not method_class.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # absent from typeshed
        violations.append("class: expected @dataclass(frozen=True), got a mutable dataclass")
    violations += _info_violations(method_class) + _signature_violations(method_class)
    try:
        return violations + _option_violations(method_class)
    except NameError as error:  # an annotation imported only under TYPE_CHECKING
        return [*violations, f"annotations: expected names that exist at run time, got NameError: {error}"]


def _info_violations(method_class: type) -> list[str]:
    from quantlab.api import QuantizerInfo  # imports torch, which listing must not

    info = getattr(method_class, "info", None)
    if isinstance(info, QuantizerInfo):
        return []
    return [f"info: expected a class attribute `info: ClassVar[QuantizerInfo]`, got {info!r}"]


def _signature_violations(method_class: type) -> list[str]:
    quantize = inspect.getattr_static(method_class, "quantize", None)
    if not inspect.isfunction(quantize):
        return [f"quantize: expected a method {_SIGNATURE}, got {quantize!r}"]
    parameters = list(inspect.signature(quantize).parameters.values())
    by_position = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    if by_position and [parameter.name for parameter in parameters] == ["self", "problem"]:
        return []
    return [f"quantize: expected {_SIGNATURE}, got quantize{inspect.signature(quantize)}"]


def _option_violations(method_class: type) -> list[str]:
    violations = []
    for option, annotation in _option_annotations(method_class).items():
        if option in RESERVED_OPTIONS or option == "info":
            violations.append(f"option {option}: the name is reserved; rename the field, or make it a ClassVar")
        elif not all(kind in _SCALARS for kind in _alternatives(annotation)):
            violations.append(f"option {option}: expected {_SCALAR_RULE}, got {_describe(annotation)}")
    for field in dataclasses.fields(method_class):
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            violations.append(f"option {field.name}: expected a default value, got none")
    return violations


def _option_annotations(method_class: type) -> dict[str, object]:
    hints = typing.get_type_hints(method_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(method_class) if field.init}


def _alternatives(annotation: object) -> list[object]:
    """The scalar types an annotation admits, None left out; Literal counts as the types of its values."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        return [kind for member in members for kind in _alternatives(member)]
    if typing.get_origin(annotation) is typing.Literal:
        return [type(value) for value in typing.get_args(annotation)]
    return [annotation]


def _fits(value: object, annotation: object) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(typing.cast(float, value))
    return type(value) is annotation


def _literal_values(annotation: object) -> list[str]:
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [member for member in members if isinstance(member, str)]
    return [value for member in members for value in _literal_values(member)]


def _describe(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in arguments)
    if annotation is types.NoneType:
        return "null"
    if annotation is float:
        return "a finite float"
    return annotation.__name__ if isinstance(annotation, type) and origin is None else str(annotation)


def _preset_values(method_class: type["LayerQuantizer"], preset: str | None) -> Mapping[str, object]:
    presets = method_class.info.presets
    if preset is None:
        return {}
    if preset not in presets:
        known = ", ".join(sorted(presets)) or "none"
        hint = did_you_mean(preset, presets)
        raise RecipeError(f"method {method_class.info.name!r} has no preset {preset!r}{hint}; its presets: {known}")
    return presets[preset]


def _find(name: str) -> PluginEntry:
    claims = _permitted_claims().get(name, [])
    if len(claims) == 1:
        return claims[0]
    if claims:
        claimants = " and ".join(f"{entry.distribution} {entry.version} ({entry.target})" for entry in claims)
        raise PluginError(f"method {name!r} is claimed by {claimants}; uninstall all but one of them")
    if name in _all_claims():
        raise PluginError(
            f"method {name!r} is installed, but {RESTRICTION_VARIABLE}={os.environ[RESTRICTION_VARIABLE]} leaves it "
            "out; add it there, or unset the variable"
        )
    installed = sorted(_permitted_claims())
    hint = did_you_mean(name, installed)
    raise PluginError(f"method {name!r} is not installed{hint}; installed methods: {', '.join(installed) or 'none'}")


def _permitted_claims() -> dict[str, list[PluginEntry]]:
    claims = _all_claims()
    permitted = [name.strip() for name in os.environ.get(RESTRICTION_VARIABLE, "").split(",") if name.strip()]
    for name in permitted:
        if name not in claims:
            hint = did_you_mean(name, claims)
            raise PluginError(
                f"{RESTRICTION_VARIABLE} names {name!r}, which is not installed{hint}; "
                f"installed methods: {', '.join(claims) or 'none'}"
            )
    return {name: entries for name, entries in claims.items() if not permitted or name in permitted}


def _all_claims() -> dict[str, list[PluginEntry]]:
    claims: dict[str, list[PluginEntry]] = {}
    known = set()
    for distribution in distributions():
        try:
            entries = _entries_of(distribution)
        except Exception:  # whatever is wrong with the files of one distribution, the others' methods must be found
            continue
        if not entries or entries[0].distribution in known:  # found twice it counts once, as for imports
            continue
        known.add(entries[0].distribution)
        for entry in entries:
            claims.setdefault(entry.name, []).append(entry)
    return dict(sorted(claims.items()))


def _entries_of(distribution: Distribution) -> list[PluginEntry]:
    points = distribution.entry_points.select(group=ENTRY_POINT_GROUP)
    if not points:
        return []
    name, metadata = _name_of(distribution), distribution.metadata
    version = metadata["Version"] if "Version" in metadata else "unknown"  # noqa: SIM401, it has no get
    return [PluginEntry(name=point.name, target=point.value, distribution=name, version=version) for point in points]


def _name_of(distribution: Distribution) -> str:
    metadata = distribution.metadata
    return metadata["Name"] if "Name" in metadata else "an unknown distribution"  # noqa: SIM401, it has no get
