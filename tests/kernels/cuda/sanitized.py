"""Every kernel once, on ragged shapes; `test_device.py` runs this file under compute-sanitizer."""

import torch

from quantlab_kernels import cuda, pack_codes

ROWS, COLUMNS, ENTRIES = 37, 192, 50

for dtype in (torch.float16, torch.bfloat16):
    for bits in (2, 3, 4):
        codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), dtype=torch.uint8)
        packed_codes = pack_codes(codes, bits).cuda()
        offsets = torch.linspace(0, ENTRIES, ROWS + 1).int().cuda()
        outliers = (offsets, torch.randint(0, COLUMNS, (ENTRIES,)).int().cuda(), torch.randn(ENTRIES).half().cuda())
        bias = torch.randn(ROWS).cuda()
        for groups, uniform in ((1, False), (3, False), (6, False), (3, True), (6, True)):
            codebook = torch.rand(ROWS, groups, *(() if uniform else (1 << bits,))).half().cuda()
            zero = torch.rand(ROWS, groups).half().cuda() if uniform else None
            weight = cuda.prepare(packed_codes, codebook, zero, COLUMNS, dtype)
            assert weight is not None, "the kernels are not available"
            for tokens in (1, 9, 20, 50, 70):
                x = torch.randn(tokens, COLUMNS, device="cuda").to(dtype)
                cuda.lut_matmul_prepared(x, weight.codes, weight.codebook, None, weight.layout, bias, *outliers)
                cuda.lut_matmul(x, packed_codes, codebook, bias, *outliers, zero)
torch.cuda.synchronize()
