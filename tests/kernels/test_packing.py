import pytest
import torch

from quantlab_kernels import pack_codes, unpack_codes

WIDTHS = range(1, 9)
LENGTHS = (1, 7, 31, 32, 33, 63, 64, 65, 1000)


def random_codes(rows, columns, bits):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    codes[0] = 2**bits - 1  # the top bit of every word is set in one row
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", LENGTHS)
def test_unpacking_undoes_packing(bits, columns):
    codes = random_codes(5, columns, bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (bits, 5, -(-columns // 32))
    assert torch.equal(unpack_codes(packed, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bit_i_of_word_w_of_plane_p_is_bit_p_of_code_32w_plus_i(bits):
    codes = random_codes(2, 45, bits)
    packed = pack_codes(codes, bits)
    for plane in range(bits):
        for word in range(2):
            for row in range(2):
                expected = sum(
                    (int(code) >> plane & 1) << i for i, code in enumerate(codes[row, 32 * word : 32 * word + 32])
                )
                assert packed[plane, row, word].item() & 0xFFFFFFFF == expected


def test_a_known_vector_is_packed_as_published():
    codes = torch.tensor([[1, 0, 3, 2]], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [[[0b0101]], [[0b1100]]]


def test_bits_behind_the_last_code_are_zero_and_are_ignored():
    codes = torch.full((1, 33), 7, dtype=torch.uint8)
    packed = pack_codes(codes, 3)
    assert packed[:, :, 1].tolist() == [[1], [1], [1]]
    packed[:, :, 1] = -1
    assert torch.equal(unpack_codes(packed, 33), codes)


def test_rows_of_a_larger_tensor_unpack_alone():
    codes = random_codes(6, 70, 4)
    assert torch.equal(unpack_codes(pack_codes(codes, 4)[:, 2:5], 70), codes[2:5])


def test_packed_codes_in_another_memory_order_unpack_alike():
    codes = random_codes(6, 70, 4)
    strided = pack_codes(codes, 4).mT.contiguous().mT
    assert torch.equal(unpack_codes(strided, 70), codes)


def test_non_contiguous_codes_pack_like_their_copy():
    codes = random_codes(64, 6, 3).T
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([[8]], dtype=torch.uint8), 3, "largest code is 8.*3 bits end at 7"),
        (torch.tensor([[1]]), 3, "int64.*expected a uint8 matrix"),
        (torch.tensor([1], dtype=torch.uint8), 3, r"shape \(1,\).*expected a uint8 matrix"),
        (torch.tensor([[1]], dtype=torch.uint8), 9, "bits=9"),
        (torch.tensor([[0]], dtype=torch.uint8), 0, "bits=0"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits)


@pytest.mark.parametrize("packed", [torch.zeros(4, 3, 1), torch.zeros(3, 1, dtype=torch.int32)])
def test_packed_codes_of_the_wrong_kind_are_refused(packed):
    with pytest.raises(ValueError, match="needs int32 of shape"):
        unpack_codes(packed, 32)


def test_a_row_length_that_does_not_match_the_words_is_refused():
    with pytest.raises(ValueError, match=r"in_features=65 needs int32 of shape \(bits, out_features, 3\)"):
        unpack_codes(pack_codes(random_codes(2, 64, 4), 4), 65)
