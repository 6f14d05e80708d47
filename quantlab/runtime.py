"""The quantized linear layer as it runs.

The engine puts a `LutLinear` in the place of every layer it has solved, and the reader puts the same module
in the place of every layer a checkpoint lists. Both therefore compute with the same stored numbers, and a
loaded model equals the one that was calibrated bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

import quantlab_kernels
from quantlab.api import CodebookSpec, Lut, Outliers, QuantizedLayer, UniformGrid
from quantlab.errors import NumericalError

CODEBOOK_DTYPE = torch.float16

CodebookKind = Literal["lut", "uniform"]


@dataclass(frozen=True)
class ModuleSpec:
    """How one linear layer is stored.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        bits: code width, 2 to 8.
        group_size: inputs that share a codebook, a divisor of in_features; None means one codebook per row.
        codebook: "lut" for free levels, "uniform" for scale and zero.
        outliers: stored additive corrections.
        bias: whether the layer has a bias.

    Raises:
        ValueError: on construction, if a value is out of range.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int | None
    codebook: CodebookKind
    outliers: int
    bias: bool

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a weight of shape ({self.out_features}, {self.in_features}) is empty")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be between 2 and 8")
        if self.group_size is not None and (self.group_size < 1 or self.in_features % self.group_size):
            raise ValueError(f"group_size={self.group_size} must divide in_features={self.in_features}")
        if self.codebook not in ("lut", "uniform"):
            raise ValueError(f"codebook={self.codebook!r} must be 'lut' or 'uniform'")
        if not 0 <= self.outliers <= self.out_features * self.in_features:
            raise ValueError(f"outliers={self.outliers} must be between 0 and the number of weights")

    @property
    def groups(self) -> int:
        """Codebooks per output row."""
        return 1 if self.group_size is None else self.in_features // self.group_size


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def storage_layout(spec: ModuleSpec) -> Layout:
    """The tensors that store a weight, bias excepted: name to dtype and shape."""
    rows, groups = spec.out_features, spec.groups
    layout: Layout = {"packed_codes": (torch.int32, (spec.bits, rows, -(-spec.in_features // 32)))}
    if spec.codebook == "lut":
        layout["codebook"] = (CODEBOOK_DTYPE, (rows, groups, 1 << spec.bits))
    else:
        layout["scale"] = (CODEBOOK_DTYPE, (rows, groups))
        layout["zero"] = (CODEBOOK_DTYPE, (rows, groups))
    if spec.outliers:
        layout["outlier_offsets"] = (torch.int32, (rows + 1,))
        layout["outlier_columns"] = (torch.int32, (spec.outliers,))
        layout["outlier_values"] = (CODEBOOK_DTYPE, (spec.outliers,))
    return layout


class LutLinear(nn.Module):
    """A linear layer whose weight is codes into a codebook, plus optional additive outliers.

    Casting the module (`.to(torch.bfloat16)`, `.half()`) casts the bias only: the stored weight is the result
    of the quantization and must not be rounded again.

    Attributes:
        spec: sizes and kind of storage.
        in_features: width of the input.
        out_features: width of the output.
        bias: (out_features,) or None.
    """

    bias: Tensor | None

    def __init__(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Wrap stored tensors.

        Args:
            spec: what is stored.
            tensors: exactly the tensors of `storage_layout(spec)`.
            bias: (out_features,) if `spec.bias`, otherwise None.

        Raises:
            ValueError: a tensor is missing, unexpected, or of the wrong dtype or shape.
        """
        super().__init__()
        layout = storage_layout(spec)
        if tensors.keys() != layout.keys():
            raise ValueError(f"tensors are {sorted(tensors)}; this layer stores {sorted(layout)}")
        for name, (dtype, shape) in layout.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} {shape}")
            self.register_buffer(name, tensor)
        bias_shape = None if bias is None else tuple(bias.shape)
        if bias_shape != ((spec.out_features,) if spec.bias else None):
            raise ValueError(
                f"bias has shape {bias_shape}; expected {spec.out_features} values if and only if spec.bias"
            )
        self.register_buffer("bias", bias)
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features

    @classmethod
    def from_layer(cls, layer: QuantizedLayer, spec: CodebookSpec, bias: Tensor | None) -> Self:
        """Store the answer of a method.

        Args:
            layer: codes, codebook and outliers.
            spec: the storage budget that the layer was solved for.
            bias: (out_features,) or None, kept in its dtype.

        Raises:
            ValueError: the layer does not have the shape that the budget implies.
            NumericalError: a value is not finite, or too large, in float16.
        """
        module_spec = ModuleSpec(
            out_features=layer.codes.shape[0],
            in_features=layer.codes.shape[1],
            bits=spec.bits,
            group_size=spec.group_size,
            codebook="lut" if isinstance(layer.codebook, Lut) else "uniform",
            outliers=0 if layer.outliers is None else layer.outliers.values.numel(),
            bias=bias is not None,
        )
        tensors = {"packed_codes": quantlab_kernels.pack_codes(layer.codes, spec.bits)}
        if isinstance(layer.codebook, Lut):
            tensors["codebook"] = _to_storage("codebook", layer.codebook.values)
        else:
            tensors["scale"] = _to_storage("scale", layer.codebook.scale)
            tensors["zero"] = _to_storage("zero", layer.codebook.zero)
        if layer.outliers is not None and module_spec.outliers:
            tensors |= _compress_rows(layer.outliers, module_spec.out_features)
        return cls(module_spec, tensors, None if bias is None else bias.detach().clone())

    @classmethod
    def empty(cls, spec: ModuleSpec, *, bias_dtype: torch.dtype = torch.float32) -> Self:
        """A placeholder without memory, on the meta device, to load stored tensors into."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in storage_layout(spec).items()
        }
        bias = torch.empty(spec.out_features, dtype=bias_dtype, device="meta") if spec.bias else None
        return cls(spec, tensors, bias)

    @property
    def storage_bits(self) -> int:
        """Bits that store the weight: codes with their padding, codebook, outliers; not the bias."""
        return 8 * sum(self.get_buffer(name).nbytes for name in storage_layout(self.spec))

    def dequantize(self) -> Tensor:
        """The dense weight that `forward` multiplies with: (out_features, in_features) float32."""
        return quantlab_kernels.dequantize(
            self.get_buffer("packed_codes"), self._levels(), self.in_features, *self._outliers()
        )

    def forward(self, x: Tensor) -> Tensor:
        """X Wᵀ + bias: (..., in_features) to (..., out_features), in the type of x."""
        result: Tensor = torch.ops.quantlab.lut_matmul(
            x, self.get_buffer("packed_codes"), self._levels(), self.bias, *self._outliers()
        )
        return result

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in vars(self.spec).items())

    def _levels(self) -> Tensor:
        if self.spec.codebook == "lut":
            return self.get_buffer("codebook")
        grid = UniformGrid(
            scale=self.get_buffer("scale").float(), zero=self.get_buffer("zero").float(), bits=self.spec.bits
        )
        return grid.levels()

    def _outliers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.spec.outliers:
            return None, None, None
        return (
            self.get_buffer("outlier_offsets"),
            self.get_buffer("outlier_columns"),
            self.get_buffer("outlier_values"),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {name: self.get_buffer(name) for name in storage_layout(self.spec)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in stored.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def _to_storage(name: str, values: Tensor) -> Tensor:
    stored = values.detach().to(CODEBOOK_DTYPE)
    if not torch.isfinite(stored).all():
        raise NumericalError(
            f"{name} has a largest magnitude of {values.abs().max().item():g}; it is stored as float16, which ends "
            f"at {torch.finfo(CODEBOOK_DTYPE).max:g}: rescale the layer or exclude it"
        )
    return stored.contiguous()


def _compress_rows(outliers: Outliers, out_features: int) -> dict[str, Tensor]:
    per_row = torch.bincount(outliers.rows, minlength=out_features)
    return {
        "outlier_offsets": torch.nn.functional.pad(per_row.cumsum(0), (1, 0)).to(torch.int32),
        "outlier_columns": outliers.columns.to(torch.int32),
        "outlier_values": _to_storage("outlier values", outliers.values),
    }
