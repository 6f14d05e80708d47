import pytest
import torch

from quantlab_kernels import cuda, pack_codes
from quantlab_kernels.cuda_layout import byte_planes, pack_tiles, pad_rows, unpack_tiles
from quantlab_kernels.cuda_library import Codebook


def random_codes(rows, columns, bits):
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    codes[-1, -1] = (1 << bits) - 1
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (17, 65), (7, 127), (40, 256)])
def test_unpacking_tiles_gives_the_codes_back(bits, rows, columns):
    codes = random_codes(rows, columns, bits)
    tiles = pack_tiles(codes, bits)
    assert tiles.shape == (-(-rows // 16), -(-columns // 64), 32 * bits)
    assert torch.equal(unpack_tiles(tiles, bits, rows, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_padded_columns_repeat_a_code_that_the_row_uses(bits):
    codes = random_codes(16, 70, bits)
    padded = unpack_tiles(pack_tiles(codes, bits), bits, 16, 128)
    assert torch.equal(padded[:, 70:], codes[:, 69:70].expand(-1, 58))


def test_lane_owns_runs_of_eight_codes_of_two_rows():
    # Lane 4 g + t = 9 is g = 2, t = 1; its word 2 h + r holds row 2 + 8 r, columns 32 h + 8 to 32 h + 15.
    codes = random_codes(16, 64, 4)
    words = pack_tiles(codes, 4).view(32, 4)[9]
    for half in range(2):
        for row in range(2):
            nibbles = [int(words[2 * half + row]) >> 4 * i & 15 for i in range(8)]
            assert nibbles == codes[2 + 8 * row, 32 * half + 8 : 32 * half + 16].tolist()


def test_byte_planes_hold_low_bytes_before_high_bytes():
    levels = torch.tensor([[[0x1234, 0x5678, -0x0F10, 0x0001]]], dtype=torch.int16).view(torch.float16)
    planes = byte_planes(levels)
    assert planes.shape == (16, 1, 2, 4)
    assert planes[0, 0].tolist() == [[0x34, 0x78, 0xF0, 0x01], [0x12, 0x56, 0xF0, 0x00]]
    assert planes[1:].count_nonzero() == 0


def test_rows_that_fill_tiles_are_not_padded():
    assert pad_rows(torch.ones(32, 3)).shape == (32, 3)
    assert pad_rows(torch.ones(33, 3)).shape == (48, 3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prepared_weight_restores_its_planes(bits, make_case, emulation):
    case = make_case(19, 77, bits=bits)
    prepared = case.prepare(torch.float16)
    assert torch.equal(prepared.restore(prepared), case.packed_codes)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, Codebook.PER_ROW),
        ({"uniform": True}, Codebook.PER_ROW),
        ({"group": 32}, Codebook.PER_GROUP),
        ({"group": 128, "uniform": True}, Codebook.UNIFORM),
    ],
)
def test_kind_of_codebook_follows_from_the_operands(arguments, kind, make_case, emulation):
    prepared = make_case(16, 256, **arguments).prepare(torch.float16)
    assert prepared.layout == [16, 256, 4, 256 // arguments.get("group", 256), kind]


def test_scale_that_is_not_stored_as_float16_becomes_a_table(make_case, emulation):
    case = make_case(16, 256, group=32, uniform=True)
    prepared = cuda.prepare(case.packed_codes, case.codebook.float() / 3, case.zero, 256, torch.float16)
    assert prepared.layout[4] == Codebook.PER_GROUP


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_other_widths_stay_planes(bits, make_case, emulation):
    assert make_case(16, 64, bits=bits).prepare(torch.float16) is None


@pytest.mark.parametrize(("columns", "group"), [(96, 16), (288, 96), (66, 22)])
def test_groups_that_are_not_32_times_a_power_of_two_stay_planes(columns, group, make_case, emulation):
    assert make_case(16, columns, group=group).prepare(torch.float16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_without_tensor_cores_stay_planes(dtype, make_case, emulation):
    assert make_case(16, 64).prepare(dtype) is None


def test_nothing_is_prepared_without_the_library(make_case, monkeypatch):
    monkeypatch.setattr("quantlab_kernels.cuda_library.LIBRARY.get", lambda: None)
    assert make_case(16, 64).prepare(torch.float16) is None


@pytest.mark.parametrize(
    ("rows", "columns", "warps"),
    [
        (4096, 4096, 16),  # 256 blocks on 132 multiprocessors
        (11008, 4096, 8),
        (1024, 4096, 16),
        (4096, 128, 2),  # no warp without a tile
        (1, 1, 1),
    ],
)
def test_number_of_warps_follows_from_the_shape(rows, columns, warps):
    assert cuda.warps_per_block(rows, columns, multiprocessors=132) == warps


def test_tiles_take_exactly_as_many_bits_as_the_planes():
    codes = random_codes(32, 256, 3)
    assert pack_tiles(codes, 3).nbytes == pack_codes(codes, 3).nbytes == 32 * 256 * 3 // 8
