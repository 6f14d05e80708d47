"""quantlab: the laboratory for weight-only post-training quantization of language models.

Importing the package is cheap; torch and transformers are imported with the first name that needs them. From then on,
or at once if it is imported already, transformers reads quantlab checkpoints (`quantlab.checkpoint.registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlab._version import __version__
from quantlab.checkpoint.registration import register_when_imported

if TYPE_CHECKING:
    from quantlab.api import (
        CodebookSpec,
        InputStatistics,
        LayerProblem,
        LayerQuantizer,
        Lut,
        QuantizedLayer,
        QuantizerInfo,
        Statistic,
        UniformGrid,
    )
    from quantlab.checkpoint.reader import load
    from quantlab.pipeline import run

_HOME = {
    "CodebookSpec": "quantlab.api",
    "InputStatistics": "quantlab.api",
    "LayerProblem": "quantlab.api",
    "LayerQuantizer": "quantlab.api",
    "Lut": "quantlab.api",
    "QuantizedLayer": "quantlab.api",
    "QuantizerInfo": "quantlab.api",
    "Statistic": "quantlab.api",
    "UniformGrid": "quantlab.api",
    "load": "quantlab.checkpoint.reader",
    "run": "quantlab.pipeline",
}

__all__ = [
    "CodebookSpec",
    "InputStatistics",
    "LayerProblem",
    "LayerQuantizer",
    "Lut",
    "QuantizedLayer",
    "QuantizerInfo",
    "Statistic",
    "UniformGrid",
    "__version__",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'quantlab' has no attribute {name!r}")


register_when_imported()
