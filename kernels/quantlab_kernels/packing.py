"""The canonical storage of codes: bit planes.

`packed_codes` is int32 of shape (bits, out_features, ceil(in_features / 32)). Bit i of word w of plane p is
bit p of code 32 * w + i. Every width from 1 to 8 costs exactly that many bits per weight, no code straddles
two words, and the layout belongs to no device: a fast kernel derives its own from it once, at load.

Both directions work on eight codes at a time, held as the bytes of one int64. Byte order is that of the
safetensors format, little-endian.
"""

import torch
from torch import Tensor

MAX_BITS = 8
WORD_BITS = 32

_LOW_BIT_OF_EVERY_BYTE = 0x0101010101010101
# Multiplying by this moves the low bit of byte i to bit 56 + i; no two products meet, so nothing carries.
_GATHER_LOW_BITS = 0x0102040810204080


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bit planes.

    Args:
        codes: (out_features, in_features) uint8, each below 2**bits.
        bits: code width, 1 to 8.

    Returns:
        (bits, out_features, ceil(in_features / 32)) int32; the bits behind the last code are zero.

    Raises:
        ValueError: wrong dtype, shape or width, or a code that does not fit.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits} must be between 1 and {MAX_BITS}")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; expected a uint8 matrix")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"the largest code is {int(codes.max())}; codes of {bits} bits end at {(1 << bits) - 1}")
    padding = -codes.shape[1] % WORD_BITS
    eights = torch.nn.functional.pad(codes, (0, padding)).contiguous().view(torch.int64)
    planes = [
        ((eights >> plane & _LOW_BIT_OF_EVERY_BYTE) * _GATHER_LOW_BITS >> 56).to(torch.uint8) for plane in range(bits)
    ]
    return torch.stack(planes).view(torch.int32)


def unpack_codes(packed_codes: Tensor, in_features: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed_codes: (bits, out_features, ceil(in_features / 32)) int32.
        in_features: codes per row.

    Returns:
        (out_features, in_features) uint8. A view that skips the padding where in_features is not a multiple
        of 32, hence possibly non-contiguous.

    Raises:
        ValueError: wrong dtype or shape.
    """
    check_packed_codes(packed_codes, in_features)
    packed_bytes = packed_codes.contiguous().view(torch.uint8).to(torch.int32)
    spread = _byte_to_eight_bytes(packed_codes.device)
    eights = torch.zeros(packed_bytes.shape[1:], dtype=torch.int64, device=packed_codes.device)
    for plane, plane_bytes in enumerate(packed_bytes):
        eights |= spread.index_select(0, plane_bytes.flatten()).view_as(eights) << plane
    return eights.view(torch.uint8)[:, :in_features]


def check_packed_codes(packed_codes: Tensor, in_features: int) -> None:
    """Check dtype and shape, without looking at values.

    Raises:
        ValueError: `packed_codes` does not hold rows of `in_features` codes in 1 to 8 planes of int32 words.
    """
    words = -(-in_features // WORD_BITS)
    shape = tuple(packed_codes.shape)
    if packed_codes.dtype != torch.int32 or len(shape) != 3 or not 1 <= shape[0] <= MAX_BITS or shape[2] != words:
        raise ValueError(
            f"packed_codes are {packed_codes.dtype} of shape {shape}; in_features={in_features} needs int32 of "
            f"shape (bits, out_features, {words}) with 1 to {MAX_BITS} bits"
        )


def _byte_to_eight_bytes(device: torch.device) -> Tensor:
    """For every byte, its eight bits as the bytes of one word: (256,) int64."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return (byte[:, None] >> bit & 1).to(torch.uint8).view(torch.int64)[:, 0]
