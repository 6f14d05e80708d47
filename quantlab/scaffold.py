"""The project of a new method: a plugin of one file that works, with its contract test."""

import keyword
import re
from pathlib import Path
from string import Template

from quantlab import registry
from quantlab.errors import UsageError

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", re.ASCII)
_MAX_LENGTH = 32

_METHOD = '''"""Round-to-nearest on a grid whose range is chosen to hurt the layer's output least."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quantlab.api import LayerProblem, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.grid import minmax_grid, round_to_grid
from quantlab.solvers.request import check_request


@dataclass(frozen=True, kw_only=True)
class $class_name:
    """Tries several ranges per row (or group) and keeps the one with the least weighted error."""

    candidates: int = 20

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="$name",
        summary="round-to-nearest with a searched range",
        paper="GPTQ's reference code, option mse",
        bits=frozenset(range(2, 9)),
        needs=frozenset({Statistic.HESSIAN}),
        supports_groups=True,
    )

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        check_request(problem, self.info)
        weight, importance = problem.weight.float(), problem.require_hessian().diagonal()
        full = best = minmax_grid(weight, problem.spec)
        best_cost = torch.full_like(full.scale, torch.inf)
        for share in torch.linspace(1.0, 0.5, self.candidates).tolist():
            grid = replace(full, scale=share * full.scale)
            error = (weight - round_to_grid(weight, grid).dequantize()).square() * importance
            cost = error.view(*full.scale.shape, -1).sum(dim=2)
            best = replace(best, scale=torch.where(cost < best_cost, grid.scale, best.scale))
            best_cost = torch.minimum(cost, best_cost)
        return round_to_grid(weight, best)
'''

_TEST = '''"""The promises that quantlab relies on, one test each."""

from $module import $class_name
from quantlab.testing import parametrize_with_checks


@parametrize_with_checks([$class_name()])
def test_contract(quantizer, check):
    check(quantizer)
'''

_PYPROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "The method $name for quantlab"
requires-python = ">=3.11"
dependencies = ["quantlab-ptq", "torch"]

[project.optional-dependencies]
dev = ["pytest"]

[project.entry-points."quantlab.quantizers"]
$name = "$module:$class_name"

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
only-include = ["$module.py"]
"""

_README = """# $distribution

The method `$name` for quantlab: `pip install -e ".[dev]"`, then `quantlab check $name`, `python -m pytest`, and
`quantlab run ganq_w4 --set method.name=$name --output-dir runs/$name`.
"""


def project_files(name: str) -> dict[str, str]:
    """The files of the project of a method, by name.

    Raises:
        UsageError: the method cannot have this name.
    """
    if not _NAME.fullmatch(name) or len(name) > _MAX_LENGTH or keyword.iskeyword(name):
        raise UsageError(
            f"a method cannot be called {name!r}: a name has up to {_MAX_LENGTH} lower-case letters and digits with "
            "single underscores between, such as my_method"
        )
    module = f"quantlab_{name}"
    files = {f"{module}.py": _METHOD, "test_contract.py": _TEST, "pyproject.toml": _PYPROJECT, "README.md": _README}
    values = {
        "name": name,
        "module": module,
        "distribution": module.replace("_", "-"),
        "class_name": "".join(word.capitalize() for word in name.split("_")) + "Quantizer",
    }
    return {file: Template(text).substitute(values) for file, text in files.items()}


def create_project(name: str, output_dir: Path | None) -> Path:
    """Write the project of a new method.

    Args:
        name: of the method.
        output_dir: a folder that does not exist or is empty; None means quantlab-NAME here.

    Returns:
        The folder.

    Raises:
        UsageError: the name is impossible or taken, or the folder is not empty.
    """
    files = project_files(name)
    if name in registry.claimed():
        raise UsageError(f"a method {name} is installed already; choose another name")
    folder = output_dir or Path(f"quantlab-{name.replace('_', '-')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; choose another --output-dir")
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from error
    return folder
