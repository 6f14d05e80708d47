"""What `config.json` says about a quantized checkpoint: which modules are quantized, and how each is stored.

The names and shapes of the stored tensors follow from `ModuleSpec` alone (`quantlab.runtime`), so a reader can
check a file against them before it reads a single value. `FORMAT.md` beside this file describes the whole folder.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Final

from quantlab.errors import CheckpointError
from quantlab.runtime import ModuleSpec, storage_layout

QUANT_METHOD: Final = "quantlab"
FORMAT_VERSION: Final = 2
MIN_READER: Final = 1
MIN_READER_OF_EXPERTS: Final = 2

CONFIG_NAME: Final = "config.json"
INDEX_NAME: Final = "quantlab.safetensors.index.json"
SHARD_PREFIX: Final = "quantlab-"
SHARD_PATTERN: Final = SHARD_PREFIX + r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors"

_KEYS_OF_FORMAT_1 = frozenset({"quant_method", "format_version", "min_reader", "method", "producer", "modules"})
_KEYS_NEW_IN_FORMAT_2 = frozenset({"bits_per_weight", "unfused_experts"})


@dataclass(frozen=True)
class QuantizationConfig:
    """The section `quantization_config` of `config.json`.

    Attributes:
        method: {"name", "options"} of what produced the codes; for people, not needed for loading.
        producer: {"name", "version"} of the program that wrote the files.
        modules: storage of every quantized layer by its exact module name; nothing else is quantized.
        unfused_experts: names of the modules whose fused expert weights are stored as one layer per expert and
            projection.
    """

    method: Mapping[str, object]
    producer: Mapping[str, object]
    modules: Mapping[str, ModuleSpec]
    unfused_experts: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes with their padding, codebooks and outliers; 0 without any."""
        weights = sum(spec.out_features * spec.in_features for spec in self.modules.values())
        return sum(storage_bits(spec) for spec in self.modules.values()) / weights if weights else 0.0

    def to_dict(self) -> dict[str, object]:
        """The section as plain JSON values."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "min_reader": MIN_READER_OF_EXPERTS if self.unfused_experts else MIN_READER,
            "method": dict(self.method),
            "producer": dict(self.producer),
            "bits_per_weight": self.bits_per_weight,
            "unfused_experts": list(self.unfused_experts),
            "modules": {name: asdict(spec) for name, spec in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, section: object) -> "QuantizationConfig":
        """Parse the section strictly.

        A newer writer that adds something older readers may ignore raises `format_version` and leaves
        `min_reader`; then unknown keys beside the known ones are accepted at the top level only.

        Raises:
            CheckpointError: wrong method or version, missing or unknown keys, wrong types, values out of range.
        """
        where = "quantization_config"
        values = _mapping(where, section)
        version = _check_versions(values)
        known = _KEYS_OF_FORMAT_1 if version == 1 else _KEYS_OF_FORMAT_1 | _KEYS_NEW_IN_FORMAT_2
        if version <= FORMAT_VERSION:
            _refuse_unknown(where, values, known)
        method = _fields(f"{where}.method", _take(where, values, "method"), {"name": (str,), "options": (dict,)})
        producer = _fields(f"{where}.producer", _take(where, values, "producer"), {"name": (str,), "version": (str,)})
        modules = _mapping(f"{where}.modules", _take(where, values, "modules"))
        unprintable = [name for name in modules if not name.isprintable()]
        if unprintable:
            raise CheckpointError(f"{where}.modules: {unprintable[0]!r} cannot be the name of a module")
        config = cls(
            method=method,
            producer=producer,
            modules={name: _module_spec(f"{where}.modules[{name!r}]", entry) for name, entry in modules.items()},
            unfused_experts=() if version == 1 else _names(where, values, "unfused_experts"),
        )
        if version > 1:
            _check_bits_per_weight(f"{where}.bits_per_weight", _take(where, values, "bits_per_weight"), config)
        return config


def storage_bits(spec: ModuleSpec) -> int:
    """Bits that store the weight of one layer: codes with their padding, codebook, outliers; not the bias."""
    return sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in storage_layout(spec).values())


def _names(where: str, values: Mapping[str, object], key: str) -> tuple[str, ...]:
    names = _take(where, values, key)
    well_formed = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    if not isinstance(names, list) or not well_formed or len(set(names)) != len(names):
        raise CheckpointError(f"{where}.{key} is {names!r}; expected a list of different module names")
    return tuple(names)


def _check_bits_per_weight(where: str, value: object, config: QuantizationConfig) -> None:
    if type(value) not in (int, float) or value != config.bits_per_weight:
        raise CheckpointError(f"{where} is {value!r}; the modules take {config.bits_per_weight!r}")


def _check_versions(section: Mapping[str, object]) -> int:
    if section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"quantization_config.quant_method is {section.get('quant_method')!r}; quantlab reads only {QUANT_METHOD!r}"
        )
    version, min_reader = section.get("format_version"), section.get("min_reader")
    if type(version) is not int or type(min_reader) is not int or not 1 <= min_reader <= version:
        raise CheckpointError(
            f"quantization_config has format_version {version!r} and min_reader {min_reader!r}; "
            "expected whole numbers with 1 <= min_reader <= format_version"
        )
    if min_reader > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format {version} and needs a reader of format {min_reader}; "
            f"this quantlab reads format {FORMAT_VERSION}: upgrade quantlab"
        )
    return version


def _module_spec(where: str, entry: object) -> ModuleSpec:
    types: dict[str, tuple[type, ...]] = {field.name: (int,) for field in fields(ModuleSpec)}
    types |= {"group_size": (int, NoneType), "codebook": (str,), "bias": (bool,)}
    try:
        return ModuleSpec(**_fields(where, entry, types))  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _fields(where: str, value: object, types: Mapping[str, tuple[type, ...]]) -> dict[str, object]:
    """A JSON object with exactly these keys, each of exactly one of these types (True is not a whole number)."""
    values = _mapping(where, value)
    _refuse_unknown(where, values, types.keys())
    for key, expected in types.items():
        if type(_take(where, values, key)) not in expected:
            names = " or ".join(kind.__name__ for kind in expected)
            raise CheckpointError(f"{where}.{key} is {values[key]!r}; expected {names}")
    return values


def _mapping(where: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r}; expected a JSON object")
    return value


def _take(where: str, values: Mapping[str, object], key: str) -> object:
    if key not in values:
        raise CheckpointError(f"{where} has no {key!r}; the checkpoint is damaged or was written by something else")
    return values[key]


def _refuse_unknown(where: str, values: Mapping[str, object], known: Collection[str]) -> None:
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise CheckpointError(f"{where} has unknown keys {unknown}; known are {sorted(known)}")
