"""Native libraries that are loaded on first use, or reported once as missing.

`QUANTLAB_KERNELS=reference` turns all of them off; `status` tells what is in use.
"""

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from quantlab_kernels.build import BuildError, Recipe, build_library

_LIBRARIES: "list[NativeLibrary]" = []
_warned: set[str] = set()
_forked = False


def _remember_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_remember_fork)


def native_kernels_wanted() -> bool:
    """Whether the environment allows native code.

    Raises:
        ValueError: `QUANTLAB_KERNELS` has an unknown value.
    """
    choice = os.environ.get("QUANTLAB_KERNELS") or "native"
    if choice not in ("native", "reference"):
        raise ValueError(f"QUANTLAB_KERNELS={choice!r} must be 'native' or 'reference'")
    return choice == "native"


def usable_threads() -> int:
    """How many threads native code may use: as many as PyTorch, but one in a process that was forked.

    The threads of OpenMP do not survive a fork; a child that called for them would wait for ever.
    """
    return 1 if _forked else torch.get_num_threads()


def open_library(path: Path) -> ctypes.CDLL:
    """Load a compiled library.

    Raises:
        BuildError: the file does not load.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load ({error}); delete it, and it is compiled again") from error


class NativeLibrary:
    """One library of the package.

    Calls are safe from several threads. A failure is remembered: it warns once and is not tried again.
    """

    def __init__(self, name: str, recipe: Callable[[], Recipe], declare: Callable[[ctypes.CDLL], None]) -> None:
        """Describe a library; nothing is compiled yet.

        Args:
            name: for `status`.
            recipe: how to make it on this machine; may raise BuildError.
            declare: sets `argtypes` and `restype` of its functions; may raise BuildError if it cannot work here.
        """
        self.name = name
        self._recipe = recipe
        self._declare = declare
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._state = "not used yet"
        self._tried = False
        _LIBRARIES.append(self)

    def get(self) -> ctypes.CDLL | None:
        """The loaded library, or None where the reference has to do.

        Warns:
            RuntimeWarning: once per reason, if the library cannot be had although it is wanted.
        """
        if not native_kernels_wanted():
            return None
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._load()
                    self._tried = True
        return self._library

    @property
    def loaded(self) -> ctypes.CDLL | None:
        """The library if it is loaded already, whatever the environment says by now."""
        return self._library

    @property
    def state(self) -> str:
        """In words: which build is in use, or why there is none."""
        return self._state if native_kernels_wanted() else "reference: QUANTLAB_KERNELS=reference"

    def _load(self) -> None:
        try:
            recipe = self._recipe()
            library = open_library(build_library(recipe))
            self._declare(library)
        except BuildError as error:
            self._state = f"reference: {error}"
            _warn_once(str(error))
            return
        self._library = library
        self._state = recipe.name


def status() -> dict[str, str]:
    """What every native library of the package is doing, by name; for records of runs."""
    return {library.name: library.state for library in _LIBRARIES}


def _warn_once(problem: str) -> None:
    if problem in _warned:
        return
    _warned.add(problem)
    warnings.warn(
        f"native kernels are not available, so the slow reference takes their place: {problem}\n"
        "QUANTLAB_KERNELS=reference chooses the reference without this warning",
        RuntimeWarning,
        stacklevel=4,
    )
