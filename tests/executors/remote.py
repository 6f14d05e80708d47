"""Functions that run on the nodes: Ray finds them by module, as it finds those of an installed package."""

import os
import time
import warnings
from pathlib import Path

import torch

from quantlab.errors import ModelError, NumericalError


def where(number):
    return number, os.getpid(), torch.get_num_threads(), os.getcwd()


def add(left, right):
    return left + right


def fail(number):
    if number == 1:
        raise NumericalError(f"unit {number} has no answer")
    return number


def die_once(marker):
    """Lose the process the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return "again"


def tell(link, name):
    with link.reporting(name) as progress:
        progress.begin("counting", 2, "sheep")
        progress.advance(detail="one")
        warnings.warn("it is late", UserWarning, stacklevel=1)
    return link.stop()


def work(folder, seconds):
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # a cancelled unit ends between two steps of Python
        time.sleep(0.01)


def remember(number, kept=[]):  # noqa: B006  # the memory of a process
    kept.append(number)
    return kept[:], os.getpid()


def transposed(matrix):
    return matrix.T @ matrix, matrix.stride(), torch.get_num_threads()


def miss(path):
    raise ModelError(f"{path} is missing")
