"""Kernels of other projects, to be timed beside ours where they are installed. None of them is a dependency.

They get random operands in the shapes that their own layers pass: what is measured is time, not their results.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128  # FLUTE has one table per layer, and a scale per group


@dataclass(frozen=True)
class Peer:
    """A kernel of another project.

    Attributes:
        name: of the project.
        bits: code widths that it knows.
        most_tokens: above that it takes another way.
        dtypes: of x.
        prepare: for x, out_features and bits, a product and the bytes of its weight.
    """

    name: str
    bits: frozenset[int]
    most_tokens: int
    dtypes: tuple[torch.dtype, ...]
    prepare: Callable[[Tensor, int, int], tuple[Callable[[], object], int]]


def installed() -> Iterator[Peer]:
    """Those that can be imported."""
    both = (torch.float16, torch.bfloat16)
    known = {
        "any_precision_ext": Peer("Any-Precision", frozenset(range(2, 9)), 8, (torch.float16,), _any_precision),
        "quant_cuda": Peer("SqueezeLLM", frozenset({3, 4}), 16, both, _squeezellm),
        "flute": Peer("FLUTE", frozenset({2, 3, 4}), 2048, both, _flute),
    }
    for module, peer in known.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        yield peer


def _any_precision(x: Tensor, out_features: int, bits: int) -> tuple[Callable[[], object], int]:
    import any_precision_ext

    planes = _random_words(bits, out_features, x.shape[1] // 32)
    table = torch.randn(out_features, 1 << bits, device=x.device).half()
    return lambda: any_precision_ext.matmul_kbit(x, planes, table, bits), planes.nbytes + table.nbytes


def _squeezellm(x: Tensor, out_features: int, bits: int) -> tuple[Callable[[], object], int]:
    import quant_cuda

    words = _random_words(x.shape[1] // 32 * bits, out_features)
    table = torch.randn(out_features, 1 << bits, device=x.device)
    batched = "_batched" if len(x) > 1 else ""
    function = getattr(quant_cuda, f"vecquant{bits}matmul_nuq_perchannel{batched}")

    def multiply() -> Tensor:
        # As their layer does: in float32, added to a result that is zero.
        y = torch.zeros(len(x), out_features, device=x.device)
        function(x.float(), words, y if batched else y[0], table)
        return y.to(x.dtype)

    return multiply, words.nbytes + table.nbytes


def _flute(x: Tensor, out_features: int, bits: int) -> tuple[Callable[[], object], int]:
    import flute
    import flute.tune
    import flute.utils

    codes = torch.randint(0, 1 << bits, (x.shape[1], out_features), device=x.device)
    words, found = flute.tune.tune_and_pack(inputs=x, weight=codes, num_bits=bits, group_size=GROUP)
    scales = torch.randn(out_features, x.shape[1] // GROUP, device=x.device).to(x.dtype)
    table = torch.randn(1 << bits, device=x.device).to(x.dtype)
    pairs, workspace = flute.utils.make_qmap2_from_qmap(table), flute.utils.make_workspace_streamk(device=x.device)
    operands = (words, scales, table, pairs, workspace, bits, GROUP, found.template_id, found.num_sms)
    return lambda: flute.qgemm(x, *operands), words.nbytes + scales.nbytes


def _random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int32)
