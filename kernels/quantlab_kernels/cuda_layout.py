"""The layout of a weight that the CUDA kernels read: tiles of 16 rows by 64 columns.

Rows are padded with zeros to whole tiles. Columns are padded with the last code of their row, so that a padded
lane, whose input is zero, never multiplies a level that the row does not use: zero times infinity is not zero.

Within a tile, lane 4 g + t of a warp owns the 32 codes of rows g and g + 8 whose columns are 32 h + 8 t + i for h in
(0, 1) and i below 8. The eight codes of one (h, row) are the nibbles of one word. How these four words become
`bits` words is described in csrc/cuda/lookup.cuh; in memory a tile is
    4 and 2 bits: (lane, word), one access of 16 or 8 bytes per lane;
    3 bits:       (word, lane), three accesses of 4 bytes per lane.
"""

import torch
from torch import Tensor

TILE_ROWS = 16
TILE_COLUMNS = 64
TILE_BITS = (2, 3, 4)
# The smallest group the kernels know. Larger ones must be this times a power of two.
HALF_COLUMNS = TILE_COLUMNS // 2

_LANE_ROWS, _LANE_QUARTERS, _RUN = 8, 4, 8
_LANES = _LANE_ROWS * _LANE_QUARTERS


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Arrange codes in tiles.

    Args:
        codes: (out_features, in_features) uint8, each below 2**bits.
        bits: 2, 3 or 4.

    Returns:
        (ceil(out_features / 16), ceil(in_features / 64), 32 * bits) int32.
    """
    pad_columns, pad_rows = -codes.shape[1] % TILE_COLUMNS, -codes.shape[0] % TILE_ROWS
    codes = torch.cat([codes, codes[:, -1:].expand(-1, pad_columns)], dim=1)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, pad_rows))
    row_blocks, tiles = codes.shape[0] // TILE_ROWS, codes.shape[1] // TILE_COLUMNS
    # From (block, row half, g, tile, h, t, i) to (block, tile, lane, h, row half, i).
    split = codes.view(row_blocks, 2, _LANE_ROWS, tiles, 2, _LANE_QUARTERS, _RUN)
    nibbles = split.permute(0, 3, 2, 5, 4, 1, 6).reshape(row_blocks, tiles, _LANES, 2, 2, _RUN)
    if bits == 4:
        words = _join_nibbles(nibbles).flatten(3)
    elif bits == 3:
        fourth = nibbles[..., 1, 1, :]
        carriers = (nibbles[..., 0, 0, :], nibbles[..., 0, 1, :], nibbles[..., 1, 0, :])
        joined = [_join_nibbles(carrier | (fourth >> bit & 1) << 3) for bit, carrier in enumerate(carriers)]
        words = torch.stack(joined, dim=2)  # (block, tile, word, lane)
    else:
        words = _join_nibbles(nibbles[..., 0, :] | nibbles[..., 1, :] << 2)
    return words.reshape(row_blocks, tiles, _LANES * bits).contiguous()


def unpack_tiles(tiles: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Undo `pack_tiles`: (out_features, in_features) uint8."""
    row_blocks, column_tiles, _ = tiles.shape
    if bits == 4:
        nibbles = _split_nibbles(tiles.view(row_blocks, column_tiles, _LANES, 2, 2))
    elif bits == 3:
        carriers = _split_nibbles(tiles.view(row_blocks, column_tiles, 3, _LANES))
        bits_of_fourth = [carriers[:, :, bit] >> 3 << bit for bit in range(3)]
        fourth = bits_of_fourth[0] | bits_of_fourth[1] | bits_of_fourth[2]
        nibbles = torch.stack([*(carriers & 7).unbind(2), fourth], dim=3).unflatten(3, (2, 2))
    else:
        pairs = _split_nibbles(tiles.view(row_blocks, column_tiles, _LANES, 2))
        nibbles = torch.stack([pairs & 3, pairs >> 2], dim=4)
    # From (block, tile, g, t, h, row half, i) to (block, row half, g, tile, h, t, i).
    split = nibbles.reshape(row_blocks, column_tiles, _LANE_ROWS, _LANE_QUARTERS, 2, 2, _RUN)
    codes = split.permute(0, 5, 2, 1, 4, 3, 6).reshape(row_blocks * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return codes[:out_features, :in_features]


def byte_planes(levels: Tensor) -> Tensor:
    """Tables as the kernels read them: the low bytes of the levels of a codebook, then the high bytes.

    Args:
        levels: (out_features, groups, 2**bits), float16 or bfloat16.

    Returns:
        (out_features padded to 16, groups, 2, 2**bits) uint8.
    """
    return pad_rows(levels).unsqueeze(-1).view(torch.uint8).transpose(2, 3).contiguous()


def pad_rows(per_row: Tensor) -> Tensor:
    """Pad (out_features, ...) with rows of zeros to whole tiles."""
    padding = -per_row.shape[0] % TILE_ROWS
    return torch.cat([per_row, per_row.new_zeros(padding, *per_row.shape[1:])])


def _join_nibbles(nibbles: Tensor) -> Tensor:
    """(..., 8) uint8 below 16 to (...) int32, the first in the lowest bits."""
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _split_nibbles(words: Tensor) -> Tensor:
    """(...) int32 to (..., 8) uint8 below 16."""
    pairs = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
