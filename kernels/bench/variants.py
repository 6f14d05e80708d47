"""What the benchmarks of the CPU time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 192 << 20
SMALL_ROWS = 64


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        name: in the tables.
        nbytes: of one weight.
        calls: yields functions that each have a weight of their own.
        warm: a small call of the same kind.
        products: multiplications per call, each with a weight of its own.
    """

    name: str
    nbytes: int
    calls: Iterator[Callable[[], object]]
    warm: Callable[[], object]
    products: int = 1


def cold_copies(nbytes: int) -> int:
    """How many copies of a weight make each of them cold in its turn."""
    return max(2, -(-COLD_BYTES // nbytes))
