"""Is this installation sound? What is there, what is missing, and what to do about it.

Nothing here may fail because something is broken: what cannot be found out is itself a finding.
"""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from quantlab import registry
from quantlab.errors import PluginError
from quantlab.memory import physical_bytes
from quantlab.report.units import format_bytes

DISTRIBUTION = "quantlab-ptq"
PACKAGE = "quantlab"
SCARCE_BYTES = 1_000_000_000

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what it belongs to.
        name: of the thing.
        value: what was found.
        level: "broken" keeps some or all of quantlab from working; "warning" makes it slower or may soon break it.
        remedy: what to do; empty if all is well.
    """

    topic: str
    name: str
    value: str
    level: Level = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; the heavy parts (torch, compilers) come last."""
    topics: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "name": _name,
        "machine": _machine,
        "disk": _disk,
        "methods": _methods,
        "kernels": _kernels,
    }
    findings = []
    for topic, look in topics.items():
        try:
            findings += list(look())
        except Exception as error:  # a broken installation may raise anything, and the other topics still matter
            value = f"{type(error).__name__}: {error}"
            remedy = f"install again: pip install --force-reinstall {DISTRIBUTION}"
            findings.append(Finding(topic=topic, name=topic, value=value, level="broken", remedy=remedy))
    return findings


def kernel_states() -> dict[str, str]:
    """What every native library is doing, by name; compiles and loads those that this machine can use."""
    import torch

    from quantlab_kernels import cpu, cuda_library, solver_cuda_library, solver_library

    libraries, for_cuda = [cpu.LIBRARY, solver_library.LIBRARY], [cuda_library.LIBRARY, solver_cuda_library.LIBRARY]
    states = {library.name: "none: PyTorch sees no CUDA device" for library in for_cuda}
    if torch.cuda.is_available():
        libraries += for_cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # says what the state says
        for library in libraries:
            try:
                library.get()
            except ValueError as error:  # the environment asks for what the machine lacks
                states[library.name] = f"unusable: {error}"
            else:
                states[library.name] = library.state
    return dict(sorted(states.items()))


def _versions() -> Iterator[Finding]:
    yield Finding(topic="versions", name="python", value=platform.python_version())
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            topic="versions",
            name=DISTRIBUTION,
            value="not installed, only importable: it has no methods",
            level="broken",
            remedy=f"pip install {DISTRIBUTION}, or pip install -e . in a source tree",
        )
        return
    yield Finding(topic="versions", name=DISTRIBUTION, value=own.version)
    for requirement in map(Requirement, own.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement)


def _version(requirement: Requirement) -> Finding:
    remedy = f'pip install "{requirement}"'
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(topic="versions", name=requirement.name, value="not installed", level="broken", remedy=remedy)
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(topic="versions", name=requirement.name, value=found)
    value = f"{found}, but {requirement.specifier} is needed"
    return Finding(topic="versions", name=requirement.name, value=value, level="broken", remedy=remedy)


def _name() -> Iterator[Finding]:
    """An unrelated distribution on PyPI is called quantlab, and installs a package of that name over ours."""
    claimants = {name.lower().replace("_", "-") for name in metadata.packages_distributions().get(PACKAGE, [])}
    others = sorted(claimants - {DISTRIBUTION})
    where = str(Path(__file__).parent)
    if not others:
        yield Finding(topic="name", name="import quantlab", value=where)
        return
    yield Finding(
        topic="name",
        name="import quantlab",
        value=f"{where}; but {', '.join(others)} installs a package {PACKAGE}, too",
        level="broken",
        remedy=f"pip uninstall {' '.join(others)} && pip install --force-reinstall --no-deps {DISTRIBUTION}",
    )


def _machine() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(topic="machine", name="processor", value=f"{platform.machine()}, {sys.platform}")
    yield Finding(topic="machine", name="threads", value=f"{torch.get_num_threads()} of {cores} cores")
    yield Finding(topic="machine", name="memory", value=format_bytes(physical_bytes()))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        value = f"{device.name}, capability {device.major}.{device.minor}, {format_bytes(device.total_memory)}"
        yield Finding(topic="machine", name=f"cuda:{index}", value=value)
    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no device"
        yield Finding(topic="machine", name="cuda", value=f"none: {why}")


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from quantlab.calibration.prepared import data_home
    from quantlab_kernels.build import cache_folders

    folders = {
        "here": Path.cwd(),
        "models": Path(HF_HUB_CACHE),
        "corpora": data_home(),
        "compiled kernels": cache_folders()[0],
    }
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        value = f"{folder}, {format_bytes(free_bytes)} free"
        if not os.access(existing, os.W_OK):
            remedy = "let it be written, or move the caches: HF_HOME, QUANTLAB_DATA, QUANTLAB_CACHE"
            yield Finding(topic="disk", name=name, value=f"{value}, read-only", level="warning", remedy=remedy)
        elif free_bytes < SCARCE_BYTES:
            remedy = "free some space; `quantlab clean` removes unfinished runs"
            yield Finding(topic="disk", name=name, value=value, level="warning", remedy=remedy)
        else:
            yield Finding(topic="disk", name=name, value=value)


def _methods() -> Iterator[Finding]:
    for name, reason in registry.unreadable().items():
        remedy = "install that distribution again, or uninstall it; the methods of the others work"
        value = f"its entry points cannot be read: {reason}"
        yield Finding(topic="methods", name=name, value=value, level="broken", remedy=remedy)
    try:
        names = registry.claimed()
    except PluginError as error:
        remedy = f"change or unset {registry.RESTRICTION_VARIABLE}"
        yield Finding(topic="methods", name="selection", value=str(error), level="broken", remedy=remedy)
        return
    entries = registry.available()
    for name in names:
        try:
            registry.load(name)
        except PluginError as error:
            remedy = "update or uninstall that distribution; the other methods work"
            yield Finding(topic="methods", name=name, value=str(error), level="broken", remedy=remedy)
        else:
            value = f"{entries[name].distribution} {entries[name].version}"
            yield Finding(topic="methods", name=name, value=value)


def _kernels() -> Iterator[Finding]:
    for name, command in (("C++ compiler", os.environ.get("CXX", "g++")), ("CUDA compiler", "nvcc")):
        yield Finding(topic="kernels", name=name, value=_compiler(command))
    for name, state in kernel_states().items():
        if state.startswith(("reference", "unusable")):
            remedy = "results are the same, but slower; see the reason"
            yield Finding(topic="kernels", name=name, value=state, level="warning", remedy=remedy)
        else:
            yield Finding(topic="kernels", name=name, value=state)


def _compiler(command: str) -> str:
    program = command.split()[0]
    try:
        shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"none: {error}"
    lines = [line for line in shown.splitlines() if any(character.isdigit() for character in line)]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")
    return f"{shutil.which(program)}, {release}"
