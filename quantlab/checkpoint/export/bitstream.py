"""Codes one after the other in a stream of bits, which compressed-tensors and GPTQ both cut into 32-bit words.

Code i of a row occupies the bits from i * bits on, counted from the lowest bit of the first word; a code may straddle
two words.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_WORD = 32


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes.

    Args:
        codes: (rows, count) uint8, each below 2**bits.
        bits: code width, 1 to 8.

    Returns:
        (rows, ceil(count * bits / 32)) int32; the bits behind the last code are zero.
    """
    rows, count = codes.shape
    runs = pad(codes, (0, -count % _WORD)).view(rows, -1, _WORD).long()  # 32 codes fill `bits` words
    words = torch.zeros(rows, runs.shape[1], bits + 1, dtype=torch.int64)
    for index in range(_WORD):
        word, offset = divmod(index * bits, _WORD)
        shifted = runs[..., index] << offset
        words[..., word] |= shifted & 0xFFFFFFFF
        words[..., word + 1] |= shifted >> _WORD
    stream = words[..., :bits].reshape(rows, -1)[:, : -(-count * bits // _WORD)]
    return torch.where(stream >= 1 << 31, stream - (1 << 32), stream).to(torch.int32)
