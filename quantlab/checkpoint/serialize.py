"""Writes a safetensors file piece by piece.

The safetensors library copies all tensors of a file before it writes the first; for the embeddings of a large
model that is several gigabytes. Here the largest temporary is one piece.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.atomic import replacing
from quantlab.errors import CheckpointError

PIECE_ELEMENTS = 1 << 22

ALIGNMENT_BYTES = 64
"""Where the data begins, so that a single mapped tensor lies where one in memory would."""

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_sha256(path: Path) -> str:
    """The hash that `write_safetensors` returned if a file is as it was written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, narrow_to: torch.dtype | None = None) -> str:
    """Write tensors to a file that is either complete or not there, also after a power cut.

    Args:
        path: the file; replaced if it exists.
        tensors: by name, of any layout and device; they may share memory.
        narrow_to: the dtype for wider floating tensors where every value survives; None keeps all dtypes.

    Returns:
        SHA-256 of the file.

    Raises:
        CheckpointError: a tensor is on the meta device, or of a dtype that cannot be stored.
        ResumableError: the system refuses to write.
    """
    with replacing(path) as temporary:
        return write_unsettled(temporary, tensors, narrow_to=narrow_to)


def write_unsettled(path: Path, tensors: Mapping[str, Tensor], *, narrow_to: torch.dtype | None = None) -> str:
    """Write tensors to a file that may be incomplete or gone after a power cut until it is flushed.

    Args and returned value are those of `write_safetensors`.

    Raises:
        CheckpointError: a tensor is on the meta device, or of a dtype that cannot be stored.
        OSError: the system refuses to write.
    """
    dtypes = {name: _stored_dtype(name, tensor, narrow_to) for name, tensor in tensors.items()}
    # Wide types first keeps every tensor aligned; names make the order independent of the caller's.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-(len(head) + 8) % ALIGNMENT_BYTES)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for name in order:
            for piece in pieces(tensors[name]):
                data = piece.to("cpu", dtypes[name]).contiguous().view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
    return digest.hexdigest()


def data_bytes(path: Path) -> int:
    """The size of the tensors in a safetensors file, without its header."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header_bytes


def _stored_dtype(name: str, tensor: Tensor, narrow_to: torch.dtype | None) -> torch.dtype:
    if tensor.is_meta:
        raise CheckpointError(f"tensor {name} has no values: it is on the meta device")
    if tensor.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"tensor {name} is {tensor.dtype}, which is not stored")
    if narrow_to is None or not tensor.is_floating_point() or tensor.itemsize <= narrow_to.itemsize:
        return tensor.dtype
    keeps_all = all(torch.equal(piece.to(narrow_to).to(piece.dtype), piece) for piece in pieces(tensor))
    return narrow_to if keeps_all else tensor.dtype


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in row-major order, in flat pieces of bounded size."""
    if tensor.dim() > 1 and not tensor.is_contiguous() and tensor.numel() > PIECE_ELEMENTS:
        for row in tensor:  # flattening a transposed matrix as a whole would copy it
            yield from pieces(row)
    else:
        yield from tensor.detach().reshape(-1).split(PIECE_ELEMENTS)
