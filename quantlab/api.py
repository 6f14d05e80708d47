"""The plugin contract: everything a quantization method sees, and everything it returns.

A method is a frozen dataclass whose fields are its options, with a class attribute `info` and one method,
`quantize(problem) -> QuantizedLayer`. It is stateless, pure and deterministic: it reads the problem, changes
nothing in it, draws randomness only from `problem.seed`, and computes in float32 or float64. It never sees a
model, a file, a hook or a packed word.

Notation in the docstrings of this package: W is the weight, H the Hessian, E = W - What the error of the
dequantized weight What. The layer loss is tr(E H Eᵀ), the expected squared error of the layer's output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantlab.finite import all_finite

MIN_BITS, MAX_BITS = 2, 8

_ROWS, _COLUMNS = 512, 256  # treated at a time where a whole matrix would need a wider copy
_ROWS_OF_CODES = 64  # the same for codes, which become int64 to be looked up


class Statistic(Enum):
    """What a method may ask the engine to collect about the inputs of a layer."""

    HESSIAN = "hessian"
    FISHER = "fisher"


@dataclass(frozen=True, kw_only=True)
class QuantizerInfo:
    """What a method is and what it can do.

    Attributes:
        name: lower-case identifier, equal to the entry-point name.
        summary: one line for tables.
        paper: where the method is published, for example "arXiv:2501.12956".
        bits: supported code widths, each between 2 and 8.
        needs: statistics the engine must collect; empty means that no calibration is needed.
        supports_groups: whether `group_size` may be set.
        row_independent: whether each output row is solved by itself, so that the engine may stack the rows of
            several layers with the same input, or solve a part of the rows.
        presets: named sets of option values, selected by `preset:` in a recipe.
    """

    name: str
    summary: str
    paper: str
    bits: frozenset[int]
    needs: frozenset[Statistic] = frozenset()
    supports_groups: bool = False
    row_independent: bool = True
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """The storage budget of a layer; it belongs to the experiment, not to the method.

    Attributes:
        bits: code width, 2 to 8.
        group_size: inputs that share a codebook; None means one codebook per output row.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits} must be between {MIN_BITS} and {MAX_BITS}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be positive, or None for one codebook per row")

    @property
    def levels(self) -> int:
        """Codebook entries: 2**bits."""
        return 1 << self.bits


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """What the engine measured about a layer's inputs; shared by layers with the same input, read-only.

    Attributes:
        hessian: (in_features, in_features) float32, the mean over calibration tokens of x xᵀ: no factor 2, no
            damping. A method's answer must not depend on its scale.
        num_tokens: calibration tokens behind the mean.
        fisher: (out_features, in_features) float32, the diagonal of the empirical Fisher information: the mean over
            calibration sequences of the squared gradient of the model's loss by each weight. Collected only for
            methods that ask for it, and of the rows of this problem.
    """

    hessian: Tensor
    num_tokens: int
    fisher: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """One linear layer to quantize.

    Attributes:
        name: the layer's name in the model, for messages.
        weight: (out_features, in_features), any floating dtype, possibly non-contiguous.
        spec: the storage budget.
        statistics: None if the method needs none.
        prepared: what the method's `prepare_statistics` made of these statistics; None if it is to do that itself.
        seed: source of all randomness.

    Raises:
        ValueError: on construction, if shapes disagree, values are not finite, or the group size does not
            divide in_features.
    """

    name: str
    weight: Tensor
    spec: CodebookSpec
    statistics: InputStatistics | None = None
    prepared: object = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.numel() == 0:
            raise ValueError(f"{self.name}: weight has shape {tuple(self.weight.shape)}; it must be a non-empty matrix")
        if not self.weight.is_floating_point():
            raise ValueError(f"{self.name}: weight has dtype {self.weight.dtype}; it must be floating point")
        if not all_finite(self.weight):
            raise ValueError(f"{self.name}: weight contains NaN or infinity")
        size = self.spec.group_size
        if size is not None and self.in_features % size:
            raise ValueError(
                f"{self.name}: in_features={self.in_features} is not a multiple of group_size={size}; "
                "choose a divisor, or group_size: null for one codebook per row"
            )
        if self.statistics is not None:
            hessian, expected = self.statistics.hessian, (self.in_features, self.in_features)
            if tuple(hessian.shape) != expected:
                raise ValueError(f"{self.name}: Hessian has shape {tuple(hessian.shape)}, expected {expected}")
            if not all_finite(hessian):
                raise ValueError(
                    f"{self.name}: the Hessian contains NaN or infinity; the layer's inputs overflowed during "
                    "calibration (try model.dtype: float32)"
                )
            if self.statistics.fisher is not None:
                self._check_fisher(self.statistics.fisher)

    @property
    def out_features(self) -> int:
        """Rows of the weight: outputs of the layer."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight: inputs of the layer."""
        return self.weight.shape[1]

    def _check_fisher(self, fisher: Tensor) -> None:
        if fisher.shape != self.weight.shape:
            raise ValueError(
                f"{self.name}: the Fisher diagonal has shape {tuple(fisher.shape)}, expected {tuple(self.weight.shape)}"
            )
        if not (all_finite(fisher) and (fisher >= 0).all()):
            raise ValueError(f"{self.name}: the Fisher diagonal contains NaN, infinity or negative values")

    def require_fisher(self) -> Tensor:
        """The diagonal of the Fisher information.

        Raises:
            ValueError: if it was not collected.
        """
        if self.statistics is None or self.statistics.fisher is None:
            raise ValueError(f"{self.name}: this method needs the Fisher diagonal, but it was not collected")
        return self.statistics.fisher

    def require_statistics(self) -> InputStatistics:
        """The statistics.

        Raises:
            ValueError: if the problem carries none.
        """
        if self.statistics is None:
            raise ValueError(f"{self.name}: this method needs the Hessian, but no statistics were collected")
        return self.statistics

    def require_hessian(self) -> Tensor:
        """The Hessian.

        Raises:
            ValueError: if the problem carries no statistics.
        """
        return self.require_statistics().hessian


@dataclass(frozen=True, kw_only=True, eq=False)
class Lut:
    """A free codebook: any `levels` values per output row and group.

    Attributes:
        values: (out_features, groups, levels) float32.
    """

    values: Tensor

    def levels(self) -> Tensor:
        """The codebook entries: (out_features, groups, levels)."""
        return self.values


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformGrid:
    """Equally spaced levels: level k is (k - zero) * scale.

    Attributes:
        scale: (out_features, groups) float32, positive.
        zero: (out_features, groups) float32, the code (not necessarily whole) of the value 0.
        bits: code width.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def levels(self) -> Tensor:
        """The codebook entries: (out_features, groups, levels)."""
        codes = torch.arange(1 << self.bits, dtype=self.scale.dtype, device=self.scale.device)
        return (codes - self.zero[..., None]) * self.scale[..., None]


Codebook = Lut | UniformGrid


@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers:
    """Sparse corrections, *added* to the dense quantized weight.

    A method that wants an entry to become exactly w stores w minus the level that its code selects.

    Attributes:
        rows: (count,) int64.
        columns: (count,) int64; (row, column) pairs are unique and ascend.
        values: (count,) float32.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLayer:
    """The answer of a method.

    Attributes:
        codes: (out_features, in_features) uint8, unpacked, each below 2**bits.
        codebook: what the codes select from; column j belongs to group j // group_size.
        outliers: sparse additive corrections, or None.
        diagnostics: finite numbers worth reporting. Some names are reserved. "loss" is the layer loss with the
            undamped Hessian, verified by the engine. "fallbacks" counts departures from the options that the data
            forced on the method, such as more damping than asked for; unless the recipe allows them, they end the
            run. "loss_0", "loss_1" and so on are what the method minimises after each of its steps, over all rows
            or some of them; the report draws them as a curve.
    """

    codes: Tensor
    codebook: Codebook
    outliers: Outliers | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def dequantize(self) -> Tensor:
        """The dense weight it stands for: (out_features, in_features) float32."""
        levels = self.codebook.levels()
        out_features, groups, _ = levels.shape
        weight = torch.empty(self.codes.shape, dtype=levels.dtype, device=levels.device)
        for start in range(0, out_features, _ROWS_OF_CODES):
            rows = slice(start, start + _ROWS_OF_CODES)
            grouped_codes = self.codes[rows].reshape(-1, groups, self.codes.shape[1] // groups).long()
            weight[rows] = levels[rows].gather(2, grouped_codes).flatten(1)
        if self.outliers is not None:
            position = (self.outliers.rows, self.outliers.columns)
            weight = weight.index_put(position, self.outliers.values, accumulate=True)
        return weight


class LayerQuantizer(Protocol):
    """A quantization method: a frozen dataclass whose fields are its options.

    `info` describes the method with its default options. Where an option changes what the method needs or can do,
    the instance carries an `info` of its own. A method that derives something costly from the statistics alone is
    a `StatisticsPreparer`, too.
    """

    info: ClassVar[QuantizerInfo]

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer.

        Raises:
            ValueError: the request is not supported (bits, groups, missing statistics).
            NumericalError: the problem cannot be solved in floating point.
        """
        ...


@runtime_checkable
class StatisticsPreparer(Protocol):
    """The optional part of a method: work that depends on the statistics alone, such as a factorisation.

    Layers that share an input, and pieces of a layer, have the same statistics. The engine has this work done once
    for all of them, and hands the outcome on in `LayerProblem.prepared`; it may send it to other machines and devices.
    """

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> object:
        """What `quantize` would otherwise make of the statistics for every problem anew, with the same result.

        Args:
            statistics: without the Fisher diagonal, which belongs to rows.
            dtype: what the problems are solved in: float32, or float64 if weights and Hessian are float64.

        Returns:
            A tensor, or a dataclass of tensors and plain values; None if there is nothing to share.

        Raises:
            NumericalError: the statistics cannot be treated in floating point.
        """
        ...


def layer_loss(weight: Tensor, weight_hat: Tensor, hessian: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Expected squared output error of every row, e H eᵀ: (out_features,) float64.

    Evaluated as sum((E H) * E), which does not cancel, block by block: no matrix is copied to `dtype` as a whole, and
    of the symmetric H only the blocks on and above the diagonal are read.

    Args:
        weight: (out_features, in_features).
        weight_hat: (out_features, in_features).
        hessian: (in_features, in_features).
        dtype: of the products. Errors that a method has fitted to H need float64, since it leaves what H weighs
            least; float32 is twice as fast, and enough for others.
    """
    return torch.cat(
        [
            _loss_of_rows(*rows, hessian, dtype)
            for rows in zip(weight.split(_ROWS), weight_hat.split(_ROWS), strict=True)
        ]
    )


def _loss_of_rows(weight: Tensor, weight_hat: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    error = weight.to(dtype) - weight_hat.to(dtype)
    loss = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for start in range(0, error.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        product = error[:, columns] @ hessian[columns, columns].to(dtype)
        if start:
            product.addmm_(error[:, :start], hessian[:start, columns].to(dtype), alpha=2)
        loss += (product * error[:, columns]).sum(dim=1, dtype=torch.float64)
    return loss
