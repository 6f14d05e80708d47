"""Every kernel once, on ragged shapes; `test_device.py` runs this file under compute-sanitizer."""

import torch

from quantlab_kernels import cuda, pack_codes, solver
from quantlab_kernels.solver_tiles import tile_grid, tile_table

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

INPUTS, GROUPS, SIZE = 135, 5, 50
weight, error = torch.randn(2, ROWS, INPUTS, device="cuda")
hessian = torch.eye(INPUTS, device="cuda") + 0.1
assert solver.usable(weight, hessian), "the kernels are not available"
order = torch.randperm(INPUTS, device="cuda")
feedback, unit = (0.1 * torch.randn(INPUTS, INPUTS, device="cuda")).tril(-1).fill_diagonal_(1), hessian.diagonal()
for groups in (1, GROUPS):
    levels = torch.randn(ROWS, groups, 40, device="cuda").sort(dim=2).values
    tables = [table[..., :count] for table, count in ((levels, 8), (levels, 40))]
    books = [tile_table(table.contiguous(), table.unfold(2, 2, 1).mean(dim=3), INPUTS) for table in tables]
    books.append(tile_grid(torch.ones(ROWS, groups, device="cuda"), torch.ones(ROWS, groups, device="cuda"), 2, INPUTS))
    for book in books:
        solver.SweepProblem(weight, order, feedback, unit, unit).sweep(book)
        blockwise = solver.BlockwiseSweep(weight, order, feedback, unit, unit)
        for end in range(INPUTS, 0, -SIZE):
            start = max(0, end - SIZE)
            blockwise.round(start, end, blockwise.block_targets(start, end), book)
        codes = solver.round_descending(weight, error, hessian, order, book)
        solver.descend(weight, codes, error, hessian, order, book, sweeps=2, closer=1.0)
solver.relax(error, hessian, order)
for count in (3, 8, 40):
    codes = torch.randint(0, count, (ROWS, INPUTS), dtype=torch.uint8, device="cuda")
    gram = solver.HessianTriangle(hessian).level_gram(codes, count)
    right = solver.sums_by_code(codes, weight, count)
    solution, _ = solver.solve_levels(gram, right, ridge=1e-6, growth=100.0, attempts=3)
    loss = solver.row_losses(weight, hessian)
    operands = (weight @ hessian, codes.clone(), solution.float(), loss, hessian, order)
    solver.descend_jointly(*operands, passes=2, ridge=1e-9, threshold=1e-6)
    solver.relabel(codes, codes[:, :count])
    solver.select_levels(codes, solution.float())
torch.cuda.synchronize()
