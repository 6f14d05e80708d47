"""Which executor a command runs on, by its name and options."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from quantlab.errors import UsageError
from quantlab.executors.local import LocalExecutor
from quantlab.executors.protocol import Executor

INSTALL = "pip install 'quantlab-ptq[ray]'"


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Which executor, and what it may use.

    Attributes:
        name: "local" or "ray".
        address: of a running Ray cluster; None starts Ray on this machine, for as long as the work lasts.
        cpus_per_task: cores that one unit occupies; None for as many as torch has threads.
        gpus_per_task: CUDA devices that one unit occupies and computes on.
        object_store_bytes: memory for what the processes share, on a Ray that is started here; None for Ray's default.
        spill_dir: where such a Ray puts what does not fit there; None for Ray's session folder.
    """

    name: Literal["local", "ray"] = "local"
    address: str | None = None
    cpus_per_task: int | None = None
    gpus_per_task: float = 0
    object_store_bytes: int | None = None
    spill_dir: str | None = None


@contextmanager
def open_executor(options: ExecutorOptions) -> Iterator[Executor]:
    """The executor that is asked for; on leaving, everything that it started is ended.

    Raises:
        UsageError: Ray is not installed, options do not go together, or the cluster cannot be reached.
    """
    _require_sense(options)
    if options.name == "local":
        _require_gpu(options.gpus_per_task)
        yield LocalExecutor(gpus=options.gpus_per_task)
        return
    if find_spec("ray") is None:
        raise UsageError(f"--executor ray needs Ray, which is not installed; use {INSTALL}")
    from quantlab.executors.ray import RayExecutor

    with RayExecutor(options) as executor:
        yield executor


def _require_gpu(gpus: float) -> None:
    import torch

    if gpus > 0 and not torch.cuda.is_available():
        raise UsageError("--gpus-per-task: PyTorch sees no CUDA device on this machine; `quantlab doctor` says why")


def _require_sense(options: ExecutorOptions) -> None:
    given = {
        "--address": options.address,
        "--cpus-per-task": options.cpus_per_task,
        "--object-store": options.object_store_bytes,
        "--spill-dir": options.spill_dir,
    }
    if options.name == "local":
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} is for --executor ray; add that, or leave {name} out")
    elif options.address is not None:
        for name in ("--object-store", "--spill-dir"):
            if given[name] is not None:
                raise UsageError(f"{name} is set when Ray is started, not when it is used; give it to `ray start`")
