"""What must be the same on every machine of a cluster, so that a unit has the same result wherever it runs."""

import hashlib
import platform
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from quantlab._version import __version__
from quantlab.doctor import kernel_states
from quantlab.errors import UsageError

_MODEL_FILES = ("*.safetensors", "*.json")


_VERSIONS = ("python", "torch", "transformers", "quantlab")
_ARITHMETIC = ("processor", "kernels")


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One machine, as a process on it sees it.

    Attributes:
        host: its name.
        python: version; the bundled calibration text is Python's own library.
        torch: version.
        transformers: version.
        quantlab: version.
        processor: instruction set that torch has chosen, which decides the last digits of a product.
        kernels: what the native kernels on the CPU are doing.
        model: hash of the names and sizes of the model's files; None if they cannot be read.
        probe: content of the probe file in the run folder; None if it cannot be read.
    """

    host: str
    python: str
    torch: str
    transformers: str
    quantlab: str
    processor: str
    kernels: str
    model: str | None
    probe: str | None


def report_node(model_folder: Path, probe: Path | None) -> NodeReport:
    """Describe the machine that this runs on.

    Args:
        model_folder: of a model.
        probe: a small file that the driver has written to the run folder; None if there is no such folder.
    """
    return NodeReport(
        host=socket.gethostname(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        quantlab=__version__,
        processor=torch.backends.cpu.get_cpu_capability(),
        kernels=", ".join(f"{name} {state}" for name, state in kernel_states().items() if "cuda" not in name),
        model=_listing(model_folder),
        probe=probe.read_text() if probe is not None and probe.is_file() else None,
    )


def require_alike(driver: NodeReport, node: NodeReport, address: str, model_folder: Path, folder: Path | None) -> None:
    """Refuse a machine on which units would not find their files, or would run another program.

    Args:
        driver: the machine that the command runs on.
        node: the other machine.
        address: of the other machine.
        model_folder: that was looked at.
        folder: the run folder that was looked at, if any.

    Warns:
        UserWarning: the machine's processor computes with other instructions, so that last digits may differ.

    Raises:
        UsageError: naming the machine and every difference.
    """
    problems = []
    if node.model is None:
        problems.append(f"cannot read the model folder {model_folder}; put the model where all nodes see the same path")
    elif node.model != driver.model:
        problems.append(f"has other files in the model folder {model_folder}; copy the same model to all nodes")
    if node.probe != driver.probe:
        problems.append(f"does not see the run folder {folder}; choose an --output-dir on storage that all nodes share")
    problems += [f"has {difference}; install the same version" for difference in _differences(driver, node, _VERSIONS)]
    if problems:
        raise UsageError(f"node {node.host} ({address}) cannot take part: it" + "".join(f"\n  {it}" for it in problems))
    for difference in _differences(driver, node, _ARITHMETIC):
        warnings.warn(
            f"node {node.host} ({address}) has {difference}; what it computes may differ in the last digits, so that "
            "the run cannot be repeated bit for bit",
            UserWarning,
            stacklevel=2,
        )


def _differences(driver: NodeReport, node: NodeReport, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name} {getattr(node, name)}, but {getattr(driver, name)} is where the command runs"
        for name in names
        if getattr(driver, name) != getattr(node, name)
    ]


def _listing(folder: Path) -> str | None:
    try:
        files = sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern))
        if not files:
            return None
        lines = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    except OSError:
        return None
    return hashlib.sha256(lines.encode()).hexdigest()
