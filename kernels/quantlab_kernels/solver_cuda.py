"""Native stages of the solvers on CUDA, in float32; k-means is in float64.

The functions are those of `quantlab_kernels.solver`, which calls them for operands on CUDA. A stage is one kernel, or a
few: a block of threads takes its output rows through all inputs, so that the number of launches depends neither on the
size of the layer nor on the number of passes. Work goes to the current stream. There are no atomics, and the order of
every sum is fixed, so results repeat bit for bit; they do not depend on which rows are solved together. Only
`factor_blocks` and `solve_levels` wait for the device, for the number of failures.

Sums are taken in another order than on the CPU and in PyTorch. Codes agree but for targets that lie within rounding of
the midpoint between two levels, and for what follows from these.

The kernels compile for compute capability 8.0, 8.6, 8.9 and 9.0 and are tested by emulation on the host. They have not
yet been run on a device.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantlab_kernels import cuda_common
from quantlab_kernels.solver_cuda_library import (
    BLOCK_ROWS,
    LIBRARY,
    MAX_BLOCK,
    SEGMENT,
    Blocks,
    Books,
    Cluster,
    Descent,
    Factors,
    Joint,
    Sweep,
)
from quantlab_kernels.solver_tiles import TiledCodebooks

_VECTOR = 4  # floats of a vector access
_WORKSPACE_BYTES = 256 << 20  # of sums over rows of the Hessian held at a time
_DESCEND, _ROUND, _RELAX = range(3)


def usable(*operands: Tensor, dtype: torch.dtype) -> bool:
    """Whether the library can take these operands: all on one device in this dtype, and the library is there."""
    device = operands[0].device
    suitable = all(operand.device == device and operand.dtype == dtype for operand in operands)
    return suitable and LIBRARY.get() is not None


class SweepProblem:
    """`quantlab_kernels.solver.SweepProblem` and, with blocks, `BlockwiseSweep`.

    Attributes:
        codes: (out_features, in_features) uint8, as far as they are chosen.
        error: (out_features, in_features), likewise.
        loss: (out_features,) float64, likewise.
    """

    def __init__(self, weight: Tensor, columns: Tensor, feedback: Tensor, energy: Tensor, shift: Tensor) -> None:
        self._weight, self._columns = weight.contiguous(), columns.contiguous()
        self._energy, self._shift = energy.contiguous(), shift.contiguous()
        self._feedback = _vector_rows(feedback)
        self._behind = _by_position(weight)
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self.error = torch.empty_like(self._weight)
        self.loss = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)

    def sweep(self, books: TiledCodebooks) -> Tensor:
        """Choose all codes; returns the error."""
        self._choose(0, self._weight.shape[1], None, books)
        return self.error

    def targets(self, books: TiledCodebooks) -> Tensor:
        """Choose all codes; returns what was rounded, (out_features, in_features)."""
        rounded = torch.empty_like(self._weight)
        self._choose(0, self._weight.shape[1], None, books, rounded)
        return rounded

    def block_targets(self, start: int, end: int) -> Tensor:
        """The weights of a block, shifted by the errors behind it: (1, columns, out_features)."""
        values, behind = self._weight.T[self._columns[start:end]], self._behind[end:, : len(self._weight)]
        targets: Tensor = torch.addmm(values, self._feedback[end:, start:end].T, behind)
        return targets[None]

    def round(self, start: int, end: int, targets: Tensor, books: TiledCodebooks) -> None:
        """Choose the codes of a block for the targets that `block_targets` gave."""
        self._choose(start, end, targets, books)

    def _choose(
        self, start: int, end: int, targets: Tensor | None, books: TiledCodebooks, rounded: Tensor | None = None
    ) -> None:
        by_row = _Books(books)
        operands = Sweep(
            *_pointers(self._weight, self._columns, self._feedback, self._energy, self._shift, targets),
            *_pointers(self._behind, self.codes, self.error, self.loss, rounded),
            self._feedback.stride(0),
            self._behind.stride(0),
            *self._weight.shape,
            start,
            end,
        )
        _run("sweep", self._weight, ctypes.byref(operands), by_row.reference)


def descend(
    weight: Tensor,
    codes: Tensor,
    error: Tensor,
    hessian: Tensor,
    order: Tensor,
    books: TiledCodebooks,
    *,
    sweeps: int,
    closer: float,
) -> Tensor:
    """`quantlab_kernels.solver.descend`."""
    return _descend(_DESCEND, hessian, order, codes, error, weight=weight, books=books, sweeps=sweeps, closer=closer)


def round_descending(weight: Tensor, error: Tensor, hessian: Tensor, order: Tensor, books: TiledCodebooks) -> Tensor:
    """`quantlab_kernels.solver.round_descending`."""
    codes = torch.empty(error.shape, dtype=torch.uint8, device=error.device)
    _descend(_ROUND, hessian, order, codes, error, weight=weight, books=books)
    return codes


def relax(error: Tensor, hessian: Tensor, order: Tensor) -> None:
    """`quantlab_kernels.solver.relax`."""
    _descend(_RELAX, hessian, order, None, error)


def factor_blocks(
    hessian: Tensor, order: Tensor, size: int, damping: float
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
    """`quantlab_kernels.solver.factor_blocks`: its factors, without the order."""
    hessian, order, blocks = hessian.contiguous(), order.contiguous(), -(-len(order) // size)
    within, feedback, upper = hessian.new_empty(3, blocks, size, size)
    precision, failed = hessian.new_empty(len(order)), order.new_empty(blocks, dtype=torch.uint8)
    operands = Factors(
        *_pointers(hessian, order, within, feedback, upper, precision, failed),
        damping,
        len(hessian),
        len(order),
        size,
    )
    _run("factor_blocks", hessian, ctypes.byref(operands))
    return (within, feedback, upper, precision), int(failed.sum())


def descend_in_blocks(
    weight: Tensor,
    codes: Tensor,
    error: Tensor,
    hessian: Tensor,
    order: Tensor,
    factors: Sequence[Tensor],
    books: TiledCodebooks,
) -> Tensor:
    """`quantlab_kernels.solver.descend_in_blocks`; the factors are those of `factor_blocks`."""
    within, feedback, upper, precision = factors
    (rows, inputs), (count, size, _) = weight.shape, within.shape
    # Every block has MAX_BLOCK places, so that it begins where vectors do; what the rest of them hold is not used.
    missing = MAX_BLOCK - size
    places = _padded(_padded(order, count * size - len(order)).view(count, size), missing)
    columns = hessian[:, places.flatten()].contiguous()
    by_input = _by_position(weight)
    by_input[:, :rows] = error.T
    gained = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    matrices = [_padded(matrix, missing, missing) for matrix in (within, feedback, upper)]
    tensors = [weight.contiguous(), columns, order.contiguous(), *matrices, precision]
    by_row = _Books(books)
    operands = Blocks(
        *_pointers(*tensors, by_input, codes, gained),
        columns.stride(0),
        by_input.stride(0),
        rows,
        inputs,
        len(order),
        size,
    )
    _run("descend_in_blocks", weight, ctypes.byref(operands), by_row.reference)
    error.copy_(by_input[:, :rows].T)
    return gained


def descend_jointly(
    product: Tensor,
    codes: Tensor,
    tables: Tensor,
    loss: Tensor,
    hessian: Tensor,
    order: Tensor,
    *,
    passes: int,
    ridge: float,
    threshold: float,
) -> None:
    """`quantlab_kernels.solver.descend_jointly`."""
    (inputs, levels), hessian, order = (product.shape[1], tables.shape[1]), hessian.contiguous(), order.contiguous()
    rows_at_a_time = max(1, _WORKSPACE_BYTES // (levels * inputs * product.element_size()))
    for start in range(0, len(product), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        of_rows = [matrix[rows].contiguous() for matrix in (product, tables, loss)]
        count = len(of_rows[0])
        sums, gradient = product.new_empty(count, levels, inputs), product.new_empty(count, inputs)
        matrices = loss.new_empty(count, 2, levels, levels)
        operands = Joint(
            *_pointers(of_rows[0], hessian, order, *of_rows[1:], codes[rows], sums, gradient, matrices),
            ridge,
            threshold,
            count,
            inputs,
            len(order),
            levels,
            passes,
        )
        _run("descend_jointly", product, ctypes.byref(operands))


def level_gram(codes: Tensor, hessian: Tensor, levels: int) -> Tensor:
    """`quantlab_kernels.solver.HessianTriangle.level_gram`."""
    hessian = hessian.contiguous()
    rows_at_a_time = max(1, _WORKSPACE_BYTES // (levels * codes.shape[1] * hessian.element_size()))
    return torch.cat([_gram(chunk, hessian, levels) for chunk in codes.contiguous().split(rows_at_a_time)])


def solve_levels(gram: Tensor, right: Tensor, *, ridge: float, growth: float, attempts: int) -> tuple[Tensor, int]:
    """`quantlab_kernels.solver.solve_levels`."""
    rows, levels = right.shape
    gram, solution = gram.contiguous(), right.clone(memory_format=torch.contiguous_format)
    scratch = right.new_empty(rows, levels + 1, levels)
    failed = right.new_empty(rows, dtype=torch.uint8)
    operands = (*_pointers(gram), rows, levels, ridge, growth, attempts, *_pointers(solution, scratch, failed))
    _run("solve", right, *operands)
    return solution, int(failed.sum())


def sums_by_code(codes: Tensor, values: Tensor, levels: int) -> Tensor:
    """`quantlab_kernels.solver.sums_by_code`."""
    return _sums_by_code(codes.contiguous(), values[:, None].contiguous(), levels).squeeze(1)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[row][codes[row][j]] for a table (rows, levels) in float32 or uint8: (rows, in_features)."""
    codes, table = codes.contiguous(), table.contiguous()
    found = torch.empty(codes.shape, dtype=table.dtype, device=table.device)
    shape = (*codes.shape, table.shape[1], table.element_size())
    _run("look_up", codes, *_pointers(codes, table), *shape, *_pointers(found))
    return found


def cluster(
    values: Tensor, weights: Tensor, mass: Tensor, moment: Tensor, levels: int, iterations: int, *, greedy: bool
) -> Tensor:
    """`quantlab_kernels.solver.cluster`."""
    values, weights, mass, moment = (tensor.contiguous() for tensor in (values, weights, mass, moment))
    centers = values.new_empty(len(values), levels)
    share, cumulative, distinct = (torch.empty_like(values, dtype=dtype) for dtype in (None, None, torch.int32))
    operands = Cluster(
        *_pointers(values, weights, mass, moment, share, cumulative, distinct, centers),
        *values.shape,
        levels,
        iterations,
        greedy,
    )
    _run("cluster", values, ctypes.byref(operands))
    return centers


def cluster_in_cells(
    values: Tensor, weights: Tensor | None, levels: int, iterations: int, *, cells: int, greedy: bool
) -> Tensor:
    """`quantlab_kernels.solver.cluster_in_cells`."""
    (rows, size), values = values.shape, values.contiguous()
    weights = None if weights is None else weights.contiguous()
    stride = 0 if weights is None or weights.ndim == 1 else size
    means, masses = torch.empty(2, rows, cells, dtype=torch.float64, device=values.device)
    mass, moment = torch.empty(2, rows, cells + 1, dtype=torch.float64, device=values.device)
    found = _pointers(means, masses, mass, moment)
    _run("fill_cells", values, *_pointers(values, weights), stride, rows, size, cells, *found)
    return cluster(means, masses, mass, moment, levels, iterations, greedy=greedy)


class _Books:
    """Codebooks by row in place of tiles; the operands of the library point into these tensors."""

    def __init__(self, books: TiledCodebooks) -> None:
        tensors = (books.levels, books.midpoints, books.scale, books.zero)
        self._tensors = [None if tensor is None else _from_tiles(tensor) for tensor in tensors]
        self._operands = Books(*_pointers(*self._tensors), books.groups, books.group_size, books.count)
        self.reference = ctypes.byref(self._operands)


def _from_tiles(tiles: Tensor) -> Tensor:
    """(tiles, ..., lanes) as (tiles times lanes, ...), contiguous."""
    return tiles.movedim(-1, 1).flatten(0, 1).contiguous()


def _descend(
    mode: int,
    hessian: Tensor,
    order: Tensor,
    codes: Tensor | None,
    error: Tensor,
    *,
    weight: Tensor | None = None,
    books: TiledCodebooks | None = None,
    sweeps: int = 1,
    closer: float = 1.0,
) -> Tensor:
    rows, inputs = error.shape
    order = order.contiguous()
    in_order = _vector_rows(hessian[order[:, None], order])
    diagonal = in_order.diagonal().contiguous()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    by_position = _by_position(error)
    by_position[:, :rows] = error.T[order]
    weight = error if weight is None else weight.contiguous()
    gain = torch.zeros(rows, dtype=torch.float64, device=error.device)
    by_row = None if books is None else _Books(books)
    operands = Descent(
        *_pointers(weight, in_order, order, diagonal, inverse, by_position, codes, gain),
        in_order.stride(0),
        by_position.stride(0),
        rows,
        inputs,
        sweeps,
        mode,
        closer,
    )
    _run("descend", error, ctypes.byref(operands), None if by_row is None else by_row.reference)
    error.T.index_copy_(0, order, by_position[:, :rows])
    return gain


def _gram(codes: Tensor, hessian: Tensor, levels: int) -> Tensor:
    rows, inputs = codes.shape
    segments = -(-inputs // SEGMENT)
    lists = codes.new_empty(rows, segments, SEGMENT // 4 + levels, dtype=torch.int32)
    starts = codes.new_empty(rows, segments, levels + 1, dtype=torch.int16)
    _run("sort_codes", codes, *_pointers(codes), rows, inputs, levels, *_pointers(lists, starts))
    sums = hessian.new_empty(rows, levels, inputs)
    _run("sum_hessian_rows", codes, *_pointers(hessian, lists, starts), rows, inputs, levels, *_pointers(sums))
    half = _sums_by_code(codes, sums, levels)
    return (half + half.mT).to(hessian.dtype)


def _sums_by_code(codes: Tensor, values: Tensor, levels: int) -> Tensor:
    """Sums of values (rows, repeats, in_features) over inputs with the same code: (rows, repeats, levels) float64."""
    rows, repeats, inputs = values.shape
    sums = torch.empty(rows, repeats, levels, dtype=torch.float64, device=values.device)
    _run("sums_by_code", values, *_pointers(codes, values), rows, repeats, inputs, levels, *_pointers(sums))
    return sums


def _vector_rows(matrix: Tensor) -> Tensor:
    """The matrix by rows, each of which begins where vectors do."""
    return _padded(matrix, -matrix.shape[1] % _VECTOR).contiguous()


def _padded(tensor: Tensor, columns: int, rows: int = 0) -> Tensor:
    """With columns and rows of zeros at the end; as it is where there are none to add."""
    return pad(tensor, (0, columns, 0, rows) if rows else (0, columns)) if columns or rows else tensor


def _by_position(weight: Tensor) -> Tensor:
    """Zeros for the errors of all rows by position: (in_features, at least out_features)."""
    rows, inputs = weight.shape
    return weight.new_zeros(inputs, rows + -rows % BLOCK_ROWS)


def _pointers(*tensors: Tensor | None) -> Sequence[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _run(function: str, operand: Tensor, *arguments: object) -> None:
    """Queue a function of the library on the current stream of the operand's device.

    Raises:
        RuntimeError: the library is missing, or a launch failed.
    """
    library = LIBRARY.get()
    if library is None:
        raise RuntimeError("the CUDA library of the solvers is not available; ask quantlab_kernels.solver.usable first")
    device = operand.device
    stream = cuda_common.current_stream(device)
    status = getattr(library, f"quantlab_solver_{function}")(*arguments, device.index or 0, stream)
    if status != 0:
        reason = "not implemented" if status < 0 else library.quantlab_solver_error(status).decode()
        raise RuntimeError(
            f"{function} for operands of shape {tuple(operand.shape)} on {device} failed with status {status}: {reason}"
        )
