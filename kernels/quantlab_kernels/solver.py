"""Native stages of the solvers, in float32; k-means is in float64.

Operands are plain tensors; what they mean is told where the same stage is written in PyTorch, in `quantlab.solvers`.
Every function needs the library: ask `usable` first. Each output row is computed by itself, in an order that depends
neither on its neighbours nor on the number of threads, so results are equal bit for bit.

What follows is for the CPU. Operands on CUDA go to the functions and classes of the same names in
`quantlab_kernels.solver_cuda`.

Kernels work on tiles of `LANES` output rows. Codebooks are brought into that form by `quantlab_kernels.solver_tiles`.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels import solver_cuda
from quantlab_kernels.native import usable_threads
from quantlab_kernels.solver_library import LIBRARY, BlockOperands, DescentOperands, JointOperands, SweepOperands
from quantlab_kernels.solver_tiles import LANES, TiledCodebooks

MAX_BLOCK = 64
"""Largest block of `descend_in_blocks`."""
_DESCEND, _ROUND, _RELAX = range(3)


def usable(*operands: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a library can take these operands: all on the same device in this dtype, and the library is there."""
    if _on_cuda(operands[0]):
        return solver_cuda.usable(*operands, dtype=dtype)
    suitable = all(operand.device.type == "cpu" and operand.dtype == dtype for operand in operands)
    return suitable and LIBRARY.get() is not None


class SweepProblem:
    """A weight and the factor of its Hessian, ready for triangular sweeps.

    Args:
        weight: (out_features, in_features).
        columns: (in_features,) int64, the inputs in the order of the factor; the last is rounded first.
        feedback: (in_features, in_features), unit lower triangular, columns contiguous.
        energy: (in_features,), in the order of the factor: what the squared distance from target to level counts.
        shift: (in_features,), in the order of the factor: what a squared error counts.
    """

    def __init__(self, weight: Tensor, columns: Tensor, feedback: Tensor, energy: Tensor, shift: Tensor) -> None:
        self.shape = weight.shape
        self._cuda = None
        if _on_cuda(weight):
            self._cuda = solver_cuda.SweepProblem(weight, columns, feedback, energy, shift)
            self.codes, self.loss = self._cuda.codes, self._cuda.loss
            return
        # The operands point into these tensors.
        self._tensors = (weight.contiguous(), columns.contiguous(), feedback.T.contiguous(), energy, shift)
        self._operands = SweepOperands(*(tensor.data_ptr() for tensor in self._tensors), *weight.shape)
        self.codes = torch.empty(weight.shape, dtype=torch.uint8)
        self.loss = torch.zeros(len(weight), dtype=torch.float64)

    def sweep(self, books: TiledCodebooks) -> Tensor:
        """Choose all codes; returns the error, (out_features, in_features)."""
        if self._cuda is not None:
            return self._cuda.sweep(books)
        error = torch.empty(self.shape)
        self._run(books, error, None)
        return error

    def targets(self, books: TiledCodebooks) -> Tensor:
        """Choose all codes; returns what was rounded, (out_features, in_features)."""
        if self._cuda is not None:
            return self._cuda.targets(books)
        targets = torch.empty(self.shape)
        self._run(books, None, targets)
        return targets

    def _run(self, books: TiledCodebooks, error: Tensor | None, targets: Tensor | None) -> None:
        threads, library = usable_threads(), _library()
        scratch = torch.empty(threads * library.solver_sweep_scratch(self.shape[1]), dtype=torch.uint8)
        library.solver_sweep(
            self._operands,
            books.operands(),
            self.codes.data_ptr(),
            None if error is None else error.data_ptr(),
            self.loss.data_ptr(),
            None if targets is None else targets.data_ptr(),
            scratch.data_ptr(),
            threads,
        )


class BlockwiseSweep(SweepProblem):
    """A sweep that stops before each block, so that its codebook can be chosen there; blocks come last to first."""

    def __init__(self, weight: Tensor, columns: Tensor, feedback: Tensor, energy: Tensor, shift: Tensor) -> None:
        super().__init__(weight, columns, feedback, energy, shift)
        if self._cuda is not None:
            return
        self._tiles = torch.empty(-(-len(weight) // LANES), weight.shape[1], LANES)
        _library().solver_load_tiles(self._operands, self._tiles.data_ptr(), usable_threads())

    def block_targets(self, start: int, end: int) -> Tensor:
        """The weights of a block, shifted by the errors behind it: (tiles, columns, LANES)."""
        if self._cuda is not None:
            return self._cuda.block_targets(start, end)
        targets = torch.empty(len(self._tiles), end - start, LANES)
        _library().solver_block_targets(self._operands, start, end, *_pointers(self._tiles, targets), usable_threads())
        return targets

    def round(self, start: int, end: int, targets: Tensor, books: TiledCodebooks) -> None:
        """Choose the codes of a block for the targets that `block_targets` gave; they are overwritten."""
        if self._cuda is not None:
            self._cuda.round(start, end, targets, books)
            return
        chosen = torch.empty(targets.shape, dtype=torch.uint8)
        _library().solver_round_block(
            self._operands,
            books.operands(),
            start,
            end,
            *_pointers(self._tiles, targets, chosen, self.codes, self.loss),
            usable_threads(),
        )

    def error(self) -> Tensor:
        """The error after the last block: (out_features, in_features)."""
        if self._cuda is not None:
            return self._cuda.error
        error = torch.empty(self.shape)
        _library().solver_store_tiles(self._operands, *_pointers(self._tiles, error), usable_threads())
        return error


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
    """Passes of coordinate descent over `codes` and `error`, both (out_features, in_features), in place.

    A code changes if the new error is nearer to the wanted one by the factor `closer`. Passes over rows that share a
    tile end when one changes nothing.

    Returns:
        (out_features,) float64, how far the losses fell.
    """
    if _on_cuda(weight):
        return solver_cuda.descend(weight, codes, error, hessian, order, books, sweeps=sweeps, closer=closer)
    return _descend(_DESCEND, hessian, order, codes, error, weight=weight, books=books, sweeps=sweeps, closer=closer)


def round_descending(weight: Tensor, error: Tensor, hessian: Tensor, order: Tensor, books: TiledCodebooks) -> Tensor:
    """One pass that rounds every input at its minimum and changes `error` in place; returns the codes."""
    if _on_cuda(weight):
        return solver_cuda.round_descending(weight, error, hessian, order, books)
    codes = torch.empty(error.shape, dtype=torch.uint8)
    _descend(_ROUND, hessian, order, codes, error, weight=weight, books=books)
    return codes


def relax(error: Tensor, hessian: Tensor, order: Tensor) -> None:
    """One pass without rounding, which changes `error` in place."""
    if _on_cuda(error):
        return solver_cuda.relax(error, hessian, order)
    _descend(_RELAX, hessian, order, None, error)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockFactors:
    """The Hessians of blocks of inputs and their factors.

    Attributes:
        order: (visited,) int64, the inputs block by block; in each block the last is rounded first.
        within: (blocks, size, size), the Hessian of each block.
        feedback: (blocks, size, size), the factor of each block, unit lower triangular.
        upper: (blocks, size, size), the transposed factors.
        precision: (visited,), in the given order, 1 over the squares of the factors' pivots.
    """

    order: Tensor
    within: Tensor
    feedback: Tensor
    upper: Tensor
    precision: Tensor


def factor_blocks(hessian: Tensor, order: Tensor, size: int, damping: float) -> tuple[BlockFactors, int]:
    """Factor the Hessian of every block of inputs; the factorisation itself is in float64.

    Args:
        hessian: (in_features, in_features).
        order: (visited,) int64, the inputs block by block.
        size: inputs of every block but the last, at most `MAX_BLOCK`.
        damping: fraction of the mean diagonal to add; more where a block needs it.

    Returns:
        The factors, and how many blocks could not be factored.
    """
    if _on_cuda(hessian):
        (within, feedback, upper, precision), failures = solver_cuda.factor_blocks(hessian, order, size, damping)
        return BlockFactors(order=order, within=within, feedback=feedback, upper=upper, precision=precision), failures
    hessian, order, blocks = hessian.contiguous(), order.contiguous(), -(-len(order) // size)
    within, feedback, upper = torch.zeros(3, blocks, size, size)
    factors = BlockFactors(
        order=order, within=within, feedback=feedback, upper=upper, precision=torch.empty(len(order))
    )
    found = _pointers(within, feedback, upper, factors.precision)
    operands = (hessian.data_ptr(), len(hessian), order.data_ptr(), len(order), size, damping)
    return factors, _library().solver_factor_blocks(*operands, *found, usable_threads())


def descend_in_blocks(
    weight: Tensor, codes: Tensor, error: Tensor, hessian: Tensor, factors: BlockFactors, books: TiledCodebooks
) -> Tensor:
    """One pass of block descent over `codes` and `error`, both (out_features, in_features), in place.

    Args:
        weight: (out_features, in_features).
        codes: to improve.
        error: the weight minus what the codes stand for.
        hessian: (in_features, in_features).
        factors: of the blocks to visit.
        books: what the codes select from.

    Returns:
        (out_features,) float64, by how much the losses changed: zero or negative.
    """
    if _on_cuda(weight):
        matrices = (factors.within, factors.feedback, factors.upper, factors.precision)
        return solver_cuda.descend_in_blocks(weight, codes, error, hessian, factors.order, matrices, books)
    threads = usable_threads()
    gained = torch.zeros(len(weight), dtype=torch.float64)
    weight, hessian = weight.contiguous(), hessian.contiguous()
    tensors = (weight, hessian, factors.order, factors.within, factors.feedback, factors.upper, factors.precision)
    operands = BlockOperands(*_pointers(*tensors), *weight.shape, len(factors.order), factors.within.shape[1])
    scratch = torch.empty(threads * _library().solver_blocks_scratch(weight.shape[1]), dtype=torch.uint8)
    _library().solver_descend_in_blocks(operands, books.operands(), *_pointers(codes, error, gained, scratch), threads)
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
    """Passes of joint descent over `codes` (out_features, in_features), in place; each row ends when nothing changes.

    Args:
        product: (out_features, in_features), the weight times the Hessian.
        codes: to improve.
        tables: (out_features, levels), what they select from.
        loss: (out_features,) float64, of codes and tables.
        hessian: (in_features, in_features).
        order: (visited,) int64, the inputs to visit, with positive diagonals.
        passes: upper limit.
        ridge: of the codebook equations, scaled to a unit diagonal.
        threshold: share of the loss by which a change has to lower it.
    """
    if _on_cuda(product):
        options = {"ridge": ridge, "threshold": threshold}
        return solver_cuda.descend_jointly(product, codes, tables, loss, hessian, order, passes=passes, **options)
    threads, levels = usable_threads(), tables.shape[1]
    product, tables, loss, hessian, order = (x.contiguous() for x in (product, tables, loss, hessian, order))
    shape = (*product.shape, len(order), levels, passes)
    operands = JointOperands(*_pointers(product, hessian, order), *shape, ridge, threshold)
    scratch = torch.empty(threads * _library().solver_joint_scratch(product.shape[1], levels), dtype=torch.uint8)
    _library().solver_descend_jointly(operands, *_pointers(tables, loss, codes, scratch), threads)


def multiply_symmetric(matrix: Tensor, hessian: Tensor) -> Tensor:
    """(rows, in_features) times a symmetric (in_features, in_features)."""
    if _on_cuda(matrix):
        return matrix @ hessian
    threads = usable_threads()
    matrix, hessian = matrix.contiguous(), hessian.contiguous()
    product = torch.empty(matrix.shape)
    operands = _pointers(matrix, hessian)
    scratch = _descent_scratch(matrix.shape[1], threads)
    _library().solver_multiply(*operands, *matrix.shape, *_pointers(product, scratch), threads)
    return product


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """The loss e H eᵀ of every row of an error (rows, in_features), summed in double precision: (rows,) float64."""
    if _on_cuda(error):
        return ((error.double() @ hessian.double()) * error).sum(dim=1)
    threads = usable_threads()
    error, hessian = error.contiguous(), hessian.contiguous()
    loss = torch.empty(len(error), dtype=torch.float64)
    scratch = _descent_scratch(error.shape[1], threads)
    _library().solver_measure(*_pointers(error, hessian), *error.shape, *_pointers(loss, scratch), threads)
    return loss


class HessianTriangle:
    """The upper triangle of a Hessian (in_features, in_features), packed for sums over pairs of codes."""

    def __init__(self, hessian: Tensor) -> None:
        if _on_cuda(hessian):
            self._packed = hessian  # read as it is
            return
        library, in_features, hessian = _library(), len(hessian), hessian.contiguous()
        self._packed = torch.empty(library.solver_triangle_floats(in_features))
        library.solver_pack_triangle(hessian.data_ptr(), in_features, self._packed.data_ptr(), usable_threads())

    def level_gram(self, codes: Tensor, levels: int) -> Tensor:
        """Sums of H over pairs of codes: (rows, levels, levels) for codes (rows, in_features) uint8 below `levels`."""
        if _on_cuda(codes):
            return solver_cuda.level_gram(codes, self._packed, levels)
        library, threads, codes = _library(), usable_threads(), codes.contiguous()
        gram = torch.empty(len(codes), levels, levels)
        scratch = torch.empty(threads * library.solver_gram_scratch(codes.shape[1], levels), dtype=torch.uint8)
        operands = (*_pointers(codes, self._packed), *codes.shape, levels)
        library.solver_gram(*operands, *_pointers(gram, scratch), threads)
        return gram


def solve_levels(gram: Tensor, right: Tensor, *, ridge: float, growth: float, attempts: int) -> tuple[Tensor, int]:
    """Solve M x = right for every row, as `quantlab.solvers.codebook` does: scaled to a unit diagonal, with a ridge.

    Args:
        gram: M, (rows, levels, levels) float32.
        right: (rows, levels) float64.
        ridge: added to the scaled diagonal.
        growth: factor of the ridge for the next attempt, for rows whose matrix is indefinite.
        attempts: how many.

    Returns:
        x, (rows, levels) float64, and how many rows could not be solved.
    """
    if _on_cuda(gram):
        return solver_cuda.solve_levels(gram, right, ridge=ridge, growth=growth, attempts=attempts)
    threads, (rows, levels) = usable_threads(), right.shape
    gram, solution = gram.contiguous(), right.clone(memory_format=torch.contiguous_format)
    scratch = torch.empty(threads, levels, levels, dtype=torch.float64)
    operands = (gram.data_ptr(), rows, levels, ridge, growth, attempts, *_pointers(solution, scratch), threads)
    return solution, _library().solver_solve(*operands)


def sums_by_code(codes: Tensor, values: Tensor, levels: int) -> Tensor:
    """Sums of values (rows, in_features) over inputs with the same code: (rows, levels) float64."""
    if _on_cuda(values):
        return solver_cuda.sums_by_code(codes, values, levels)
    codes, values = codes.contiguous(), values.contiguous()
    sums = torch.empty(len(codes), levels, dtype=torch.float64)
    _library().solver_sums_by_code(*_pointers(codes, values), *codes.shape, levels, sums.data_ptr(), usable_threads())
    return sums


def select_levels(codes: Tensor, levels: Tensor) -> Tensor:
    """What codes (rows, in_features) stand for in tables (rows, levels): (rows, in_features) float32."""
    return _look_up("solver_select_levels", codes, levels)


def relabel(codes: Tensor, labels: Tensor) -> Tensor:
    """New codes for old: `labels` are (rows, levels) uint8."""
    return _look_up("solver_relabel", codes, labels)


def cluster(
    values: Tensor, weights: Tensor, mass: Tensor, moment: Tensor, levels: int, iterations: int, *, greedy: bool
) -> Tensor:
    """k-means of every row as in `quantlab.solvers.kmeans`: the best of Lloyd's algorithm from several starts.

    Args:
        values: (rows, values) float64, ascending.
        weights: (rows, values) float64.
        mass: (rows, values + 1) float64, prefix sums of the weights from the left.
        moment: (rows, values + 1) float64, prefix sums of the weighted values.
        levels: clusters per row.
        iterations: upper limit for each start.
        greedy: whether the greedy start is among them.

    Returns:
        (rows, levels) float64.
    """
    if _on_cuda(values):
        return solver_cuda.cluster(values, weights, mass, moment, levels, iterations, greedy=greedy)
    values, weights, mass, moment = (tensor.contiguous() for tensor in (values, weights, mass, moment))
    centers = torch.empty(len(values), levels, dtype=torch.float64)
    shape = (*values.shape, levels, iterations, int(greedy))
    operands, scratch = _pointers(values, weights, mass, moment), _cluster_scratch(values.shape[1], levels)
    _library().solver_cluster(*operands, *shape, *_pointers(centers, scratch), usable_threads())
    return centers


def cluster_in_cells(
    values: Tensor, weights: Tensor | None, levels: int, iterations: int, *, cells: int, greedy: bool
) -> Tensor:
    """The same by way of a histogram with this many cells, for values (rows, values) in any order.

    Args:
        values: (rows, values) float32.
        weights: (rows, values) or (values,) float32, or None for equal weights.
        levels: clusters per row.
        iterations: upper limit for each start.
        cells: of the histogram.
        greedy: whether the greedy start is among them.

    Returns:
        (rows, levels) float64.
    """
    if _on_cuda(values):
        return solver_cuda.cluster_in_cells(values, weights, levels, iterations, cells=cells, greedy=greedy)
    values, weights = values.contiguous(), None if weights is None else weights.contiguous()
    centers = torch.empty(len(values), levels, dtype=torch.float64)
    pointers = (values.data_ptr(), None if weights is None else weights.data_ptr())
    stride = 0 if weights is None or weights.ndim == 1 else values.shape[1]
    shape, scratch = (*values.shape, cells, levels, iterations, int(greedy)), _cluster_scratch(cells, levels)
    _library().solver_cluster_in_cells(*pointers, stride, *shape, *_pointers(centers, scratch), usable_threads())
    return centers


def add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to sums in place; with the same tensor twice, only on and above the diagonal is it complete.

    Args:
        sums: (left features, right features) float32, contiguous.
        left: (tokens, left features) float32.
        right: (tokens, right features) float32.
    """
    if _on_cuda(sums):
        sums.addmm_(left.T, right)
        return
    library, symmetric = _library(), left is right
    right = right.contiguous()
    left = right if symmetric else left.contiguous()
    floats = library.solver_product_scratch(right.shape[1])
    floats += 0 if symmetric else library.solver_product_scratch(left.shape[1])
    scratch = torch.empty(floats)
    operands = (*_pointers(left, right), *right.shape[:1], left.shape[1], right.shape[1])
    library.solver_add_products(*operands, *_pointers(sums, scratch), usable_threads())


def _cluster_scratch(size: int, levels: int) -> Tensor:
    return torch.empty(usable_threads() * _library().solver_kmeans_scratch(size, levels), dtype=torch.uint8)


def _on_cuda(operand: Tensor) -> bool:
    return operand.is_cuda


def _look_up(function: str, codes: Tensor, table: Tensor) -> Tensor:
    if _on_cuda(table):
        return solver_cuda.look_up(codes, table)
    codes, table = codes.contiguous(), table.contiguous()
    found = torch.empty(codes.shape, dtype=table.dtype)
    operands = (*_pointers(codes, table), *codes.shape, table.shape[1], found.data_ptr())
    getattr(_library(), function)(*operands, usable_threads())
    return found


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
    threads = usable_threads()
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    hessian, order = hessian.contiguous(), order.contiguous()
    weight = error if weight is None else weight.contiguous()
    pointers = _pointers(weight, hessian, order, inverse)
    operands = DescentOperands(*pointers, *error.shape, sweeps, mode, closer)
    gain = torch.empty(len(error), dtype=torch.float64)
    scratch = _descent_scratch(error.shape[1], threads)
    changed = (None if codes is None else codes.data_ptr(), error.data_ptr())
    _library().solver_descend(
        operands, None if books is None else books.operands(), *changed, *_pointers(gain, scratch), threads
    )
    return gain


def _descent_scratch(in_features: int, threads: int) -> Tensor:
    return torch.empty(threads * _library().solver_descent_scratch(in_features), dtype=torch.uint8)


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _library() -> ctypes.CDLL:
    library = LIBRARY.get()
    if library is None:
        raise RuntimeError("the native solver library is not available; ask quantlab_kernels.solver.usable first")
    return library
